"""The calls of a serving whose model runs in this process."""

from __future__ import annotations

import asyncio
import threading
import weakref
from math import inf
from typing import TYPE_CHECKING, Any

from hornbeam_ml.errors import ModelError, ServingClosed
from hornbeam_ml.promises import Promise
from hornbeam_ml.serving.admission import Admission
from hornbeam_ml.serving.calls import Call, PromiseWaker, StreamingCall, TaskWaker, ThreadWaker
from hornbeam_ml.serving.model import Steps
from hornbeam_ml.serving.processing import Processing
from hornbeam_ml.serving.runner import Runner
from hornbeam_ml.serving.stats import ServingStats, Tally
from hornbeam_ml.serving.timekeeper import watch
from hornbeam_ml.serving.waiting import (
    AsyncChunks,
    Chunks,
    DeferredChunks,
    wait_for,
)
from hornbeam_ml.streams import current_stream
from hornbeam_state.errors import DeadlineExceeded
from hornbeam_state.listening import await_for

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence
    from concurrent.futures import Future

    from hornbeam_ml.memory import LoadCost
    from hornbeam_ml.serving.admission import Terms
    from hornbeam_ml.serving.config import ServingConfig


class LocalCalls:
    """Makes the calls of a serving here; the methods are those of `Serving`.

    Args:
        config: The settings of the serving.
    """

    def __init__(self, config: ServingConfig) -> None:
        self._config = config
        self._admission = Admission(config)
        self._processing = Processing(config.preprocess, config.postprocess)
        self._lock = threading.Lock()
        self._runner: Runner | None = None
        self._closed: ServingClosed | None = None
        self._finalizer = weakref.finalize(self, int)

    def run_batch(
        self, items: Iterable[Any], *, key: Hashable = None, timeout_ms: float | None = None
    ) -> list[Any]:
        """Return the results of many items, in their order; blocks."""
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
        return await self._processing.afinish_all(await self._arun(prepared, terms))

    async def arun_prepared(
        self, prepared: Sequence[Any], *, timeout_ms: float | None = None
    ) -> list[Any]:
        """Return the model's own results of items as `preprocess` returns them."""
        return await self._arun(prepared, self._admission.terms(None, timeout_ms))

    async def _arun(self, prepared: Sequence[Any], terms: Terms) -> list[Any]:
        if not prepared:
            return []
        runner, waker = self._running(), TaskWaker()
        call = self._admission.admit(runner, Call, prepared, terms, waker)
        return await await_for(runner.queue, call, waker)

    def submit(
        self, item: Any, *, key: Hashable = None, timeout_ms: float | None = None
    ) -> Future[Any]:
        """Queue one item and return a future of its result at once."""
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
        """Return an iterator of the chunks of one item."""
        terms = self._admission.terms(key, timeout_ms)
        prepared = self._processing.prepare([item])
        runner, waker = self._running(), ThreadWaker()
        call = self._admission.admit(runner, StreamingCall, prepared, terms, waker)
        return Chunks(runner.queue, call, waker, self._processing.finish)

    def astream(
        self, item: Any, *, key: Hashable = None, timeout_ms: float | None = None
    ) -> AsyncChunks | DeferredChunks:
        """Twin of `stream`: an async iterator; called without `await`."""
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
        """Return the results of some items, in batches of their own, run here and now; blocks."""
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

    def start(self, timeout: float | None = None) -> None:
        """Load and warm up, unless that is done, and wait until it is."""
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
    def problem(self) -> str | None:
        """Why it takes no calls, without anything of what its model said; None: it does."""
        if self._closed is not None:
            return f"{self._config.label} is closed"
        runner = self._runner
        problem = "is not loaded" if runner is None else runner.problem
        return problem and f"{self._config.label} {problem}"

    @property
    def load_costs(self) -> Sequence[LoadCost]:
        """What loading took, of each instance."""
        runner = self._runner
        return () if runner is None else tuple(runner.costs)

    @property
    def loaded(self) -> bool:
        """Whether the model has been loaded, and not failed since."""
        runner = self._runner
        return runner is not None and runner.loaded.done() and not runner.failed

    @property
    def unfinished(self) -> int:
        """How many calls wait or run."""
        runner = self._runner
        return 0 if runner is None else runner.queue.unfinished

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed is not None

    def stats(self) -> ServingStats:
        """Return the figures of this process."""
        runner = self._runner
        if runner is None:
            return Tally().stats(name=self._config.name, ready=False, queued={}, running=0)
        return runner.queue.stats(name=self._config.name, ready=runner.ready)

    def close(self, *, drain: bool = True, timeout: float = 30) -> None:
        """Take no more calls, and wait until its streams have ended."""
        error = ServingClosed(f"{self._config.label} is closed")
        with self._lock:
            self._closed = self._closed or error
            runner = self._runner
        if runner is not None:
            runner.close(error, drain=drain, timeout=timeout)

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
