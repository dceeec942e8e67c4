"""The caller's side: calls, casts and streams to nodes, sync and async."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, Any, Final

from hornbeam_state.errors import DeadlineExceeded, NodeDown, NotExposed, RpcError
from hornbeam_state.rpc.choosing import able, exposing
from hornbeam_state.rpc.links import Link, Links
from hornbeam_state.rpc.listening import AsyncChunks, Chunks
from hornbeam_state.rpc.registry import Registry
from hornbeam_state.rpc.requests import Context
from hornbeam_state.rpc.route import Route
from hornbeam_state.rpc.tracing import traceparent
from hornbeam_state.rpc.turns import current_turn
from hornbeam_state.transports.base import KeepingChannel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

    from hornbeam_state.rpc.entries import Entry
    from hornbeam_state.store import Store
    from hornbeam_state.transports.base import Channel, Request

    Make = Callable[[Channel, Request], list[Any]]
    AsyncMake = Callable[[Channel, Request], Awaitable[list[Any]]]

CAST_TIMEOUT_MS: Final = 5000.0
_random = random.Random()  # noqa: S311 - it spreads load


def call_on(channel: Channel, request: Request) -> list[Any]:
    """Make a call on a channel, or leave a cast to what keeps it; blocks."""
    key = request.options.get("cast")
    if key is None or not isinstance(channel, KeepingChannel):
        return channel.call(request)
    channel.cast(_kept(request), key=key)
    return []


async def acall_on(channel: Channel, request: Request) -> list[Any]:
    """Awaitable twin of `call_on`."""
    key = request.options.get("cast")
    if key is None or not isinstance(channel, KeepingChannel):
        return await channel.acall(request)
    await channel.acast(_kept(request), key=key)
    return []


class Caller:
    """Makes calls to the nodes that share a store. Safe to use from any thread and event loop.

    A call that certainly did not reach its node is made once more, over a new channel. One that may
    have is not: whoever made it gets `NodeDown`. A cast is repeated in both cases; the node
    knows it again.

    Args:
        store: Where the registry is.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.registry = Registry(store)
        self._links = Links(store, self.registry)

    def close(self) -> None:
        """Close all channels; whoever waits gets `NodeDown`. A later call makes new ones."""
        self._links.close()

    def pending(self, node: str) -> int:
        """Return how many calls of this process wait for a node."""
        return self._links.pending(node)

    def call_any(self, function: str, make: Callable[[str], Request]) -> Any:
        """Make a call to a node that exposes ``"module.function"``, and to another if it is gone.

        Another one is asked only if the call certainly did not reach the first, or if who has its
        name by now does not expose the function. When all that are known are gone, as at a deploy,
        the list is read anew.

        Args:
            function: ``"module.function"``.
            make: Makes the request for a node, given its name. Its time is that of all attempts.

        Raises:
            NotExposed: no node exposes it.
            HornbeamError: as `call`.
        """
        began = time.monotonic()
        route = Route(able(self.registry.live(), function), self._links.pending, _random)
        while True:
            node = route.next()
            request = make(node)
            try:
                return self.call(node, request.until(began + request.timeout))
            except (NodeDown, NotExposed) as error:
                if route.is_outdated(error):
                    route.add(exposing(self.registry.look(), function))
                if not route.may_follow(error):
                    raise

    async def acall_any(self, function: str, make: Callable[[str], Request]) -> Any:
        """Awaitable twin of `call_any`."""
        began = time.monotonic()
        route = Route(able(await self.registry.alive(), function), self._links.pending, _random)
        while True:
            node = route.next()
            request = make(node)
            try:
                return await self.acall(node, request.until(began + request.timeout))
            except (NodeDown, NotExposed) as error:
                if route.is_outdated(error):
                    route.add(exposing(await self.registry.alook(), function))
                if not route.may_follow(error):
                    raise

    def call(self, node: str, request: Request) -> Any:
        """Make a call, or a cast; blocks until its result is here.

        Raises:
            NodeDown: the node is not there, or went away.
            NotExposed: it does not expose the function.
            RemoteError: the function raised.
            Overloaded: more calls wait there, or here, than there may.
            DeadlineExceeded: the timeout passed.
            CodecError: an argument or the result cannot be sent.
        """
        _refuse_to_wait_for_oneself(node)
        return _result(self.exchange(node, request))

    async def acall(self, node: str, request: Request) -> Any:
        """Awaitable twin of `call`. Cancelled, it cancels the call."""
        return _result(await self.aexchange(node, request))

    def exchange(self, node: str, request: Request, make: Make = call_on) -> list[Any]:
        """Return all that a node answers to a call; blocks. It raises what `call` does.

        Args:
            node: The full name of the node.
            request: The call.
            make: Makes it on a channel.
        """
        deadline, failed = time.monotonic() + request.timeout, None
        while True:
            link = self._link(node, deadline, failed, keeps=_is_cast(request))
            if _is_in_doubt(request, link):
                _check_exposed(request, node, self.registry.live())
            try:
                return make(link.channel, _addressed(request, link, deadline))
            except NodeDown as error:
                if failed is not None or not _may_repeat(error, request):
                    raise link.explain(error) from None
                failed = link

    async def aexchange(self, node: str, request: Request, make: AsyncMake = acall_on) -> list[Any]:
        """Awaitable twin of `exchange`."""
        deadline, failed = time.monotonic() + request.timeout, None
        while True:
            link = await self._alink(node, deadline, failed, keeps=_is_cast(request))
            if _is_in_doubt(request, link):
                _check_exposed(request, node, await self.registry.alive())
            try:
                return await make(link.channel, _addressed(request, link, deadline))
            except NodeDown as error:
                if failed is not None or not _may_repeat(error, request):
                    raise link.explain(error) from None
                failed = link

    def stream(self, node: str, request: Request) -> Chunks:
        """Return an iterator over what a generator there yields; the call begins with the first."""
        return Chunks(self, node, request)

    def astream(self, node: str, request: Request) -> AsyncChunks:
        """Twin of `stream`: an async iterator, called without `await`."""
        return AsyncChunks(self, node, request)

    def begin(self, node: str, request: Request) -> tuple[Link, Iterator[Any]]:
        """Begin a stream; return it, and what it runs over."""
        _refuse_to_wait_for_oneself(node)
        deadline, failed = time.monotonic() + request.timeout, None
        while True:
            link = self._link(node, deadline, failed)
            try:
                return link, link.channel.stream(_addressed(request, link, deadline))
            except NodeDown as error:
                if failed is not None or not _may_repeat(error, request):
                    raise link.explain(error) from None
                failed = link

    async def abegin(self, node: str, request: Request) -> tuple[Link, AsyncIterator[Any]]:
        """Awaitable twin of `begin`."""
        deadline, failed = time.monotonic() + request.timeout, None
        while True:
            link = await self._alink(node, deadline, failed)
            try:
                return link, link.channel.astream(_addressed(request, link, deadline))
            except NodeDown as error:
                if failed is not None or not _may_repeat(error, request):
                    raise link.explain(error) from None
                failed = link

    def _link(
        self, node: str, deadline: float, failed: Link | None, *, keeps: bool = False
    ) -> Link:
        future = self._links.get(node, keeps=keeps, instead_of=failed)
        if future.done():
            return _used(future.result())
        left = None if deadline == inf else max(0.0, deadline - time.monotonic())
        try:
            return future.result(left)
        except TimeoutError:
            if future.done():
                raise
            raise _not_reached(node) from None

    async def _alink(
        self, node: str, deadline: float, failed: Link | None, *, keeps: bool = False
    ) -> Link:
        future = self._links.get(node, keeps=keeps, instead_of=failed)
        if future.done():
            return _used(future.result())
        late = asyncio.timeout(None if deadline == inf else deadline - time.monotonic())
        try:
            async with late:
                return await asyncio.wrap_future(future)
        except TimeoutError:
            if not late.expired():
                raise
            raise _not_reached(node) from None


