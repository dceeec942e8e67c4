"""The listeners' side of streams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self

from hornbeam_state.errors import NodeDown

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from hornbeam_state.rpc.links import Link
    from hornbeam_state.transports.base import Request


class Beginner(Protocol):
    """Who begins streams."""

    def begin(self, node: str, request: Request) -> tuple[Link, Iterator[Any]]:
        """Begin a stream; return it, and what it runs over."""
        ...

    async def abegin(self, node: str, request: Request) -> tuple[Link, AsyncIterator[Any]]:
        """Awaitable twin of `begin`."""
        ...


class Chunks:
    """What a generator on a node yields: an iterator, also a context manager that stops listening.

    The call begins with the first item that is asked for. Closing or dropping it closes the
    generator there.
    """

    def __init__(self, caller: Beginner, node: str, request: Request) -> None:
        self._caller, self._node, self._request = caller, node, request
        self._link: Link | None = None
        self._chunks: Any = None
        self._closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        """Return the next item, or raise what `Caller.call` raises."""
        if self._closed:
            raise StopIteration
        if self._link is None:
            self._link, self._chunks = self._caller.begin(self._node, self._request)
        try:
            return next(self._chunks)
        except NodeDown as error:
            raise self._link.explain(error) from None

    def close(self) -> None:
        """Stop listening."""
        self._closed = True
        if self._chunks is not None:
            self._chunks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class AsyncChunks:
    """Twin of `Chunks`: an async iterator and async context manager."""

    def __init__(self, caller: Beginner, node: str, request: Request) -> None:
        self._caller, self._node, self._request = caller, node, request
        self._link: Link | None = None
        self._chunks: Any = None
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        """Return the next item, or raise what `Caller.call` raises."""
        if self._closed:
            raise StopAsyncIteration
        if self._link is None:
            self._link, self._chunks = await self._caller.abegin(self._node, self._request)
        try:
            return await anext(self._chunks)
        except NodeDown as error:
            raise self._link.explain(error) from None

    async def aclose(self) -> None:
        """Stop listening."""
        self._closed = True
        if self._chunks is not None:
            await self._chunks.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()
