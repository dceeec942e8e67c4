"""When a worker that was asked to stop leaves to those of a newer generation.

On SIGHUP gunicorn forks workers with the new configuration and at once asks the old ones to stop,
and again about every second while there are too many. An old worker serves on until enough of the
new ones are ready: the oldest leaves to the first of them, and so on. When none of the new ones
can boot, the old ones stay, and what they were asked is void.

The same signal also means that the server stops, which has to be told apart.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hornbeam_ml.lifecycle.board import State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hornbeam_ml.lifecycle.board import Row

_REPEAT_S: Final = 1.0
"""How long after the last new worker has gone the arbiter may still ask because of it."""


class Verdict(enum.Enum):
    """What a worker that was asked to stop does now."""

    STAY = "stay"
    LEAVE = "leave"
    VOID = "void"
    """Stay: the newer generation could not boot."""


def verdict(own: Row, rows: Sequence[Row], newest: int, wanted: int) -> Verdict:
    """Decide for a worker that was asked to stop, by the rows of the board.

    Args:
        own: Its row.
        rows: All rows; `own` may be among them.
        newest: The newest generation.
        wanted: How many workers that one will have.
    """
    if newest == own.generation:
        return Verdict.LEAVE
    newer = [row for row in rows if row.generation == newest]
    living = [row.state for row in newer if row.alive]
    ready = living.count(State.READY)
    if State.BOOTING in living:
        # The youngest stay, as many as are missing.
        staying = sum(row.age > own.age for row in rows if _is_old_and_serves(row, newest))
        return Verdict.LEAVE if ready and staying >= wanted - ready else Verdict.STAY
    if ready or any(row.state is State.STOPPED for row in newer):
        return Verdict.LEAVE  # in the second case whoever told those to stop stops the server
    return Verdict.VOID if newer and all(map(_could_not_boot, newer)) else Verdict.STAY


def _is_old_and_serves(row: Row, newest: int) -> bool:
    serves = row.state in {State.READY, State.RETIRING}
    return row.alive and serves and row.generation < newest


def _could_not_boot(row: Row) -> bool:
    return row.state in {State.FAILED, State.PAUSED} or (
        row.state is State.BOOTING and not row.alive
    )


class Handover:
    """What a worker makes of being asked to stop.

    Attributes:
        asked: Whether it has been, and the answer is not void.
    """

    def __init__(self) -> None:
        self.asked = False
        self._asked_at = 0.0
        self._void = 0  # the generation that could not boot
        self._repeats_until = 0.0

    def ask(self, now: float, newest: int, *, newer_exist: bool) -> bool:
        """Note that the worker is asked to stop; return whether it has to at once.

        Args:
            now: Seconds of a monotonic clock, as everywhere.
            newest: The newest generation.
            newer_exist: Whether there are processes of that generation, dead ones that were not
                reaped included: as long as there are, the arbiter sees too many workers.
        """
        if newer_exist:
            self._repeats_until = now + _REPEAT_S
        if self._void == newest and now >= self._repeats_until:
            return True
        self.asked, self._asked_at = True, now
        return False

    def settle(self, now: float, answer: Verdict, newest: int, *, newer_exist: bool) -> Verdict:
        """Return what a worker that was asked does now, given the `verdict`.

        `VOID` is returned once for a generation. It takes a second without being asked, so that
        a server that stops has the time to stop its booting workers too.
        """
        if newer_exist:
            self._repeats_until = now + _REPEAT_S
        if answer is not Verdict.VOID:
            return answer
        if now - self._asked_at < _REPEAT_S:
            return Verdict.STAY
        self.asked = False
        if self._void == newest:
            return Verdict.STAY
        self._void = newest
        return Verdict.VOID


def arbiter_stopped(arbiter: int, listener: int) -> bool:
    """Return whether the arbiter has closed its listening socket, as it does when it stops.

    False where that cannot be seen: the arbiter is another user's, or has no such socket.

    Args:
        arbiter: Its pid.
        listener: The inode of the socket, or 0.
    """
    if not listener:
        return False
    try:
        links = list(Path(f"/proc/{arbiter}/fd").iterdir())
    except OSError:
        return False
    return all(_target(link) != f"socket:[{listener}]" for link in links)


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:  # closed since it was listed
        return ""
