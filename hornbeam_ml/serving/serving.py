"""`Serving`: what callers see of a model that runs in batches."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Literal, Self

from hornbeam_ml.serving import chosen_hosts, registry
from hornbeam_ml.serving.answers import answer, answer_stream
from hornbeam_ml.serving.client import HostedCalls
from hornbeam_ml.serving.config import ServingConfig
from hornbeam_ml.serving.local import LocalCalls
from hornbeam_ml.serving.waiting import DeferredChunks

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        AsyncIterator,
        Callable,
        Hashable,
        Iterable,
        Iterator,
        Sequence,
    )
    from concurrent.futures import Future

    from hornbeam_ml.memory import LoadCost
    from hornbeam_ml.serving.hosts import Hosts
    from hornbeam_ml.serving.stats import ServingStats
    from hornbeam_state.transports.base import Request


class Serving:
    """A model whose concurrent calls run as batches.

    A batch is whatever came together while the one before it ran: an idle serving adds no wait.
    Every caller gets exactly the result of its own items, or its own error, in its own order;
    what happens to its neighbours does not show. Safe to use from any thread, and from the tasks
    of any event loop.

    In a gunicorn worker the model is loaded after the fork, before the worker takes requests;
    elsewhere at the first call or by `start`. A forked child loads its own.

    Args:
        load: Returns the batch function ``fn(batch)``, or ``fn(batch, key=...)``; coroutine
            functions are welcome. Called once per instance and process, on the thread of a
            stream, with ``device=`` when it takes that. A generator function serves `stream`.
        name: What `predict` knows it by. A serving with a name lives until it is closed.
        batch_size: The most items in a batch.
        batch_timeout_ms: How long the first item of a batch waits for others, even when a stream
            is free. 0: not at all.
        collate: ``"list"``: fn gets a list and returns as many results. ``"stack"``: items are
            arrays, or dicts and tuples of arrays; they are stacked on a new first axis, and so
            are the results.
        buckets: For ``"stack"``: sizes to which the first axis is padded.
        batch_keys: The keys that calls may name; batches of different keys are apart.
        preprocess: Called with each item, in the caller's thread or task.
        postprocess: Called with each result, likewise.
        streams: How many threads share one loaded function, each with a batch of its own.
        instances: How many times to load.
        device: ``"auto"``, ``"cpu"``, ``"cuda:1"``, or a list with one for each instance.
        compile: ``"torch"`` compiles the function for each bucket while it loads.
        warmup: An example item, as `preprocess` returns it. It is run through all buckets and
            keys before the serving is ready, and with ``"stack"`` items have to match it in shape
            and dtype. Without it they have to match the first item whose batch succeeded.
        queue_limit: The most items that wait.
        deadline_ms: The `timeout_ms` of calls that give none; None: they wait as long as it takes.
        length: For ``"list"``: returns how many tokens a preprocessed item has, at least 1; called
            once for each, in the caller's thread or task. Batches then hold items of similar
            length, so that little of them is padding. The oldest waiting item is always in the
            next batch, and with several streams each takes its share of what waits.
        max_batch_tokens: With `length`: the most tokens in a batch, counting every item with the
            length of the longest. An item of more goes alone. None: as many as there are.
        pads: With `length`: returns, once it is loaded, whether the model pads the items of a batch
            to the longest. When it does not, streams do not share out what waits.
        idempotent: Whether running an item twice does what running it once does. `predict` may
            then be asked to have a late item run by a second node too.
        fingerprint: Says what the model is, such as a digest of its weights: equal exactly for
            models that compute the same. With it `cached_inference` of a method of the serving is
            shared with other processes; without, results are cached within this one.

    Raises:
        ConfigError: a setting makes no sense.

    Example:
        >>> with Serving(lambda: lambda batch: [2 * item for item in batch]) as double:
        ...     double.run(21)
        42
    """

    def __init__(
        self,
        load: Callable[..., Any],
        *,
        name: str | None = None,
        batch_size: int = 32,
        batch_timeout_ms: float = 0,
        collate: Literal["list", "stack"] = "list",
        buckets: Sequence[int] | None = None,
        batch_keys: Sequence[Hashable] | None = None,
        preprocess: Callable[[Any], Any] | None = None,
        postprocess: Callable[[Any], Any] | None = None,
        streams: int = 1,
        instances: int = 1,
        device: str | Sequence[str] = "auto",
        compile: Literal["torch"] | None = None,
        warmup: Any = None,
        queue_limit: int = 1024,
        deadline_ms: float | None = None,
        length: Callable[[Any], int] | None = None,
        max_batch_tokens: int | None = None,
        pads: Callable[[], bool] = lambda: True,
        idempotent: bool = False,
        fingerprint: str | None = None,
    ) -> None:
        self._config = ServingConfig(
            load=load,
            name=name,
            batch_size=batch_size,
            batch_timeout_ms=batch_timeout_ms,
            collate=collate,
            buckets=buckets,
            batch_keys=batch_keys,
            preprocess=preprocess,
            postprocess=postprocess,
            streams=streams,
            instances=instances,
            device=device,
            compile=compile,
            warmup=warmup,
            queue_limit=queue_limit,
            deadline_ms=deadline_ms,
            length=length,
            max_batch_tokens=max_batch_tokens,
            pads=pads,
            idempotent=idempotent,
            fingerprint=fingerprint,
        )
        self._local = LocalCalls(self._config)
        self._known: LocalCalls | HostedCalls | None = None
        self._target = name
        registry.add(self, name)
        if name is not None:
            registry.offer(name, self)

    # Calls.

    def run(self, item: Any, *, key: Hashable = None, timeout_ms: float | None = None) -> Any:
        """Return the result of one item; blocks.

        Args:
            item: What the model takes.
            key: One of `batch_keys`, when there are any.
            timeout_ms: When to stop waiting. An item whose batch has not started by then is
                never run. In a worker the deadline of the HTTP request counts if it is earlier.

        Raises:
            ValueError: the item is not like those the model takes, or there is no such key.
            Overloaded: the queue is full.
            DeadlineExceeded: the deadline passed.
            ClientDisconnected: the client of the HTTP request left.
            ModelError: the model failed to load, or broke its contract.
            ServingClosed: it was closed.
            Exception: what the model raised about this item, or about the whole batch when no
                single item was at fault.
        """
        return self.run_batch([item], key=key, timeout_ms=timeout_ms)[0]

    async def arun(
        self, item: Any, *, key: Hashable = None, timeout_ms: float | None = None
    ) -> Any:
        """Awaitable twin of `run`. Cancelled before its batch starts, the item is never run."""
        return (await self.arun_batch([item], key=key, timeout_ms=timeout_ms))[0]

    def run_batch(
        self, items: Iterable[Any], *, key: Hashable = None, timeout_ms: float | None = None
    ) -> list[Any]:
        """Return the results of many items, in their order; see `run`.

        They may be split over several batches, and share these with other callers. More items
        than the queue has room for go in as room appears. The first that fails fails the call,
        and those that have not started by then are never run.
        """
        return self._calls().run_batch(items, key=key, timeout_ms=timeout_ms)

    async def arun_batch(
        self, items: Iterable[Any], *, key: Hashable = None, timeout_ms: float | None = None
    ) -> list[Any]:
        """Awaitable twin of `run_batch`."""
        calls = self._known or await self._acalls()
        return await calls.arun_batch(items, key=key, timeout_ms=timeout_ms)

    def submit(
        self, item: Any, *, key: Hashable = None, timeout_ms: float | None = None
    ) -> Future[Any]:
        """Queue one item and return a future of its result at once; see `run`.

        The future can be cancelled until its batch starts. `postprocess` runs on the stream's
        thread, as there is no caller that waits.
        """
        return self._calls().submit(item, key=key, timeout_ms=timeout_ms)

    def stream(
        self, item: Any, *, key: Hashable = None, timeout_ms: float | None = None
    ) -> Iterator[Any]:
        """Return an iterator of the chunks of one item, as the model makes them; see `run`.

        The model is a generator: each step yields a list with one chunk for each item of its
        batch, `DONE` in the place of one that has ended. A caller gets its own, in order. One
        that closes the iterator, or drops it, does not stop the others.

        Args:
            item: What the model takes.
            key: One of `batch_keys`, when there are any.
            timeout_ms: When the last chunk has to be there.

        Raises:
            Overloaded: now: the queue is full; from the iterator: the listener is 4,096 chunks
                behind.
        """
        return self._calls().stream(item, key=key, timeout_ms=timeout_ms)

    def astream(
        self, item: Any, *, key: Hashable = None, timeout_ms: float | None = None
    ) -> AsyncIterator[Any]:
        """Twin of `stream`: an async iterator; called without `await`.

        With a coroutine function as `preprocess`, or while a model host is away, the call begins
        with the first chunk asked for, and is refused there.
        """
        if self._known is None and chosen_hosts.current() is not None:

            async def begin() -> AsyncIterator[Any]:
                calls = await self._acalls()
                return calls.astream(item, key=key, timeout_ms=timeout_ms)

            return DeferredChunks(begin)
        return self._calls().astream(item, key=key, timeout_ms=timeout_ms)

    def run_inline(self, items: Iterable[Any], *, key: Hashable = None) -> list[Any]:
        """Return the results of some items, in batches of their own, run here and now; blocks.

        Here is the current stream's thread where there is one, else the caller's. No other
        caller's items are in these batches, and they wait for no others.
        """
        return self._calls().run_inline(items, key=key)

    async def arun_inline(self, items: Iterable[Any], *, key: Hashable = None) -> list[Any]:
        """Awaitable twin of `run_inline`; without a current stream it runs in a thread."""
        calls = self._known or await self._acalls()
        return await calls.arun_inline(items, key=key)

    # Life.

    def start(self, timeout: float | None = None) -> None:
        """Load and warm up, unless that is done, and wait until it is.

        Args:
            timeout: Seconds to wait; loading goes on after that.

        Raises:
            ModelError: it failed to load. The next call tries again.
            DeadlineExceeded: it took longer than `timeout`.
        """
        self._calls().start(timeout)

    async def astart(self, timeout: float | None = None) -> None:
        """Awaitable twin of `start`."""
        calls = self._known or await self._acalls()
        await calls.astart(timeout)

    @property
    def name(self) -> str | None:
        """The name that `predict` knows it by."""
        return self._config.name

    @property
    def idempotent(self) -> bool:
        """Whether an item may run twice for one call."""
        return self._config.idempotent

    @property
    def ready(self) -> bool:
        """Whether it is loaded, warm, all of its streams take batches, and none of these hangs.

        A batch hangs when it has run for longer than `deadline_ms`, or 60 s without one; of a
        generator, when a step has. The serving is ready again when the batch ends. With a model
        host it is ready there, and the host can be reached.
        """
        return self.problem is None

    @property
    def problem(self) -> str | None:
        """Why it is not `ready`, without anything of what its model said; None: it is."""
        return (self._known or self._local).problem

    @property
    def loaded(self) -> bool:
        """Whether its model has loaded, here or in the model host, whatever came after."""
        return (self._known or self._local).loaded

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._local.closed

    @property
    def unfinished(self) -> int:
        """How many calls of this process wait or run."""
        return (self._known or self._local).unfinished

    def stats(self) -> ServingStats:
        """Return the figures of the process that runs the model: this one, or the model host."""
        return (self._known or self._local).stats()

    @property
    def load_costs(self) -> Sequence[LoadCost]:
        """What loading took, of each instance: here, or in the model host."""
        return (self._known or self._local).load_costs

    def close(self, *, drain: bool = True, timeout: float = 30) -> None:
        """Take no more calls, and wait until its streams have ended. Closing again does nothing.

        Args:
            drain: Serve what waits; else waiting callers get `ServingClosed` at once. Batches
                that run finish.
            timeout: Seconds; then everybody who still waits gets `ServingClosed`.
        """
        self._known = self._local  # a model host goes on serving others
        registry.remove(self, self.name)
        self._local.close(drain=drain, timeout=timeout)

    async def aclose(self, *, drain: bool = True, timeout: float = 30) -> None:
        """Awaitable twin of `close`."""
        await asyncio.to_thread(self.close, drain=drain, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"Serving(name={self.name!r})"

    def __fingerprint__(self) -> Any:
        """Return what a result depends on; None: nobody said what the model is."""
        config = self._config
        if config.fingerprint is None:
            return None
        return config.fingerprint, config.preprocess, config.postprocess

    # Where it runs.

    @property
    def here(self) -> LocalCalls:
        """Its calls in this process, also where a model host runs it."""
        return self._local

    @property
    def hosted(self) -> HostedCalls | None:
        """Its calls in the model host, once it is known that it runs there."""
        return self._known if isinstance(self._known, HostedCalls) else None

    @property
    def found(self) -> bool:
        """Whether there is no more to wait for: it is loaded here, or the host runs it."""
        return self.hosted is not None or self._local.loaded

    def hosted_as(self, target: str, offer: registry.Offer) -> None:
        """Be known to model hosts by another name than its own, and let `offer` answer there."""
        self._target = target
        registry.offer(target, offer)

    def forget_after_fork(self) -> None:
        """In a forked child: load anew when used, and look anew for a model host."""
        self._known = None
        self._local.forget_after_fork()

    def _calls(self) -> LocalCalls | HostedCalls:
        """Return what makes the calls; blocks while a model host has not said what it serves."""
        if self._known is None:
            self._known = self._choose(chosen_hosts.serving(self._target))
        return self._known

    async def _acalls(self) -> LocalCalls | HostedCalls:
        if self._known is None:
            self._known = self._choose(await chosen_hosts.aserving(self._target))
        return self._known

    def _choose(self, found: Hosts | None) -> LocalCalls | HostedCalls:
        if found is None or self._target is None or self.closed:
            return self._local
        return HostedCalls(self._target, found, self._config)

    # In a model host or a node.

    def info(self) -> dict[str, Any]:
        """Return what clients have to know beforehand."""
        return {}

    async def answer(self, request: Request) -> Sequence[Any]:
        """Answer a call of another process; a node may in turn ask the model host."""
        # The figures are this process's own. To ask the host for them would block.
        calls = self._local if request.method == "stats" else await self._acalls()
        return await answer(calls, request)

    async def answer_stream(self, request: Request) -> AsyncGenerator[Any, None]:
        """Answer a call of another process for chunks."""
        async with contextlib.aclosing(answer_stream(await self._acalls(), request)) as chunks:
            async for chunk in chunks:
                yield chunk
