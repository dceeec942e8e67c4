"""Forked processes that are stopped and killed, and what they noted until then."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import select
import signal
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

from child_processes import stop


class Child:
    """A forked process that does some work, notes what it did, and hands back what came of it.

    Args:
        work: Called in the child with a function `note` and `args`. What is noted survives the
            child, however it ends, and in the order in which it was noted.
        *args: Further arguments.
        patience: Seconds after which the kernel ends the child by SIGALRM.
    """

    def __init__(self, work, *args, patience: float = 120.0) -> None:
        notes = os.memfd_create("notes")  # a file and not a pipe: noting never waits for a reader
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: "may lead to deadlocks"
            self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(reader)
                faulthandler.disable()  # ends by a signal are what some tests look for
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, patience)
                try:
                    value = work(lambda text: os.write(notes, f"{text}\n".encode()), *args)
                    outcome = {"value": value, "error": None}
                except BaseException as error:
                    outcome = {"value": None, "error": f"{type(error).__name__}: {error}"}
                os.write(writer, json.dumps(outcome).encode())
            finally:
                os._exit(0)
        os.close(writer)
        self._notes, self._reader = notes, reader
        self._outcome: SimpleNamespace | None = None
        _children.append(self)

    def notes(self) -> list[str]:
        """Return what it has noted so far."""
        size = os.fstat(self._notes).st_size
        return os.pread(self._notes, size, 0).decode().splitlines()

    def kill(self) -> None:
        """End it as a crash would; it was alive until then."""
        self.send(signal.SIGKILL)
        outcome = self.outcome()
        assert (outcome.code, outcome.error) == (-signal.SIGKILL, None)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def stop(self) -> None:
        """Stop it, and wait until it stands still."""
        stop(self.pid)

    def outcome(self) -> SimpleNamespace:
        """Wait for the end and return value, error and exit code (negative: the signal)."""
        if self._outcome is None:
            with os.fdopen(self._reader, "rb") as file:
                data = file.read()
            code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            told = json.loads(data or b'{"value": null, "error": null}')
            self._outcome = SimpleNamespace(**told, code=code)
        return self._outcome

    def value(self):
        """Wait for the end and return the value; anything else is a failure."""
        outcome = self.outcome()
        assert (outcome.code, outcome.error) == (0, None)
        return outcome.value

    def close(self) -> None:
        """End it, if it still runs, and forget its notes."""
        if self._outcome is None:
            with contextlib.suppress(ProcessLookupError):
                self.send(signal.SIGKILL)
            self.outcome()
        if self._notes >= 0:
            os.close(self._notes)
            self._notes = -1


_children: list[Child] = []


def end_all() -> int:
    """End all children of this test; return how many of them still ran."""
    running = sum(child._outcome is None for child in _children)
    while _children:
        _children.pop().close()
    return running


def state_of(pid: int) -> str:
    """Return the state of a process: R, S, T (stopped), Z and so on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_until(condition, what: str, seconds: float = 30.0) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain until {what}"
        time.sleep(0.002)


class Gate:
    """Where processes wait until they are let go, all at once."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()

    def wait(self, seconds: float = 60.0) -> None:
        """Wait, in any process, until the gate is open."""
        assert select.select([self._reader], [], [], seconds)[0], "the gate stayed closed"

    def is_open(self) -> bool:
        return bool(select.select([self._reader], [], [], 0)[0])

    def open(self) -> None:
        os.write(self._writer, b".")  # never read, so that everyone sees it

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)
