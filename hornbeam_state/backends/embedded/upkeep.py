"""What one process at a time does for an embedded store: sweep, clean up, take snapshots.

Every process that has the store open runs this thread. The one that holds the lock does the work;
when it dies, the kernel frees the lock and another takes over within some seconds.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Final

from hornbeam_state.backends.kernel_locks import KernelLock, try_kernel_lock
from hornbeam_state.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

logger = logging.getLogger("hornbeam.store")

_TICK: Final = 1.0
_STAND_FOR_ELECTION: Final = 3.0
_PAUSE: Final = 0.002  # after each step, to let other writers through


class Duty:
    """Something to do every so often.

    Args:
        work: Does a step of it; returns whether there is more to do at once.
        every: Seconds between two times.
    """

    def __init__(self, work: Callable[[], bool], every: float) -> None:
        self.work = work
        self.every = every
        self.due = time.monotonic() + every


class Upkeep:
    """A daemon thread that carries out duties while its process is the elected one.

    Args:
        lock: The file of the lock that elects.
        duties: What to do.
    """

    def __init__(self, lock: Path, duties: Sequence[Duty]) -> None:
        self._lock_file = lock
        self._duties = list(duties)
        self._working = threading.Lock()
        self._held: KernelLock | None = None
        self._stopping = threading.Event()
        self._at_end: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._run, name="hornbeam-upkeep", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after the step it is at."""
        self._stopping.set()
        self._thread.join(timeout=5)

    def end_with(self, last: Callable[[], None]) -> None:
        """Have the thread end by itself, and do one last thing then. Takes no locks."""
        self._at_end = last
        self._stopping.set()

    def hold(self) -> None:
        """Keep the thread from working until `go_on`, once the step it is at is done."""
        self._working.acquire()

    def go_on(self) -> None:
        """Let the thread work again after `hold`."""
        self._working.release()

    def forget_after_fork(self) -> None:
        """Leave, in a forked child, the work and the election to the parent.

        The frame of the parent's thread is never freed in the child, and with it what it refers
        to; an LMDB environment among that could not be opened anew.
        """
        self._duties.clear()
        if self._held is not None:
            self._held.close_after_fork()

    def _run(self) -> None:
        try:
            while not self._stopping.wait(self._pause()):
                if self._is_elected():
                    self._work()
        finally:
            if self._held is not None:
                self._held.release()
            if self._at_end is not None:
                self._at_end()

    def _pause(self) -> float:
        return _TICK if self._held is not None else _STAND_FOR_ELECTION

    def _is_elected(self) -> bool:
        if self._held is None:
            try:
                self._held = try_kernel_lock(self._lock_file, b"upkeep")
            except StoreError as error:
                logger.warning("no upkeep of the store: %s", error)
        return self._held is not None

    def _work(self) -> None:
        for duty in self._duties:
            if duty.due > time.monotonic():
                continue
            try:
                while self._step(duty) and not self._stopping.wait(_PAUSE):
                    pass
            # Busy, or the disk is full or worse: the next time may go better.
            except (StoreError, OSError) as error:
                logger.warning("upkeep of the store failed: %s", error)
            duty.due = time.monotonic() + duty.every

    def _step(self, duty: Duty) -> bool:
        with self._working:
            return duty.work()
