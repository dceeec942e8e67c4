"""Who may run: so many calls at a time, and a bounded queue of those that wait."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from contextvars import ContextVar
from typing import Final

from hornbeam_state.errors import Overloaded

_SHORTEST_RETRY_S: Final = 0.1
_LONGEST_RETRY_S: Final = 30.0
_WEIGHT: Final = 0.1  # of the latest call in the mean of all


class Turn:
    """A call's place in the queue, and then its right to run.

    Attributes:
        id: By which calls that it makes to its own node can share it.
        is_ahead: Whether it is for a call that waits elsewhere, and is counted there.
    """

    __slots__ = ("_began", "_ready", "_turns", "id", "is_ahead", "left")

    def __init__(self, turns: Turns, ready: asyncio.Future[None] | None, id: str) -> None:
        self.id = id
        self.is_ahead = False
        self.left = False
        self._turns = turns
        self._ready = ready
        self._began = 0.0

    @property
    def node(self) -> str:
        """Whose turn it is."""
        return self._turns.node

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of the node."""
        return self._turns.loop

    async def wait(self) -> None:
        """Wait until it is this one's turn."""
        if self._ready is not None:
            await self._ready

    async def comes(self, seconds: float) -> bool:
        """Wait so long; return whether it is this one's turn. It may be asked again."""
        if self._ready is not None:
            await asyncio.wait([self._ready], timeout=seconds)
        return self._ready is None or self._ready.done()

    def begin(self) -> bool:
        """Take note that it is this one's turn; return False if nobody waits for it any more."""
        self._began = self._turns.loop.time()
        if self._ready is None:
            return True
        if self._ready.done():
            return False
        self._ready.set_result(None)
        return True

    def leave(self) -> None:
        """Give the turn, or the place in the queue, to the next. Doing so again does nothing."""
        if not self.left:
            self.left = True
            self._turns.end(self, self._began)


class SharedTurn(Turn):
    """The turn of a call that waits for another one, as that other one has it."""

    __slots__ = ()

    def leave(self) -> None:
        """Do nothing but take note: the turn is that of the call that waits."""
        self.left = True


class Turns:
    """The turns of a node. All of it runs on one event loop.

    Args:
        node: Whose turns these are.
        concurrency: How many calls run at a time.
        most_waiting: How many more may wait.
    """

    def __init__(self, node: str, *, concurrency: int, most_waiting: int) -> None:
        self.node = node
        self.loop = asyncio.get_running_loop()
        self.concurrency = concurrency
        self._most_waiting = most_waiting
        self._running: dict[str, Turn] = {}
        self._waiting: dict[str, Turn] = {}  # in the order of arrival
        self._mean_s = 0.0
        self._name = secrets.token_hex(4)
        self._numbers = itertools.count()

    @property
    def running(self) -> int:
        """How many calls run."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many calls wait here."""
        return sum(not turn.is_ahead for turn in self._waiting.values())

    @property
    def left(self) -> int:
        """How many more may run now."""
        return self.concurrency - len(self._running)

    def ask(self, *, ahead: bool = False) -> Turn:
        """Return a place in the queue.

        Args:
            ahead: Whether it is for a call that waits elsewhere; then it is not refused.

        Raises:
            Overloaded: the queue is full.
        """
        if self.left > 0:
            turn = Turn(self, None, self._new_id())
            turn.begin()
            self._running[turn.id] = turn
            return turn
        if not ahead and len(self._waiting) >= self._most_waiting:
            raise self._full()
        turn = Turn(self, self.loop.create_future(), self._new_id())
        turn.is_ahead = ahead
        self._waiting[turn.id] = turn
        return turn

    def share(self, id: str | None) -> Turn | None:
        """Return what a call has that a running call waits for; None: that does not run."""
        return SharedTurn(self, None, id) if id is not None and id in self._running else None

    def adopt(self, turn: Turn) -> Turn:
        """Return a turn in the place of one that runs, which is over with that."""
        own = Turn(self, None, turn.id)
        own.begin()
        self._running[turn.id] = own
        turn.left = True
        return own

    def end(self, turn: Turn, began: float) -> None:
        """Let the next call run in the place of one; see `Turn.leave`."""
        if self._waiting.pop(turn.id, None) is not None:
            return
        if self._running.pop(turn.id, None) is None:
            return
        self._mean_s += _WEIGHT * (self.loop.time() - began - self._mean_s)
        while self._waiting and self.left > 0:
            following = self._waiting.pop(next(iter(self._waiting)))
            if following.begin():
                self._running[following.id] = following

    def _new_id(self) -> str:
        return f"{self._name}{next(self._numbers)}"

    def _full(self) -> Overloaded:
        error = Overloaded.refusal(
            f"{self._most_waiting} calls wait for the node {self.node}, and "
            f"{len(self._running)} run"
        )
        wait = self._mean_s * self._most_waiting / self.concurrency / 2
        error.retry_after_s = round(min(max(wait, _SHORTEST_RETRY_S), _LONGEST_RETRY_S), 3)
        return error


class TurnsAhead:
    """Turns for calls that wait elsewhere, in a queue they are taken from when they may run.

    One of them waits here for all of them, in the order of arrival among the calls that came
    another way, so that neither side starves the other. These are the `Places` of a transport.

    Args:
        turns: The turns of the node.
    """

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._next: Turn | None = None

    @property
    def left(self) -> int:
        """How many more calls may run now."""
        return self._turns.left

    async def take(self, most: int, seconds: float) -> list[Turn]:
        """Wait for a turn; return it, and others that are free. See `Places.take`."""
        if self._next is None:
            self._next = self._turns.ask(ahead=True)
        if not await self._next.comes(seconds):
            return []
        first, self._next = self._next, None
        others = min(most - 1, self._turns.left)
        return [first, *(self._turns.ask() for _ in range(others))]

    def give_up(self) -> None:
        """Wait no longer."""
        turn, self._next = self._next, None
        if turn is not None:
            turn.leave()


current_turn: ContextVar[Turn | None] = ContextVar("current_turn", default=None)
"""The call of this process that this thread or task runs."""
