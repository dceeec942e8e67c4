"""Single flight: who computes a cold key in this process, and who waits for it."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final

from hornbeam_ml.request import seconds_left
from hornbeam_state.errors import DeadlineExceeded

ABANDONED: Final = object()
"""The outcome of a flight whose leader gave up without a result: wait no longer, try again."""

UNSHARED: Final = object()
"""The outcome of a flight whose result cannot be handed out: each waiter computes its own."""


@dataclass(eq=False)
class Flight:
    """One computation under way. Its leader ends it, whatever happens.

    Attributes:
        outcome: The encoded result, `ABANDONED`, `UNSHARED`, or the exception the leader met.
        thread: The thread that computes, or whose event loop does.
        task: The task that computes, where one does.
    """

    outcome: Future[Any] = field(default_factory=Future)
    thread: int = field(default_factory=threading.get_ident)
    task: asyncio.Task[Any] | None = None

    def would_wait_for_itself(self) -> bool:
        """Return whether the caller, by blocking here, would keep the leader from ending."""
        return self.thread == threading.get_ident()

    def result(self) -> Any:
        """Return the outcome; blocks.

        Raises:
            DeadlineExceeded: that of the HTTP request passed. Others wait on.
        """
        try:
            return self.outcome.result(seconds_left())
        except TimeoutError as error:
            raise _too_late() from error

    async def aresult(self) -> Any:
        """Awaitable twin of `result`; cancelling one waiter ends no other."""
        outcome = asyncio.shield(asyncio.wrap_future(self.outcome))
        try:
            return await asyncio.wait_for(outcome, seconds_left())
        except TimeoutError as error:
            raise _too_late() from error


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the deadline of the request passed while another computed")


class Flights:
    """The flights of this process by key."""

    def __init__(self) -> None:
        self._flights: dict[str, Flight] = {}
        self._lock = threading.Lock()

    def join(self, key: str) -> tuple[Flight, bool]:
        """Return the flight for a key, and whether the caller is its leader and must end it."""
        with self._lock:
            flight = self._flights.get(key)
            if flight is not None:
                return flight, False
            flight = self._flights[key] = Flight()
            return flight, True

    def end(self, key: str, flight: Flight, outcome: Any) -> None:
        """End a flight. The first outcome counts; ending it again does nothing."""
        with self._lock:
            if self._flights.get(key) is flight:
                del self._flights[key]
        if not flight.outcome.done():
            flight.outcome.set_result(outcome)