def context(node: str, *, cast: str | None = None) -> Context:
    """Return what goes with a call to a node from this thread or task.

    Args:
        node: The full name of the node.
        cast: Which cast it is; None: it is a call.
    """
    turn = current_turn.get()
    shares = turn is not None and not turn.left and turn.node == node and cast is None
    return Context(
        cast=cast,
        traceparent=traceparent.get(),
        turn=turn.id if turn is not None and shares else None,
    )


def _used(link: Link) -> Link:
    link.used_at = time.monotonic()
    return link


def _result(values: list[Any]) -> Any:
    return values[0] if values else None  # a cast has none


def _addressed(request: Request, link: Link, deadline: float) -> Request:
    """Return a request with the time that is left, for that process; a cast is for any."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceeded("the deadline passed before the call was made")
    if _is_cast(request):
        return replace(request, timeout=left)
    return replace(request, timeout=left, options={**request.options, "to": link.entry.token})


def _may_repeat(error: NodeDown, request: Request) -> bool:
    return not error.sent or _is_cast(request)


def _is_cast(request: Request) -> bool:
    return "cast" in request.options


def _kept(request: Request) -> Request:
    """Return a cast that the node runs to its end before it says that it is done."""
    options = {name: value for name, value in request.options.items() if name != "cast"}
    return replace(request, options=options, timeout=inf)


def _is_in_doubt(request: Request, link: Link) -> bool:
    """Whether the node did not expose the function of a kept cast when the link was made."""
    return link.keeps and f"{request.target}.{request.method}" not in link.entry.functions


def _check_exposed(request: Request, node: str, entries: Sequence[Entry]) -> None:
    """Refuse a cast that its node would refuse after the caller has gone.

    Raises:
        NotExposed: the node said lately what it exposes, and this is not a part of it.
    """
    function = f"{request.target}.{request.method}"
    if any(one.name == node and function not in one.functions for one in entries):
        raise NotExposed(f"{function} is not exposed by {node}")


def _not_reached(node: str) -> DeadlineExceeded:
    return DeadlineExceeded(f"the node {node} was not reached in time")


def _refuse_to_wait_for_oneself(node: str) -> None:
    turn = current_turn.get()
    if turn is None or turn.node != node:
        return
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return
    if loop is turn.loop:
        raise RpcError(
            f"the call would wait for the event loop of its own node {node}, which it keeps: "
            f"await its twin (arpc_call, acall) in a coroutine function"
        )
