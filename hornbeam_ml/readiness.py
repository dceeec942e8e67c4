"""Whether this process should get requests: its phase, and what else speaks against it.

A worker boots, serves and leaves, and says so here. Any other process, such as one of plain
uvicorn, counts as serving all the time.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

Phase = Literal["booting", "serving", "draining"]
logger = logging.getLogger("hornbeam.readiness")
_WORDS: Final = {"booting": "the worker boots", "draining": "the worker is about to end"}


class Readiness:
    """The phase of a process, and checks by name. Safe to use from any thread or signal handler.

    Nothing here takes a lock, so a forked child only has to start anew with the phase.
    """

    def __init__(self) -> None:
        self.phase: Phase = "serving"
        self._checks: dict[str, Callable[[], str | None]] = {}

    def register(self, name: str, check: Callable[[], str | None]) -> None:
        """Add a check, or replace the one of that name; see `register`."""
        self._checks[name] = check

    def unregister(self, name: str) -> None:
        """Remove a check, if it is there."""
        self._checks.pop(name, None)

    def reasons(self) -> list[str]:
        """Return why the process is not ready; see `reasons`."""
        found = [_WORDS[self.phase]] if self.phase in _WORDS else []
        for name, check in list(self._checks.items()):
            try:
                reason: Any = check()
            except Exception:
                logger.exception("readiness check %r failed", name)
                reason = f"the check {name!r} failed"
            if reason and str(reason) not in found:
                found.append(str(reason))
        return found

    def forget_after_fork(self) -> None:
        """In a forked child: the phase was the parent's."""
        self.phase = "serving"


_readiness = Readiness()  # of this process
os.register_at_fork(after_in_child=_readiness.forget_after_fork)


def boot() -> None:
    """Note that this process is a worker, which does not take requests yet."""
    _readiness.phase = "booting"


def serve() -> None:
    """Note that the worker begins to accept connections."""
    _readiness.phase = "serving"


def drain() -> None:
    """Note that the worker finishes what it has, and then ends."""
    _readiness.phase = "draining"


def phase() -> Phase:
    """Return the phase of this process; ``serving`` outside of a worker."""
    return _readiness.phase


def register(name: str, check: Callable[[], str | None]) -> None:
    """Have a check decide, among others, whether this process is ready.

    Args:
        name: Whose check it is; one of the same name is replaced.
        check: Returns why the process is not ready, or None. It is called on an event loop's
            thread at every probe, so it must not wait for anything, and what it returns is shown
            to anybody.
    """
    _readiness.register(name, check)


def unregister(name: str) -> None:
    """Remove a check, if it is there."""
    _readiness.unregister(name)


def reasons() -> list[str]:
    """Return why this process is not ready to get requests; nothing: it is. Never waits."""
    return _readiness.reasons()
