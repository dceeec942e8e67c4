"""The calls of a serving whose model runs in another process: a model host, or a node."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import CancelledError
from math import inf
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from hornbeam_ml.errors import ClientDisconnected
from hornbeam_ml.request import current_request
from hornbeam_ml.serving.stats import ServingStats, Tally
from hornbeam_state.errors import HornbeamError
from hornbeam_state.transports.base import Request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Hashable, Iterable, Iterator, Sequence
    from concurrent.futures import Future

    from hornbeam_ml.memory import LoadCost
    from hornbeam_ml.request import Request as HttpRequest
    from hornbeam_ml.serving.config import ServingConfig
    from hornbeam_ml.serving.hosts import Hosts
    from hornbeam_state.rpc.caller import AsyncMake, Make
    from hornbeam_state.transports.base import Channel

_STATS_S: Final = 1.0
_CANCELLED: Final = (CancelledError, asyncio.CancelledError)


class Carrier(Protocol):
    """What takes calls to another process."""

    def call(self, request: Request, make: Make = ...) -> list[Any]:
        """Return what is answered there; blocks.

        Args:
            request: The call.
            make: Makes it on a channel.
        """
        ...

    async def acall(self, request: Request, make: AsyncMake = ...) -> list[Any]:
        """Awaitable twin of `call`."""
        ...


class DistantCalls:
    """Makes the calls of a serving in another process; the methods are those of `Serving`.

    What is raised there, the caller gets; `NodeDown` when the process is gone. Items and results
    are values of the codec. `preprocess` and `postprocess` run there too: they may need what `load`
    loaded.

    Args:
        target: What the serving is called there.
        carrier: Takes the calls there.
        deadline_ms: The `timeout_ms` of calls that give none.
    """

    def __init__(self, target: str, carrier: Carrier, deadline_ms: float | None = None) -> None:
        self._target = target
        self._carrier = carrier
        self._deadline_ms = deadline_ms

    def run_batch(
        self, items: Iterable[Any], *, key: Hashable = None, timeout_ms: float | None = None
    ) -> list[Any]:
        """Return the results of many items, in their order; blocks."""
        return self.call("run", list(items), key=key, timeout_ms=timeout_ms)

    async def arun_batch(
        self, items: Iterable[Any], *, key: Hashable = None, timeout_ms: float | None = None
    ) -> list[Any]:
        """Awaitable twin of `run_batch`."""
        return await self.acall("run", list(items), key=key, timeout_ms=timeout_ms)

    def run_inline(self, items: Iterable[Any], *, key: Hashable = None) -> list[Any]:
        """Return the results of some items, in batches of their own; blocks."""
        return self.call("inline", list(items), key=key)

    async def arun_inline(self, items: Iterable[Any], *, key: Hashable = None) -> list[Any]:
        """Awaitable twin of `run_inline`."""
        return await self.acall("inline", list(items), key=key)

    def call(
        self,
        method: str,
        values: Sequence[Any],
        *,
        timeout_ms: float | None = None,
        **options: Any,
    ) -> list[Any]:
        """Return what a method answers; blocks."""
        request = self.request(method, values, options, timeout_ms)
        http = current_request()
        if http is None:
            return self._carrier.call(request)

        def make(channel: Channel, request: Request) -> list[Any]:
            with _Attached(http, channel.submit(request)) as future:
                return future.result()

        return self._carrier.call(request, make)

    async def acall(
        self,
        method: str,
        values: Sequence[Any],
        *,
        timeout_ms: float | None = None,
        **options: Any,
    ) -> list[Any]:
        """Awaitable twin of `call`."""
        request = self.request(method, values, options, timeout_ms)
        return await self.asend(request, current_request())

    async def asend(self, request: Request, http: HttpRequest | None) -> list[Any]:
        """Make a call for an HTTP request; None: for nobody that may leave."""
        if http is None:
            return await self._carrier.acall(request)

        async def make(channel: Channel, request: Request) -> list[Any]:
            with _Attached(http, channel.submit(request)) as future:
                return await asyncio.wrap_future(future)

        return await self._carrier.acall(request, make)

    def request(
        self, method: str, values: Sequence[Any], options: dict[str, Any], timeout_ms: float | None
    ) -> Request:
        """Return a call with the deadline that counts: its own, or that of the HTTP request."""
        if timeout_ms is None:
            timeout_ms = self._deadline_ms
        timeout = inf if timeout_ms is None else timeout_ms / 1000
        http = current_request()
        if http is not None:
            http.check()
            timeout = min(timeout, http.deadline - time.monotonic())
        options = {name: value for name, value in options.items() if value is not None}
        return Request(
            target=self._target, method=method, values=values, options=options, timeout=timeout
        )


class HostedCalls(DistantCalls):
    """Makes the calls of a serving in the model host.

    Args:
        target: What the host knows the serving by.
        hosts: The connections to the host's processes.
        config: The settings of the serving, when they are known here.
    """

    def __init__(self, target: str, hosts: Hosts, config: ServingConfig | None = None) -> None:
        super().__init__(target, hosts, None if config is None else config.deadline_ms)
        self._hosts = hosts
        self._name = target if config is None else config.name

    # Calls.

    def submit(
        self, item: Any, *, key: Hashable = None, timeout_ms: float | None = None
    ) -> Future[Any]:
        """Send one item and return a future of its result at once."""
        request = self.request("run", [item], {"key": key}, timeout_ms)
        return self._hosts.submit(request, lambda results: results[0])

    def stream(
        self, item: Any, *, key: Hashable = None, timeout_ms: float | None = None
    ) -> HostedChunks:
        """Return an iterator of the chunks of one item."""
        request = self.request("stream", [item], {"key": key}, timeout_ms)
        return HostedChunks(self._hosts.stream(request))

    def astream(
        self, item: Any, *, key: Hashable = None, timeout_ms: float | None = None
    ) -> AsyncHostedChunks:
        """Twin of `stream`: an async iterator; called without `await`."""
        request = self.request("stream", [item], {"key": key}, timeout_ms)
        return AsyncHostedChunks(self._hosts.astream(request))

    # Life.

    def start(self, timeout: float | None = None) -> None:
        """Wait until the host has loaded it."""
        self._hosts.wait_loaded(self._target, timeout)

    async def astart(self, timeout: float | None = None) -> None:
        """Awaitable twin of `start`."""
        await asyncio.to_thread(self.start, timeout)

    @property
    def problem(self) -> str | None:
        """Why calls would fail now, or wait for long; None: they would not."""
        if self._hosts.is_ready(self._target):
            return None
        return self._hosts.problem() or f"{self._target!r} is not ready in {self._hosts.what}"

    @property
    def loaded(self) -> bool:
        """Whether it is loaded in a host that can be reached."""
        return self._hosts.is_loaded(self._target)

    @property
    def unfinished(self) -> int:
        """How many calls of this process the host has not answered, of this serving or another."""
        return self._hosts.pending

    @property
    def load_costs(self) -> Sequence[LoadCost]:
        """What loading took in the host, of each instance and process."""
        return self._hosts.load_costs(self._target)

    @property
    def info(self) -> dict[str, Any]:
        """What the host says of it.

        Raises:
            NodeDown: no host can be reached.
        """
        return self._hosts.info(self._target)

    def stats(self) -> ServingStats:
        """Return the figures of the host; zeros while it cannot be reached."""
        try:
            found = self._hosts.call(self.request("stats", [], {}, 1000 * _STATS_S))[0]
        except HornbeamError:
            found = None
        if isinstance(found, ServingStats):
            return found
        return Tally().stats(name=self._name, ready=False, queued={}, running=0)


class _Attached:
    """Ties a call to an HTTP request: it is cancelled when the client leaves."""

    def __init__(self, http: HttpRequest, future: Future[list[Any]]) -> None:
        self._http = http
        self._future = future
        self._left = False

    def __enter__(self) -> Future[list[Any]]:
        self._http.attach(self, self._leave)
        return self._future

    def _leave(self) -> None:
        self._left = True  # first: the waiter wakes up at once
        self._future.cancel()

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self._http.forget(self)
        self._future.cancel()  # an interrupted caller waits no more
        if self._left and isinstance(error, _CANCELLED) and not _is_being_cancelled():
            raise ClientDisconnected("the client of the request has left") from error


def _is_being_cancelled() -> bool:
    """Return whether somebody asked the calling task to end, and not only what it waits for."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # a thread
        return False
    return task is not None and task.cancelling() > 0


class HostedChunks:
    """The chunks of one item: an iterator, also a context manager that stops listening."""

    def __init__(self, chunks: Iterator[Any]) -> None:
        self._chunks = chunks

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        """Return the next chunk, or raise what ended the stream too early."""
        return next(self._chunks)

    def close(self) -> None:
        """Stop listening."""
        self._chunks.close()  # type: ignore[attr-defined] # of every transport

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class AsyncHostedChunks:
    """The chunks of one item: an async iterator, also a context manager that stops listening."""

    def __init__(self, chunks: AsyncIterator[Any]) -> None:
        self._chunks = chunks

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        """Return the next chunk, or raise what ended the stream too early."""
        return await anext(self._chunks)

    async def aclose(self) -> None:
        """Stop listening."""
        await self._chunks.aclose()  # type: ignore[attr-defined] # of every transport

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()
