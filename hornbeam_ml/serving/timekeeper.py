"""Deadlines of calls for which nobody waits: those behind a future.

A caller that waits watches its own deadline. A future may be looked at never, or with a callback,
so one thread of the process, started when first needed, ends these calls when it is too late.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hornbeam_ml.serving.calls import Call
    from hornbeam_ml.serving.queue import BatchQueue

logger = logging.getLogger("hornbeam.serving")


class Timekeeper:
    """Ends calls at their deadlines. Keeps neither calls nor queues alive."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._heap: list[tuple[float, int, weakref.ref[BatchQueue], weakref.ref[Call]]] = []
        self._numbers = itertools.count()
        self._started = False

    def watch(self, queue: BatchQueue, call: Call) -> None:
        """End a call at its deadline, unless it is done by then."""
        # The wall clock of the heap is the system's, whatever clock the queue has.
        due = time.monotonic() + call.deadline - queue.clock()
        entry = due, next(self._numbers), weakref.ref(queue), weakref.ref(call)
        with self._changed:
            heapq.heappush(self._heap, entry)
            if not self._started:
                threading.Thread(target=self._run, name="hornbeam-deadlines", daemon=True).start()
                self._started = True
            elif self._heap[0] is entry:
                self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._heap or self._heap[0][0] > time.monotonic():
                    self._changed.wait(self._heap[0][0] - time.monotonic() if self._heap else None)
                _, _, queue_ref, call_ref = heapq.heappop(self._heap)
            queue, call = queue_ref(), call_ref()
            if queue is not None and call is not None:
                try:
                    queue.expire(call)
                except BaseException:  # others have deadlines too
                    logger.exception("ending a call at its deadline failed")
            del queue, call, queue_ref, call_ref


def _make_anew() -> None:
    global _timekeeper  # noqa: PLW0603 - its thread is not in the child
    _timekeeper = Timekeeper()


_timekeeper = Timekeeper()  # the one of this process
os.register_at_fork(after_in_child=_make_anew)


def watch(queue: BatchQueue, call: Call) -> None:
    """End a call at its deadline, unless it is done by then."""
    _timekeeper.watch(queue, call)
