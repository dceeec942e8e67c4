"""The life of a worker among the others of its server, as one object that the worker asks.

What is decided here follows from the board: whether a worker that was asked to stop leaves now
(`handover`), whether one that has served enough may (`recycling`), and what a boot that fails
does to the server.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Final

from hornbeam_ml import readiness
from hornbeam_ml.lifecycle.board import Board, State, arbiters_board
from hornbeam_ml.lifecycle.handover import Handover, Verdict, arbiter_stopped, verdict
from hornbeam_ml.lifecycle.recycling import Limits, may_leave

if TYPE_CHECKING:
    from collections.abc import Callable

_TICK_S: Final = 0.1
_MOST_DOUBLINGS: Final = 5


class Lifecycle:
    """Where one worker is in its life.

    gunicorn makes a worker in the arbiter and forks then: the constructor runs there, everything
    else in the worker's process, on its main thread.

    Args:
        worker: gunicorn's object.
        cfg: Its configuration.

    Attributes:
        slot: The worker's number among those that live at the same time, from 0.
    """

    def __init__(self, worker: Any, cfg: Any) -> None:
        self._board: Board = arbiters_board()
        self.slot = self._board.seat(worker, cfg)
        self._log = worker.log
        self._arbiter: int = worker.ppid
        self._handover = Handover()
        self._limits = Limits(None, None)
        self._waits: tuple[str, float] | None = None
        self._next_tick = 0.0
        self._state = State.BOOTING

    def begin(self) -> None:
        """Take the worker's row, in its own process."""
        self._board.take(self.slot)

    # Booting.

    def pause(self, longest: float, wanted: Callable[[], bool]) -> None:
        """Wait before booting if others of this version could not boot; twice as long each time.

        Args:
            longest: Seconds at most.
            wanted: Says, asked every second, whether to go on.
        """
        failures = self._board.failures
        if not failures:
            return
        rounds = (failures - 1) // max(1, self._board.wanted)
        seconds = min(2.0 ** min(rounds, _MOST_DOUBLINGS), longest)
        self._log.warning("%d boots have failed; the next is in %.0f s", failures, seconds)
        self._say(State.PAUSED)
        until = time.monotonic() + seconds
        while wanted() and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))
        self._say(State.BOOTING)

    def fail(self) -> bool:
        """Note that this worker cannot boot; return whether the server goes on without it."""
        self._say(State.FAILED)
        return self._board.ever_ready

    def serve(self, limits: Limits) -> None:
        """Note that the worker is ready, and what it may use up from now on."""
        self._limits = limits
        self._say(State.READY)
        readiness.serve()

    @property
    def booting(self) -> bool:
        """Whether the worker is neither ready nor was told to stop."""
        return self._state in {State.BOOTING, State.PAUSED}

    # Serving.

    @property
    def serving(self) -> bool:
        """Whether the worker takes requests."""
        return self._state in {State.READY, State.RETIRING}

    def ask(self) -> bool:
        """Note that the worker is asked to stop; return whether it has to at once."""
        board, now = self._board, time.monotonic()
        if not self.serving:
            return True
        if arbiter_stopped(self._arbiter, board.listener):
            return True
        if self._handover.ask(now, board.generation, newer_exist=self._newer_exist()):
            return True
        return self._verdict() is Verdict.LEAVE

    def tick(self, requests: int, in_flight: int) -> bool:
        """Return whether it is time to leave. Cheap enough to be asked all the time.

        Args:
            requests: How many the worker has begun to serve.
            in_flight: How many of these it has not finished.
        """
        now = time.monotonic()
        if now < self._next_tick or not self.serving:
            return False
        self._next_tick = now + _TICK_S
        if self._handover.asked:
            return self._hand_over(now)
        if self._waits is None and (reason := self._limits.exceeded(requests, now)):
            self._waits = reason, now
        return self._waits is not None and self._recycle(*self._waits, in_flight, now)

    def leave(self) -> None:
        """Note that the worker takes no more connections."""
        if self.serving:
            self._say(State.LEAVING)
            readiness.drain()

    def end(self) -> None:
        """Note that the process ends."""
        if self._state is State.LEAVING:
            self._say(State.GONE)

    def stop(self) -> None:
        """Note that the worker was told to stop before it was ready."""
        if self.booting:
            self._say(State.STOPPED)

    def _hand_over(self, now: float) -> bool:
        newest = self._board.generation
        answer = self._handover.settle(
            now, self._verdict(), newest, newer_exist=self._newer_exist()
        )
        if answer is Verdict.LEAVE:
            return True
        if answer is Verdict.VOID:
            self._log.error("The new version failed to boot; this worker serves on")
        state = State.RETIRING if self._handover.asked else State.READY
        if state is not self._state:
            self._say(state)
        return False

    def _verdict(self) -> Verdict:
        board = self._board
        return verdict(board.own(), board.rows(), board.generation, board.wanted)

    def _recycle(self, reason: str, since: float, in_flight: int, now: float) -> bool:
        board = self._board
        with board.deciding() as alone:
            if not alone or not may_leave(board.own(), board.rows(), board.wanted, now, since):
                return False
            self.leave()
        line = "Autorestarting worker after %.0f s of waiting for its turn: %s; %d in flight"
        self._log.info(line, now - since, reason, in_flight)
        return True

    def _newer_exist(self) -> bool:
        """Return whether there are newer workers, also dead ones that were not reaped yet."""
        newest = self._board.generation
        rows = [row for row in self._board.rows() if row.generation == newest]
        return any(row.alive or _exists(row.pid) for row in rows)

    def _say(self, state: State) -> None:
        self._state = state
        self._board.say(state)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return bool(pid)
