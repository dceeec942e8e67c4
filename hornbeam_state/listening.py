"""The callers' side: awaiting the results of a call, and listening to the chunks of a stream."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    import asyncio
    from collections import deque

    from hornbeam_state.waking import Gate, TaskGate


class Call(Protocol):
    """A call that somebody waits for."""

    @property
    def done(self) -> bool:
        """Whether no more comes."""
        ...

    def outcome(self) -> list[Any]:
        """Return the results, or raise the error, of a call that is done."""
        ...


class StreamedCall(Call, Protocol):
    """One whose results come chunk by chunk."""

    @property
    def chunks(self) -> deque[Any]:
        """What has come and was not taken."""
        ...


class Calls(Protocol):
    """Who looks after the calls that have no answer yet."""

    def seconds_left(self, call: Any, /) -> float:
        """Return the seconds until the deadline of a call."""
        ...

    def expire(self, call: Any, /) -> None:
        """End a call whose deadline passed."""

    def abandon(self, call: Any, /) -> None:
        """Cancel a call, unless it is done."""

    def forget(self, call: Any, /) -> None:
        """Cancel a call soon. Takes no lock: a finalizer may call it."""


async def await_for(calls: Calls, call: Call, waker: TaskGate) -> list[Any]:
    """Return the results of a call. Cancelled, the call is abandoned."""
    timer = _timer(calls, call, waker)
    try:
        while not call.done:
            await waker.wait()
    except BaseException:
        calls.abandon(call)
        raise
    finally:
        if timer is not None:
            timer.cancel()
    return call.outcome()


class Chunks:
    """The chunks of a call: an iterator, also a context manager that stops listening."""

    def __init__(self, calls: Calls, call: StreamedCall, waker: Gate) -> None:
        self._calls = calls
        self._call = call
        self._waker = waker

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        """Return the next chunk, or raise what ended the stream too early."""
        call = self._call
        while True:
            done = call.done  # before looking for chunks: none comes after it
            if call.chunks:
                return call.chunks.popleft()
            if done:
                call.outcome()
                raise StopIteration
            try:
                if not self._waker.wait(self._calls.seconds_left(call)):
                    self._calls.expire(call)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Stop listening, which abandons the call."""
        self._calls.abandon(self._call)
        self._call.chunks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Not `close`: the collector may have interrupted a thread that holds a lock.
        self._calls.forget(self._call)


class AsyncChunks:
    """The chunks of a call: an async iterator, also a context manager that stops listening."""

    def __init__(self, calls: Calls, call: StreamedCall, waker: TaskGate) -> None:
        self._calls = calls
        self._call = call
        self._waker = waker
        self._timer = _timer(calls, call, waker)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        """Return the next chunk, or raise what ended the stream too early."""
        call = self._call
        while True:
            done = call.done
            if call.chunks:
                return call.chunks.popleft()
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
        """Stop listening, which abandons the call."""
        if self._timer is not None:
            self._timer.cancel()
        self._calls.abandon(self._call)
        self._call.chunks.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._calls.forget(self._call)  # as above


def _timer(calls: Calls, call: Call, waker: TaskGate) -> asyncio.TimerHandle | None:
    seconds = calls.seconds_left(call)
    if seconds == inf:
        return None
    return waker.loop.call_later(max(0.0, seconds), calls.expire, call)
