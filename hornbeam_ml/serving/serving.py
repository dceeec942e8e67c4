"""`Serving`: what callers see of a model that runs in batches."""

from __future__ import annotations

import asyncio
import threading
import weakref
from math import inf
from typing import TYPE_CHECKING, Any, Literal, Self

from hornbeam_ml.errors import ModelError, ServingClosed
from hornbeam_ml.promises import Promise
from hornbeam_ml.serving import registry
from hornbeam_ml.serving.admission import Admission
from hornbeam_ml.serving.calls import Call, PromiseWaker, StreamingCall, TaskWaker, ThreadWaker
from hornbeam_ml.serving.config import ServingConfig
from hornbeam_ml.serving.model import Steps
from hornbeam_ml.serving.processing import Processing
from hornbeam_ml.serving.runner import Runner
from hornbeam_ml.serving.stats import ServingStats, Tally
from hornbeam_ml.serving.timekeeper import watch
from hornbeam_ml.serving.waiting import (
    AsyncChunks,
    Chunks,
    DeferredChunks,
    await_for,
    wait_for,
)
from hornbeam_ml.streams import current_stream
from hornbeam_state.errors import DeadlineExceeded

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence
    from concurrent.futures import Future

    from hornbeam_ml.serving.admission import Terms


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
            fingerprint=fingerprint,
        )
        self._admission = Admission(self._config)
        self._processing = Processing(preprocess, postprocess)
        self._lock = threading.Lock()
        self._runner: Runner | None = None
        self._closed: ServingClosed | None = None
        self._finalizer = weakref.finalize(self, int)
        registry.add(self, name)

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
        terms = self._admission.terms(key, timeout_ms)
        prepared = self._processing.prepare(items)
        if not prepared:
            return []
        runner, waker = self._running(), ThreadWaker()
        call = self._admission.admit(runner, Call, prepared, terms, waker)
        return self._processing.finish_all(wait_for(runner.queue, call, waker))

    async def arun_batch(
        self, items: Iterable[Any], *, key: Hashable = None, timeout_ms: float | None = None
    ) -> list[Any]:
        """Awaitable twin of `run_batch`."""
        terms = self._admission.terms(key, timeout_ms)
        prepared = await self._processing.aprepare(items)
        if not prepared:
            return []
        runner, waker = self._running(), TaskWaker()
        call = self._admission.admit(runner, Call, prepared, terms, waker)
        return await self._processing.afinish_all(await await_for(runner.queue, call, waker))

    def submit(
        self, item: Any, *, key: Hashable = None, timeout_ms: float | None = None
    ) -> Future[Any]:
        """Queue one item and return a future of its result at once; see `run`.

        The future can be cancelled until its batch starts. `postprocess` runs on the stream's
        thread, as there is no caller that waits.
        """
        promise = Promise()
        waker = PromiseWaker(promise, self._processing.finish)
        terms = self._admission.terms(key, timeout_ms)
        prepared, runner = self._processing.prepare([item]), self._running()
        call = self._admission.admit(runner, Call, prepared, terms, waker)
        promise.add_done_callback(_abandon_if_cancelled(runner, call))
        if call.deadline != inf:
            watch(runner.queue, call)
        return promise

    def stream(self, item: Any, *, key: Hashable = None, timeout_ms: float | None = None) -> Chunks:
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
        terms = self._admission.terms(key, timeout_ms)
        prepared = self._processing.prepare([item])
        runner, waker = self._running(), ThreadWaker()
        call = self._admission.admit(runner, StreamingCall, prepared, terms, waker)
        return Chunks(runner.queue, call, waker, self._processing.finish)

    def astream(
        self, item: Any, *, key: Hashable = None, timeout_ms: float | None = None
    ) -> AsyncChunks | DeferredChunks:
        """Twin of `stream`: an async iterator; called without `await`.

        With a coroutine function as `preprocess` the call begins with the first chunk asked for,
        and is refused there.
        """
        terms = self._admission.terms(key, timeout_ms)
        if not self._processing.awaits:
            return self._chunks(self._processing.prepare([item]), terms)

        async def begin() -> AsyncChunks:
            return self._chunks(await self._processing.aprepare([item]), terms)

        return DeferredChunks(begin)

    def _chunks(self, prepared: Sequence[Any], terms: Terms) -> AsyncChunks:
        runner, waker = self._running(), TaskWaker()
        call = self._admission.admit(runner, StreamingCall, prepared, terms, waker)
        return AsyncChunks(runner.queue, call, waker, self._processing.afinish)

    def run_inline(self, items: Iterable[Any], *, key: Hashable = None) -> list[Any]:
        """Return the results of some items, in batches of their own, run here and now; blocks.

        Here is the current stream's thread where there is one, else the caller's. No other
        caller's items are in these batches, and they wait for no others.
        """
        key = self._admission.terms(key).key
        prepared = self._processing.prepare(items)
        if self._closed is not None:
            raise ServingClosed(str(self._closed))
        runner = self._running()
        self.start()
        results: list[Any] = [None] * len(prepared)
        for batch in self._admission.batches(runner, prepared, key):
            outcome = runner.run_inline([prepared[index] for index in batch], key)
            if isinstance(outcome, Steps):
                outcome.close()
                raise ModelError(f"the model of {self._config.label} is a generator")
            for index, result in zip(batch, outcome, strict=True):
                results[index] = result
        return self._processing.finish_all(results)

    async def arun_inline(self, items: Iterable[Any], *, key: Hashable = None) -> list[Any]:
        """Awaitable twin of `run_inline`; without a current stream it runs in a thread."""
        stream = current_stream()
        if stream is not None:
            await self.astart()
            return await stream.arun(self.run_inline, items, key=key)  # type: ignore[no-any-return]
        return await asyncio.to_thread(self.run_inline, items, key=key)

    # Life.

    def start(self, timeout: float | None = None) -> None:
        """Load and warm up, unless that is done, and wait until it is.

        Args:
            timeout: Seconds to wait; loading goes on after that.

        Raises:
            ModelError: it failed to load. The next call tries again.
            DeadlineExceeded: it took longer than `timeout`.
        """
        runner = self._running()
        try:
            runner.loaded.result(timeout)
        except TimeoutError as error:
            if runner.loaded.done():
                raise
            raise DeadlineExceeded(f"{self._config.label} still loads") from error

    async def astart(self, timeout: float | None = None) -> None:
        """Awaitable twin of `start`."""
        runner = self._running()
        try:
            loaded = asyncio.shield(asyncio.wrap_future(runner.loaded))
            await asyncio.wait_for(loaded, timeout)
        except TimeoutError as error:
            if runner.loaded.done():
                raise
            raise DeadlineExceeded(f"{self._config.label} still loads") from error

    @property
    def name(self) -> str | None:
        """The name that `predict` knows it by."""
        return self._config.name

    @property
    def ready(self) -> bool:
        """Whether it is loaded, warm, all of its streams take batches, and none of these hangs.

        A batch hangs when it has run for longer than `deadline_ms`, or 60 s without one; of a
        generator, when a step has. The serving is ready again when the batch ends.
        """
        runner = self._runner
        return runner is not None and runner.ready

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed is not None

    def stats(self) -> ServingStats:
        """Return the figures of this process."""
        runner = self._runner
        if runner is None:
            return Tally().stats(name=self.name, ready=False, queued={}, running=0)
        return runner.queue.stats(name=self.name, ready=runner.ready)

    def close(self, *, drain: bool = True, timeout: float = 30) -> None:
        """Take no more calls, and wait until its streams have ended. Closing again does nothing.

        Args:
            drain: Serve what waits; else waiting callers get `ServingClosed` at once. Batches
                that run finish.
            timeout: Seconds; then everybody who still waits gets `ServingClosed`.
        """
        error = ServingClosed(f"{self._config.label} is closed")
        with self._lock:
            self._closed = self._closed or error
            runner = self._runner
        registry.remove(self, self.name)
        if runner is not None:
            runner.close(error, drain=drain, timeout=timeout)

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

    def forget_after_fork(self) -> None:
        """In a forked child: load anew when used."""
        self._lock = threading.Lock()
        self._runner = None

    def _running(self) -> Runner:
        """Return the runner of this process, made and started now unless there is one."""
        runner = self._runner
        if runner is not None and not runner.failed:
            return runner
        with self._lock:
            if self._closed is not None:
                raise ServingClosed(str(self._closed))
            if self._runner is None or self._runner.failed:
                runner = Runner(self._config)
                # The threads do not refer to the serving, so that it can be collected.
                self._finalizer.detach()
                self._finalizer = weakref.finalize(self, runner.queue.drop)
                self._finalizer.atexit = False
                runner.start()
                self._runner = runner
            return self._runner


def _abandon_if_cancelled(runner: Runner, call: Call) -> Callable[[Future[Any]], None]:
    queue, reference = runner.queue, weakref.ref(call)  # the call refers to the future

    def abandon(future: Future[Any]) -> None:
        call = reference()
        if future.cancelled() and call is not None:
            queue.abandon(call)

    return abandon
