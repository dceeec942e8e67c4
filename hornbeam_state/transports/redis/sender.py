"""Sending calls and cancelling them: on the thread of who may wait, else on our own."""

from __future__ import annotations

import logging
import select
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from hornbeam_state.backends.readiness import Readiness
from hornbeam_state.errors import DeadlineExceeded
from hornbeam_state.transports.deadlines import Deadlines
from hornbeam_state.transports.redis.adding import Adder
from hornbeam_state.transports.redis.cancelling import Canceller, End
from hornbeam_state.waking import wake

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from hornbeam_state.backends.redis.backend import RedisBackend
    from hornbeam_state.transports.redis.pending import Clock, Pending, Table

logger = logging.getLogger("hornbeam.transport")

_AT_ONCE: Final = 128
_LONGEST_POLL_S: Final = 3600.0
_JOIN_S: Final = 2.0


class Sender:
    """Sends the calls of a process, and cancels them.

    Args:
        backend: The store.
        table: The calls that have no answer yet.
        clock: The server's clock.
        lose: Called when the thread ends by a fault of ours.

    Attributes:
        adder: Sends them.
        queued: How many bytes of calls wait to be sent on the thread.
    """

    def __init__(
        self,
        backend: RedisBackend,
        table: Table,
        clock: Clock,
        lose: Callable[[BaseException], None],
    ) -> None:
        self._table = table
        self.adder = Adder(backend, clock, self.end_soon)
        self._canceller = Canceller(backend, table)
        self._lose = lose
        self._deadlines = Deadlines(table.calls)
        self.queued = 0
        self._lock = threading.Lock()  # of what follows
        self._adds: deque[tuple[Pending, int]] = deque()
        self._ends: deque[End] = deque()
        self._done: deque[Pending] = deque()
        self._bell: Readiness | None = Readiness()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="hornbeam-calls", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller runs on the thread, and must not wait for it."""
        return threading.current_thread() is self._thread

    def add(self, call: Pending) -> None:
        """Send a call; blocks for a round trip.

        Raises:
            NodeDown: the server cannot be reached; `sent` says whether it may have the call.
            Overloaded: too many calls wait for the node.
        """
        error = self.adder.add([call])[0]
        if error is not None:
            raise error

    def add_soon(self, call: Pending) -> None:
        """Send a call on the thread. Its caller learns there what goes wrong."""
        size = call.message.size
        with self._lock:
            self._adds.append((call, size))
            self.queued += size
        self.wake()

    def end_soon(self, call: Pending, error: Callable[[bool], Exception] | None = None) -> None:
        """Cancel a call on the thread. Takes no lock: a finalizer may call it.

        Args:
            call: The call.
            error: Makes what its caller gets, given whether the node may have begun to run it,
                once that is known; None: the caller does not wait any more.
        """
        self._ends.append(End(call, error))
        self.wake()

    def end_all_soon(self, calls: Iterable[Pending], error: Callable[[bool], Exception]) -> None:
        """Cancel calls on the thread, those first that the node takes last.

        The other way round the end of one would let the next begin.
        """
        self._ends.extend([End(call, error) for call in reversed(list(calls))])
        self.wake()

    def wake_soon(self, calls: Sequence[Pending]) -> None:
        """Tell the waiters of calls that are done, on the thread."""
        if calls:
            self._done.extend(calls)
            self.wake()

    def note_deadline(self, call: Pending) -> None:
        """End a call in time."""
        if self._deadlines.add(call.deadline, call.number):
            self.wake()

    def expire(self, call: Pending) -> None:
        """End a call whose deadline passed."""
        self.end_soon(call, _late)

    def wake(self) -> None:
        """Have the thread look what is to be done."""
        bell = self._bell
        if bell is not None:
            bell.set()

    def close(self) -> None:
        """Do what is to be done, and end the thread; wait a moment for that."""
        self._closing = True
        self.wake()
        if not self.is_own_thread:
            self._thread.join(_JOIN_S)

    def forget_after_fork(self) -> None:
        """In a forked child: there is no thread."""
        self._closing = True
        self._bell = None
        self._lock = threading.Lock()
        self._done.clear()
        self._adds.clear()
        self._ends.clear()

    def _run(self) -> None:
        bell = self._bell
        if bell is None:
            return
        poller = select.poll()
        poller.register(bell, select.POLLIN)
        try:
            while not self._closing or self._adds or self._ends or self._done:
                seconds = 0.0 if self._turn() else self._seconds()
                if not self._closing and poller.poll(1000 * seconds):
                    bell.clear()
        except BaseException as error:
            logger.exception("the sender of calls ended by an internal error")
            self._lose(error)
        finally:
            self._bell = None

    def _seconds(self) -> float:
        return min(max(0.0, self._deadlines.next() - time.monotonic()), _LONGEST_POLL_S)

    def _turn(self) -> bool:
        """Do what is to be done; return whether there was anything."""
        for number in self._deadlines.take_due(time.monotonic()):
            call = self._table.get(number)
            if call is not None:
                self.expire(call)
        wake([self._done.popleft() for _ in range(len(self._done))])
        ends = [self._ends.popleft() for _ in range(min(len(self._ends), _AT_ONCE))]
        # First what makes room for others; what is only about to be added can be cancelled after.
        self._canceller.end([end for end in ends if end.call.entry is not None])
        late = [end for end in ends if end.call.entry is None]
        adds = self._take_adds()
        waiting = [call for call in adds if not call.done]
        for call, error in zip(waiting, self.adder.add(waiting), strict=True):
            if error is not None and self._table.take(call):
                call.fail(error)
                wake([call])
        self._canceller.end(late)
        return bool(adds or ends)

    def _take_adds(self) -> list[Pending]:
        taken: list[Pending] = []
        with self._lock:
            while self._adds and len(taken) < _AT_ONCE:
                call, size = self._adds.popleft()
                self.queued -= size
                taken.append(call)
        return taken


def _late(sent: bool) -> DeadlineExceeded:  # noqa: FBT001 - the one argument of every such function
    error = DeadlineExceeded("the node did not answer in time")
    error.sent = sent
    return error
