"""The callers' side: waiting for a call to be done, and listening to the chunks of a stream."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable

    from hornbeam_ml.serving.calls import Call, StreamingCall, TaskWaker, ThreadWaker
    from hornbeam_ml.serving.queue import BatchQueue


def wait_for(queue: BatchQueue, call: Call, waker: ThreadWaker) -> list[Any]:
    """Return the results of a call; blocks until its deadline. Interrupted, it is abandoned."""
    try:
        while not call.done:
            if not waker.wait(call.deadline - queue.clock()):
                queue.expire(call)
    except BaseException:
        queue.abandon(call)
        raise
    return call.outcome()


async def await_for(queue: BatchQueue, call: Call, waker: TaskWaker) -> list[Any]:
    """Awaitable twin of `wait_for`. Cancelled, the call is abandoned."""
    timer = _timer(queue, call, waker)
    try:
        while not call.done:
            await waker.wait()
    except BaseException:
        queue.abandon(call)
        raise
    finally:
        if timer:
            timer.cancel()
    return call.outcome()


class Chunks:
    """The chunks of one item: an iterator, also a context manager that stops listening."""

    def __init__(
        self,
        queue: BatchQueue,
        call: StreamingCall,
        waker: ThreadWaker,
        finish: Callable[[Any], Any],
    ) -> None:
        self._queue = queue
        self._call = call
        self._waker = waker
        self._finish = finish

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        """Return the next chunk, or raise what ended the stream too early."""
        call = self._call
        while True:
            done = call.done  # before looking for chunks: none comes after it
            if call.chunks:
                return self._finish(call.chunks.popleft())
            if done:
                call.outcome()
                raise StopIteration
            try:
                if not self._waker.wait(call.deadline - self._queue.clock()):
                    self._queue.expire(call)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Stop listening. The rest of the batch goes on."""
        self._queue.abandon(self._call)
        self._call.chunks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Not `close`: the collector may have interrupted a thread that holds the queue's lock.
        self._call.unheard = True


class AsyncChunks:
    """The chunks of one item: an async iterator, also a context manager that stops listening."""

    def __init__(
        self,
        queue: BatchQueue,
        call: StreamingCall,
        waker: TaskWaker,
        finish: Callable[[Any], Any],
    ) -> None:
        self._queue = queue
        self._call = call
        self._waker = waker
        self._finish = finish
        self._timer = _timer(queue, call, waker)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        """Return the next chunk, or raise what ended the stream too early."""
        call = self._call
        while True:
            done = call.done
            if call.chunks:
                return await self._finish(call.chunks.popleft())
            if done:
                await self.aclose()
                call.outcome()
                raise StopAsyncIteration
            try:
                await self._waker.wait()
            except BaseException:
                await self.aclose()
                raise

    async def aclose(self) -> None:
        """Stop listening. The rest of the batch goes on."""
        if self._timer:
            self._timer.cancel()
        self._queue.abandon(self._call)
        self._call.chunks.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._call.unheard = True  # as above


class DeferredChunks:
    """The chunks of one item, asked for with the first of them; otherwise like `AsyncChunks`.

    Args:
        begin: Asks for them.
    """

    def __init__(self, begin: Callable[[], Awaitable[AsyncChunks]]) -> None:
        self._begin: Callable[[], Awaitable[AsyncChunks]] | None = begin
        self._chunks: AsyncChunks | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        """Return the next chunk, or raise what ended the stream too early."""
        begin, self._begin = self._begin, None
        if begin is not None:
            self._chunks = await begin()
        if self._chunks is None:  # closed, or not begun, for the reason that was raised
            raise StopAsyncIteration
        return await anext(self._chunks)

    async def aclose(self) -> None:
        """Stop listening. The rest of the batch goes on."""
        self._begin = None
        if self._chunks is not None:
            await self._chunks.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()


def _timer(queue: BatchQueue, call: Call, waker: TaskWaker) -> asyncio.TimerHandle | None:
    if call.deadline == inf:
        return None
    return waker.loop.call_later(call.deadline - queue.clock(), queue.expire, call)
