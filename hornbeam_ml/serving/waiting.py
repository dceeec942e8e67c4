"""The callers' side: waiting for a call to be done, and listening to the chunks of a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from hornbeam_state import listening

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from hornbeam_ml.serving.calls import Call, StreamingCall, TaskWaker, ThreadWaker
    from hornbeam_ml.serving.queue import BatchQueue


def wait_for(queue: BatchQueue, call: Call, waker: ThreadWaker) -> list[Any]:
    """Return the results of a call; blocks until its deadline. Interrupted, it is abandoned."""
    try:
        while not call.done:
            if not waker.wait(queue.seconds_left(call)):
                queue.expire(call)
    except BaseException:
        queue.abandon(call)
        raise
    return call.outcome()


class Chunks(listening.Chunks):
    """The chunks of one item. When nobody listens any more, the rest of its batch goes on."""

    def __init__(
        self,
        queue: BatchQueue,
        call: StreamingCall,
        waker: ThreadWaker,
        finish: Callable[[Any], Any],
    ) -> None:
        super().__init__(queue, call, waker)
        self._finish = finish

    def __next__(self) -> Any:
        """Return the next chunk, or raise what ended the stream too early."""
        return self._finish(super().__next__())


class AsyncChunks(listening.AsyncChunks):
    """Awaitable twin of `Chunks`."""

    def __init__(
        self,
        queue: BatchQueue,
        call: StreamingCall,
        waker: TaskWaker,
        finish: Callable[[Any], Awaitable[Any]],
    ) -> None:
        super().__init__(queue, call, waker)
        self._finish = finish

    async def __anext__(self) -> Any:
        """Return the next chunk, or raise what ended the stream too early."""
        return await self._finish(await super().__anext__())


class DeferredChunks:
    """The chunks of one item, asked for with the first of them; otherwise like `AsyncChunks`.

    Args:
        begin: Asks for them.
    """

    def __init__(self, begin: Callable[[], Awaitable[AsyncIterator[Any]]]) -> None:
        self._begin: Callable[[], Awaitable[AsyncIterator[Any]]] | None = begin
        self._chunks: AsyncIterator[Any] | None = None

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
            await self._chunks.aclose()  # type: ignore[attr-defined] # those of streams have it

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()
