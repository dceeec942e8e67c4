"""Forked processes for tests: each does some work and hands back what came of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import warnings
from types import SimpleNamespace

from hornbeam_state import HornbeamError

PATIENCE = 60.0
"""Seconds after which a hanging child is killed, and its test fails."""

_NOTHING = {"value": None, "error": None, "message": "", "ours": False}


def start_program():
    """Return a program that waits, has all it needs, and inherited what a program can."""
    pipe = subprocess.PIPE
    program = subprocess.Popen(["cat"], stdin=pipe, stdout=pipe, close_fds=False)
    program.stdin.write(b"is there\n")
    program.stdin.flush()
    assert program.stdout.readline() == b"is there\n"  # no file of its own comes or goes after
    return program


def stop(pid):
    """Stop a child; return when all its threads stand still: when busy some go on for a while."""
    os.kill(pid, signal.SIGSTOP)
    told = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert told.si_code == os.CLD_STOPPED, f"process {pid} has ended"


class Child:
    """A forked process that does some work and hands back what came of it, as JSON."""

    def __init__(self, work, *args) -> None:
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: "may lead to deadlocks"
            self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(reader)
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, PATIENCE)
                os.write(writer, json.dumps(_outcome(work, *args)).encode())
            finally:
                os._exit(0)
        os.close(writer)
        self._reader = reader

    def outcome(self, *, code: int = 0) -> SimpleNamespace:
        """Wait for the end, which has to be of that code (negative: a signal).

        Returns:
            ``value``, ``error`` (the exception's name, or None), ``message`` and ``ours``:
            whether it was a `HornbeamError`.
        """
        with os.fdopen(self._reader, "rb") as file:
            data = file.read()
        _, status = os.waitpid(self.pid, 0)
        assert os.waitstatus_to_exitcode(status) == code, "the process did not end as expected"
        assert data or code, "the process ended without a word"
        return SimpleNamespace(**(json.loads(data) if data else _NOTHING))

    def value(self):
        """Wait for the end and return the value; an exception is a failure."""
        outcome = self.outcome()
        assert outcome.error is None, f"{outcome.error}: {outcome.message}"
        return outcome.value

    def kill(self) -> None:
        """End it as a crash would, and check that it was alive until then."""
        os.kill(self.pid, signal.SIGKILL)
        outcome = self.outcome(code=-signal.SIGKILL)
        assert outcome.error is None, f"{outcome.error}: {outcome.message}"


def _outcome(work, *args) -> dict[str, object]:
    try:
        return _NOTHING | {"value": work(*args)}
    except BaseException as error:
        return {
            "value": None,
            "error": type(error).__name__,
            "message": str(error),
            "ours": isinstance(error, HornbeamError),
        }
