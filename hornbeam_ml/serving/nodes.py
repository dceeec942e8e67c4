"""The calls of a serving whose model runs on other nodes."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, Any

from hornbeam_ml.errors import ModelError
from hornbeam_ml.request import current_request
from hornbeam_ml.serving.client import DistantCalls
from hornbeam_ml.streams import finish
from hornbeam_state.rpc.caller import acall_on, call_on
from hornbeam_state.rpc.functions import default_caller
from hornbeam_state.rpc.route import AT_THE_NODE, Route
from hornbeam_state.rpc.server import own_nodes
from hornbeam_state.rpc.servings import serving_target
from hornbeam_state.rpc.tracing import traceparent

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from hornbeam_state.rpc.caller import AsyncMake, Caller, Make
    from hornbeam_state.rpc.entries import Entry
    from hornbeam_state.transports.base import Request

    Begin = Callable[[str], Coroutine[Any, Any, list[Any]]]

_random = random.Random()  # noqa: S311 - it spreads load


class NodeCalls(DistantCalls):
    """Makes the calls of a serving on nodes. A node that cannot take a call sends it on.

    That is so when the call has certainly not begun there: the node is gone, or refused it. Then it
    goes to another one, with what is left of its time.

    Args:
        name: The name of the serving.
        nodes: Where the calls go.
    """

    def __init__(self, name: str, nodes: _Nodes) -> None:
        super().__init__(serving_target(name), nodes)

    def request(
        self, method: str, values: Sequence[Any], options: dict[str, Any], timeout_ms: float | None
    ) -> Request:
        """Return a call with its deadline, and the trace it belongs to."""
        options = {**options, "traceparent": traceparent.get()}
        return super().request(method, values, options, timeout_ms)


class HedgedCalls(NodeCalls):
    """Makes the calls of an idempotent serving, a late one on two nodes at a time.

    The first result counts, and the other call is cancelled. What the model raises is raised at
    once, whichever node it comes from; when a node goes away the other one is waited for.
    """

    def call(
        self, method: str, values: Sequence[Any], *, timeout_ms: float | None = None, **options: Any
    ) -> list[Any]:
        """Return what a method answers; blocks."""
        request = self.request(method, values, options, timeout_ms)
        answered: list[Any] = finish(self.asend(request, current_request()))
        return answered


class _Nodes:
    """The `Carrier` to nodes. When all that it knows are gone, it reads anew who is there.

    Args:
        name: The name of the serving.
        caller: Makes the calls.
        entries: The nodes that run it, one at least.
    """

    repeats = False

    def __init__(self, name: str, caller: Caller, entries: Sequence[Entry]) -> None:
        self._name = name
        self._caller = caller
        self._entries = entries

    def call(self, request: Request, make: Make = call_on) -> list[Any]:
        """Return what the first node answers that takes the call; blocks."""
        route, deadline = self._route(), time.monotonic() + request.timeout
        while True:
            try:
                return self._caller.exchange(route.next(), request.until(deadline), make)
            except AT_THE_NODE as error:
                if route.is_outdated(error):
                    route.add(self._able(self._caller.registry.look()))
                if not route.may_follow(error):
                    raise

    async def acall(self, request: Request, make: AsyncMake = acall_on) -> list[Any]:
        """Awaitable twin of `call`."""
        route, deadline = self._route(), time.monotonic() + request.timeout

        def begin(node: str) -> Coroutine[Any, Any, list[Any]]:
            return self._caller.aexchange(node, request.until(deadline), make)

        while True:
            try:
                return await self._ask(route, begin)
            except AT_THE_NODE as error:
                if route.is_outdated(error):
                    route.add(self._able(await self._caller.registry.alook()))
                if not route.may_follow(error):
                    raise

    async def _ask(self, route: Route, begin: Begin) -> list[Any]:
        """Return the answer of the next node."""
        return await begin(route.next())

    def _route(self) -> Route:
        return Route(self._entries, self._caller.pending, _random, repeats=self.repeats)

    def _able(self, live: Sequence[Entry]) -> list[Entry]:
        own = {one.name for one in own_nodes()}
        return [entry for entry in live if entry.name not in own and self._has_it(entry)]

    def _has_it(self, entry: Entry) -> bool:
        return self._name in entry.servings


class _HedgedNodes(_Nodes):
    """The `Carrier` that asks a second node when the first is late.

    Args:
        name: The name of the serving.
        caller: Makes the calls.
        entries: The nodes that run it and say that it is idempotent, one at least.
        hedge_s: When a call is late, in seconds.
    """

    repeats = True

    def __init__(self, name: str, caller: Caller, entries: Sequence[Entry], hedge_s: float) -> None:
        super().__init__(name, caller, entries)
        self._hedge_s = hedge_s

    async def _ask(self, route: Route, begin: Begin) -> list[Any]:
        """Return the first answer."""
        return await hedged(route, begin, self._hedge_s)

    def _has_it(self, entry: Entry) -> bool:
        return entry.servings.get(self._name, False)


async def hedged(route: Route, begin: Begin, hedge_s: float) -> list[Any]:
    """Return what the quickest of two nodes answers, the second asked when the first is late.

    Cancelled, it cancels both.

    Args:
        route: The nodes.
        begin: Makes the call on a node of that name.
        hedge_s: When the first is late, in seconds.
    """
    calls = {asyncio.ensure_future(begin(route.next()))}
    patience: float | None = hedge_s
    try:
        while True:
            done, calls = await asyncio.wait(
                calls,
                timeout=patience if route.goes_on else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            errors = [error for call in done if (error := call.exception()) is not None]
            if len(errors) < len(done):
                return next(call.result() for call in done if call.exception() is None)
            for error in errors:
                if not isinstance(error, AT_THE_NODE):
                    raise error
            follows = not done or any(map(route.may_follow, errors))
            if not (follows or calls):
                raise errors[0]
            if follows:
                patience = None  # there are two, or the first is no more
                calls.add(asyncio.ensure_future(begin(route.next())))
    finally:
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


def on_nodes(name: str, hedge_ms: float | None = None) -> NodeCalls:
    """Return the calls of a serving on the nodes that run it.

    Args:
        name: The name of the serving.
        hedge_ms: When another node is asked too; None: never.

    Raises:
        ModelError: no other node runs it.
        ValueError: `hedge_ms` makes no sense, or the serving is not declared idempotent.
        StoreUnavailable: the registry cannot be reached.
    """
    caller = default_caller()
    return _calls(name, caller, caller.registry.live(), hedge_ms)


async def aon_nodes(name: str, hedge_ms: float | None = None) -> NodeCalls:
    """Awaitable twin of `on_nodes`."""
    caller = default_caller()
    return _calls(name, caller, await caller.registry.alive(), hedge_ms)


def _calls(name: str, caller: Caller, live: Sequence[Entry], hedge_ms: float | None) -> NodeCalls:
    found = running(name, live, [one.name for one in own_nodes()])
    if hedge_ms is None:
        return NodeCalls(name, _Nodes(name, caller, found))
    idempotent = [entry for entry in found if entry.servings[name]]
    if not idempotent:
        raise ValueError(f"hedge_ms is for idempotent servings: declare {name!r} as such")
    return HedgedCalls(name, _HedgedNodes(name, caller, idempotent, hedge_ms / 1000))


def running(name: str, entries: Sequence[Entry], own: Sequence[str]) -> list[Entry]:
    """Return the nodes that run a serving, other than those of this process.

    Raises:
        ModelError: there is none.
    """
    others = [entry for entry in entries if entry.name not in own]
    found = [entry for entry in others if name in entry.servings]
    if not found:
        raise ModelError(f"no serving {name!r} on any of {len(others)} other nodes")
    return found
