"""What carries calls between processes: the contract of a transport.

A server answers calls with a `Handler`, on an event loop. A client makes them through a `Channel`,
from any thread and any event loop. Arguments and results are values of the codec, an array among
them copied once at most on each side. Nothing here knows what is called.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from math import inf
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
    from concurrent.futures import Future


class Place(Protocol):
    """The right of one call to run."""

    def leave(self) -> None:
        """Give it to the next. Doing so again does nothing."""
        ...


class Places(Protocol):
    """How many calls run at a time, for a server that takes them from a queue. On an event loop."""

    @property
    def left(self) -> int:
        """How many more may begin now."""
        ...

    async def take(self, most: int, seconds: float) -> Sequence[Place]:
        """Wait until a call may begin; return its place, and others that are free.

        Args:
            most: How many are wanted.
            seconds: How long to wait. Then none is returned; asked again, it waits where it did.
        """
        ...

    def give_up(self) -> None:
        """Wait no longer: what was to begin cannot, for now."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One call.

    Attributes:
        target: What is called.
        method: What it is asked to do.
        values: The arguments, each of them encoded apart. Arrays among them are sent from where
            they lie: they must not change until the call is done.
        options: Small further arguments.
        timeout: Seconds until the caller stops waiting; `inf`: never. What is left of them when
            the server gets the request.
        place: On the server, what the call has taken already of what it may use; it ends with the
            call. None: the transport takes calls as they come.
    """

    target: str
    method: str = "call"
    values: Sequence[Any] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = inf
    place: Place | None = field(default=None, repr=False, compare=False)

    def until(self, deadline: float) -> Request:
        """Return the call with the time that is left until a deadline of `time.monotonic`."""
        return self if deadline == inf else replace(self, timeout=deadline - time.monotonic())


class Handler(Protocol):
    """What a server does with calls. Every method runs on its event loop."""

    def greet(self, hello: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what a new client is told, given what it said of itself.

        Raises:
            HornbeamError: it is refused, with this message.
        """
        ...

    async def call(self, request: Request) -> Sequence[Any]:
        """Return the results of a call. Cancelled when the caller stops waiting, or is gone."""
        ...

    def stream(self, request: Request) -> AsyncIterator[Any]:
        """Return the chunks of a call. Closed when the caller stops listening, or is gone."""
        ...


class Channel(Protocol):
    """A connection to one server. Safe to use from any thread and any event loop.

    It is not made again when it is lost: every call that waits then gets `NodeDown`, and so does
    every later one. `NodeDown.sent` says whether the server may have seen the call.

    Attributes:
        peer: What the server said in its greeting.
    """

    peer: Mapping[str, Any]

    @property
    def connected(self) -> bool:
        """Whether calls can be made."""
        ...

    @property
    def pending(self) -> int:
        """How many calls have no answer yet."""
        ...

    def call(self, request: Request) -> list[Any]:
        """Return the results; blocks. Interrupted, it cancels the call.

        Raises:
            NodeDown: the connection is lost.
            DeadlineExceeded: the timeout passed.
            Overloaded: more calls wait, here or there, than there may.
            CodecError: an argument cannot be sent.
            Exception: what the handler raised: the same type for errors of hornbeam and Python's
                own, `RemoteError` for others.
        """
        ...

    async def acall(self, request: Request) -> list[Any]:
        """Awaitable twin of `call`. Cancelled, it cancels the call."""
        ...

    def submit(self, request: Request) -> Future[list[Any]]:
        """Return a future of the results at once; cancelling it cancels the call."""
        ...

    def stream(self, request: Request) -> Iterator[Any]:
        """Return the chunks; closing or dropping the iterator cancels the call.

        A listener that is too far behind gets what came until then, and then `Overloaded`.
        """
        ...

    def astream(self, request: Request) -> AsyncIterator[Any]:
        """Twin of `stream`: an async iterator; called without `await`, on the event loop."""
        ...

    def fail(self, reason: str) -> None:
        """Give the server up: whoever waits gets `NodeDown` with the reason, and so do later calls.

        Blocks for as long as it takes to find out which calls had not begun, within seconds.
        """
        ...

    def close(self) -> None:
        """End the connection; whoever waits gets `NodeDown`. Closing again does nothing."""
        ...


@runtime_checkable
class KeepingChannel(Channel, Protocol):
    """A channel over something that keeps casts while the server is away."""

    def cast(self, request: Request, *, key: str | None = None) -> None:
        """Have the server do something, at least once; return when that is taken down.

        Args:
            request: What is asked. What comes of it is dropped.
            key: Of several casts with one key, one is done.

        Raises:
            NodeDown: it cannot be taken down; `sent` says whether it may have been.
            Overloaded: too much waits for the server.
            CodecError: an argument cannot be sent.
        """
        ...

    async def acast(self, request: Request, *, key: str | None = None) -> None:
        """Awaitable twin of `cast`."""
        ...
