"""Keeps processes running, and ends with those they are for."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import select
import signal
import sys
import time
from typing import TYPE_CHECKING, Final

from hornbeam_ml.processes import end_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from types import FrameType

    Run = Callable[[int, Callable[[], None]], int]

logger = logging.getLogger("hornbeam.supervisor")

_KILL_AFTER_S: Final = 5.0  # beyond the grace
_LONGEST_PAUSE_S: Final = 30.0
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGCHLD, signal.SIGHUP)


def supervise(
    run: Run,
    *,
    what: str,
    grace: float,
    processes: int = 1,
    lease: int | None = None,
    fatal: int | None = None,
    ends_on_hangup: bool = False,
) -> int:
    """Run processes until a signal or the lease says to stop.

    One that ends is started again: at once if it had loaded, else after a pause that grows. They
    end with this process, also when it is killed. A second signal kills them at once.

    Args:
        run: What a process does, given its number from 0, and what to call when it has loaded.
            Returns the exit status. It is called in a forked child.
        what: What the log calls one of them.
        grace: Seconds that they have to end when they are told to.
        processes: How many.
        lease: A descriptor that reads as ended when nobody is left whom they are for.
        fatal: The exit status of a process that makes no sense to start again, as long as none
            has ever loaded.
        ends_on_hangup: Whether SIGHUP, as from a terminal that is closed, says to stop; it does
            nothing otherwise, or where it is ignored, as under nohup.

    Returns:
        The exit status: 0, or `fatal`.
    """
    ends = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}
    if ends_on_hangup and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        ends.add(signal.SIGHUP)
    return _Supervisor(
        run, what=what, grace=grace, processes=processes, lease=lease, fatal=fatal, ends=ends
    ).run()


class _Supervisor:
    def __init__(
        self,
        run: Run,
        *,
        what: str,
        grace: float,
        processes: int,
        lease: int | None,
        fatal: int | None,
        ends: Collection[int],
    ) -> None:
        self._run = run
        self._what = what
        self._grace = grace
        self._lease = lease
        self._fatal = fatal
        self._ends = ends
        self._status = 0
        self._places = [_Place(index) for index in range(processes)]
        self._stopping = False
        self._quick = False
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def run(self) -> int:
        for signum in _SIGNALS:
            signal.signal(signum, self._note_signal)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        while not self._stopping:
            for place in self._places:
                if place.pid is None and time.monotonic() >= place.due:
                    self._start(place)
            self._wait(min(place.wait() for place in self._places))
            for place, code in self._ended():
                self._note_end(place, code)
        return self._stop()

    def _note_signal(self, signum: int, _frame: FrameType | None) -> None:
        if signum in self._ends:
            self._quick = self._quick or self._stopping or signum == signal.SIGQUIT
            self._stopping = True

    def _wait(self, seconds: float) -> None:
        watched = [self._wake_read, *([] if self._lease is None else [self._lease])]
        readable = select.select(watched, [], [], seconds)[0]
        if self._wake_read in readable:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, 4096)
        if self._lease in readable and not os.read(self._lease, 1):
            self._lease = None
            self._stopping = True

    def _start(self, place: _Place) -> None:
        parent = os.getpid()
        # One that comes before the new process handles it would be lost: they wait until it does.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            place.pid = os.fork()
            if not place.pid:
                _reset_signals()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if place.pid:
            return
        self._become_process(parent)
        status = self._run(place.index, place.note_loaded)
        sys.exit(status)  # as a program of its own would: what runs at exit has been forked too

    def _become_process(self, parent: int) -> None:
        for descriptor in (self._wake_read, self._wake_write, self._lease):
            if descriptor is not None:
                os.close(descriptor)
        end_with_parent(parent)

    def _ended(self) -> Iterator[tuple[_Place, int]]:
        """Yield the places whose process has ended, and its exit code."""
        for place in self._places:
            if place.pid is not None:
                pid, status = os.waitpid(place.pid, os.WNOHANG)
                if pid:
                    yield place, os.waitstatus_to_exitcode(status)

    def _note_end(self, place: _Place, code: int) -> None:
        pause = place.end()
        if code == self._fatal and not any(each.ever_loaded for each in self._places):
            self._stopping, self._status = True, code
            return
        how = f"signal {-code}" if code < 0 else f"status {code}"
        again = "" if self._stopping else f"; starting it again in {pause:.1f} s"
        logger.error("%s ended with %s%s", self._what, how, again)

    def _stop(self) -> int:
        """End the processes: those that do not within the grace are killed."""
        self._signal(signal.SIGTERM)
        until = time.monotonic() + (0.5 if self._quick else self._grace + _KILL_AFTER_S)
        while any(place.pid is not None for place in self._places):
            if self._quick:
                until = min(until, time.monotonic() + 0.5)
            if time.monotonic() >= until:
                self._signal(signal.SIGKILL)
            self._wait(0.1)
            for place, _ in self._ended():
                place.end()
        return self._status

    def _signal(self, signum: signal.Signals) -> None:
        for place in self._places:
            if place.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(place.pid, signum)


class _Place:
    """One of the processes, and when it is to be started again."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.ever_loaded = False
        self.pid: int | None = None
        self.due = 0.0
        self._failures = 0
        self._loaded = mmap.mmap(-1, 1)  # shared with the process

    def note_loaded(self) -> None:
        """In the process: note that it has loaded everything."""
        self._loaded[0] = 1

    def end(self) -> float:
        """Note that it ended; return in how many seconds to start it again."""
        self.pid = None
        self.ever_loaded = self.ever_loaded or bool(self._loaded[0])
        self._failures = 0 if self._loaded[0] else self._failures + 1
        self._loaded[0] = 0
        longer = min(self._failures - 1, 10)  # after 1024 failures it would be no float any more
        pause = min(2.0**longer, _LONGEST_PAUSE_S) if self._failures else 0.0
        self.due = time.monotonic() + pause
        return pause

    def wait(self) -> float:
        """Return for how long there is nothing to do about it."""
        return 3600.0 if self.pid is not None else max(0.0, self.due - time.monotonic())


def _reset_signals() -> None:
    """In a new process: handle signals as if it had been started as a program."""
    signal.set_wakeup_fd(-1)
    for signum in _SIGNALS:
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, _do_nothing)  # this process is told by the one that has it


def _do_nothing(_signum: int, _frame: FrameType | None) -> None:
    """Handle a signal; unlike `SIG_IGN` it is not handed on to programs that are started."""
