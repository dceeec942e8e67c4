"""Functions that block, in threads: awaited on an event loop, and never waited for twice."""

from __future__ import annotations

import asyncio
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextvars import Context

_END: Final = object()
_Outcome = tuple[Any, BaseException | None]


class _Job:
    """A function that is to run in a thread.

    Args:
        context: What it runs in.
        fn: The function.
        end: Called on the event loop with its outcome.
    """

    __slots__ = ("_right", "context", "end", "fn")

    def __init__(
        self, context: Context, fn: Callable[[], Any], end: Callable[[_Outcome], None]
    ) -> None:
        self.context = context
        self.fn = fn
        self.end = end
        self._right = [None]  # to begin, or to prevent that: whoever takes it has it

    def claim(self) -> bool:
        """Take the right to begin it, or to prevent that; return False if somebody has. Atomic."""
        try:
            self._right.pop()
        except IndexError:
            return False
        return True

    def run(self) -> _Outcome:
        """Run it, and return what came of it."""
        # As a value: a StopIteration or SystemExit would do more to a future than fail it.
        try:
            return self.context.run(self.fn), None
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            return None, error


class Threads:
    """A bounded pool of threads. All of it is used on one event loop.

    Unlike an executor of the standard library it does not keep a process from ending, whatever its
    functions do, and wakes the event loop once for each of them.

    Args:
        most: How many threads; the caller sees to it that no more functions run at a time.
        name: What they are called.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads = 0
        self._unfinished = 0
        self._closed = False

    async def run(self, context: Context, fn: Callable[[], Any], on_end: Callable[[], None]) -> Any:
        """Return what a function returns.

        Cancelled, it does not wait: a function that has not begun never does, and one that has
        goes on unheard.

        Args:
            context: What the function runs in.
            fn: The function.
            on_end: Called on the event loop when it has really ended, or never will begin.

        Raises:
            Raised: the function raised.
        """
        answer: asyncio.Future[_Outcome] = self._loop.create_future()

        def end(outcome: _Outcome) -> None:
            on_end()
            if not answer.done():
                answer.set_result(outcome)

        job = _Job(context, fn, end)
        self._submit(job)
        try:
            value, error = await answer
        except asyncio.CancelledError:
            if job.claim():
                on_end()
            raise
        if error is not None:
            raise Raised(error)
        return value

    def start(self, context: Context, fn: Callable[[], None], on_end: Callable[[], None]) -> None:
        """Have a function run unheard; `on_end` as in `run`."""
        self._submit(_Job(context, fn, lambda _: on_end()))

    def close(self) -> None:
        """Let no further function begin. Those that run go on."""
        self._closed = True
        for _ in range(self._threads):
            self._jobs.put(None)

    def _submit(self, job: _Job) -> None:
        self._unfinished += 1
        self._jobs.put(job)
        if self._unfinished > self._threads and self._threads < self._most:
            self._threads += 1
            try:
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
            except RuntimeError:
                self._threads -= 1
                if not self._threads and job.claim():  # else another one comes to it
                    self._unfinished -= 1
                    job.end((None, RuntimeError("no thread can be started")))

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            outcome = None if self._closed or not job.claim() else job.run()
            try:
                self._loop.call_soon_threadsafe(self._finish, job, outcome)
            except RuntimeError:
                return  # the loop is closed, and nobody asks any more
            del job, outcome  # they may hold large arrays

    def _finish(self, job: _Job, outcome: _Outcome | None) -> None:
        self._unfinished -= 1
        if outcome is not None:
            job.end(outcome)


class Steps:
    """What a generator yields, step by step in threads: an async iterator.

    Args:
        threads: Where the steps run.
        context: What they run in.
        make: Returns the generator; called in a thread too.
        on_end: Called on the event loop when the generator is closed.
    """

    def __init__(
        self,
        threads: Threads,
        context: Context,
        make: Callable[[], Iterator[Any]],
        on_end: Callable[[], None],
    ) -> None:
        self._threads = threads
        self._context = context
        self._make = make
        self._on_end = on_end
        self._generator: Iterator[Any] | None = None
        self._runs = False
        self._closed = False

    def __aiter__(self) -> Steps:
        return self

    async def __anext__(self) -> Any:
        self._runs = True
        value = await self._threads.run(self._context, self._next, self._step_ended)
        if value is _END:
            raise StopAsyncIteration
        return value

    async def aclose(self) -> None:
        """Close the generator as soon as its step has ended, without waiting for that."""
        if not self._closed:
            self._closed = True
            if not self._runs:
                self._finish()

    def _step_ended(self) -> None:
        self._runs = False
        if self._closed:
            self._finish()

    def _finish(self) -> None:
        self._threads.start(self._context, self._close, self._on_end)

    def _next(self) -> Any:
        if self._generator is None:
            self._generator = iter(self._make())
        return next(self._generator, _END)

    def _close(self) -> None:
        close = getattr(self._generator, "close", None)
        if close is not None:
            close()


class Raised(Exception):
    """A function raised.

    Attributes:
        error: What.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error
