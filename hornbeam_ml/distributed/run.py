"""Runs one batch on an event loop: makes the calls of a plan, and puts the results in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any, Final

from hornbeam_ml.distributed.failures import Failure, failure_of
from hornbeam_ml.distributed.records import LOCAL
from hornbeam_ml.request import check_request, current_request, seconds_left
from hornbeam_state.errors import HornbeamError, StoreError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator

    from hornbeam_ml.distributed.chunks import Flight
    from hornbeam_ml.distributed.plan import Plan

logger = logging.getLogger("hornbeam.distributed")

_LOOK_AT_NODES_S: Final = 1.0


class Run:
    """One batch under way. It belongs to one task.

    Args:
        plan: Says which calls are to be made.
        total: How many items there are.
        call: Makes a call; returns a result for each item of its chunk.
        look: Lists the nodes that are there.
    """

    def __init__(
        self,
        plan: Plan,
        total: int,
        call: Callable[[Flight], Coroutine[Any, Any, list[Any]]],
        look: Callable[[], Awaitable[list[str]]],
    ) -> None:
        self._plan = plan
        self._call = call
        self._look = look
        self._results: list[Any] = [None] * total
        self._flights: dict[asyncio.Task[list[Any]], Flight] = {}
        self._given_up: list[asyncio.Task[list[Any]]] = []
        self._lookout: asyncio.Task[list[str]] | None = None
        self._client_left = asyncio.Event()

    async def finish(self) -> list[Any]:
        """Return the results in the order of the items.

        Cancelled, it cancels all calls.

        Raises:
            DeadlineExceeded: the deadline of the HTTP request passed.
            ClientDisconnected: its client left.
            Exception: a chunk failed, and nothing was left to be tried.
        """
        with self._told_of_client() as told:
            try:
                while not self._plan.is_done:
                    check_request()
                    self._begin()
                    await self._wait(told)
                    self._settle()
            finally:
                await self._cancel()
        return self._results

    def _begin(self) -> None:
        for flight in self._plan.hand_out(time.monotonic()):
            self._flights[asyncio.create_task(self._call(flight))] = flight
        if self._lookout is None:
            self._lookout = asyncio.create_task(self._look_out())

    async def _wait(self, told: asyncio.Task[bool] | None) -> None:
        """Wait until something has happened, or is to be looked at."""
        now = time.monotonic()
        look, left = self._plan.next_look(now), seconds_left()
        times = [*([] if look is None else [look - now]), *([] if left is None else [left])]
        watched: set[asyncio.Task[Any]] = {*self._flights}
        watched.update(
            task for task in (self._lookout, told) if task is not None and not task.done()
        )
        await asyncio.wait(
            watched, timeout=min(times, default=None), return_when=asyncio.FIRST_COMPLETED
        )

    # What has happened.

    def _settle(self) -> None:
        now = time.monotonic()
        if self._lookout is not None and self._lookout.done():
            self._note_nodes(self._lookout, now)
            self._lookout = None
        for task in [task for task in self._flights if task.done()]:
            self._settle_one(task, self._flights.pop(task), now)
        for task, flight in list(self._flights.items()):
            if flight.chunk.done:
                del self._flights[task]
                self._plan.overtaken(flight, now)
                self._given_up.append(task)
                task.cancel()

    def _settle_one(self, task: asyncio.Task[list[Any]], flight: Flight, now: float) -> None:
        error = task.exception()
        if error is None:
            if self._plan.succeed(flight, now):
                self._results[flight.chunk.start : flight.chunk.stop] = task.result()
        elif flight.name == LOCAL:
            self._plan.fail(flight, Failure.WRONG, error, now)
        elif isinstance(error, HornbeamError):
            logger.debug("%d items at %s: %s", len(flight.chunk), flight.name, type(error).__name__)
            self._plan.fail(flight, failure_of(error), error, now)
        else:
            raise error

    def _note_nodes(self, lookout: asyncio.Task[list[str]], now: float) -> None:
        error = lookout.exception()
        if isinstance(error, StoreError):
            logger.debug("cannot list the nodes: %s", error)
        elif error is not None:
            raise error
        else:
            self._plan.list_nodes(lookout.result(), now)

    async def _look_out(self) -> list[str]:
        await asyncio.sleep(_LOOK_AT_NODES_S)
        return await self._look()

    # Ending.

    @contextlib.contextmanager
    def _told_of_client(self) -> Iterator[asyncio.Task[bool] | None]:
        """Have a task that ends when the client of the HTTP request leaves, if there is one."""
        request = current_request()
        if request is None:
            yield None
            return
        loop = asyncio.get_running_loop()
        left = asyncio.create_task(self._client_left.wait())

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the batch has ended
                loop.call_soon_threadsafe(self._client_left.set)

        request.attach(self, tell)
        try:
            yield left
        finally:
            request.forget(self)
            left.cancel()

    async def _cancel(self) -> None:
        tasks: list[asyncio.Task[Any]] = [*self._flights, *self._given_up]
        if self._lookout is not None:
            tasks.append(self._lookout)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
