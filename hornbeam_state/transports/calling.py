"""The ways to call, the same over every transport: blocking, awaited, as a future, as a stream."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from hornbeam_state.listening import AsyncChunks, Chunks, await_for
from hornbeam_state.transports.waiting import Reply, TaskWaker, ThreadWaker

if TYPE_CHECKING:
    from concurrent.futures import Future

    from hornbeam_state.transports.base import Request
    from hornbeam_state.transports.waiting import Call, Waker


class Calling(ABC):
    """What a `Channel` does with callers. How a call is sent and ended is the transport's."""

    def call(self, request: Request) -> list[Any]:
        """Return the results; blocks. See `Channel.call`."""
        waker = ThreadWaker()
        call = self.begin(request, waker, blocks=True)
        try:
            while not call.done:
                if not self.wait(call, waker):
                    self.expire(call)
        except BaseException:
            self.abandon(call)
            raise
        return call.outcome()

    async def acall(self, request: Request) -> list[Any]:
        """Awaitable twin of `call`. Cancelled, it cancels the call."""
        waker = TaskWaker()
        return await await_for(self, self.begin(request, waker), waker)

    def submit(self, request: Request) -> Future[list[Any]]:
        """Return a future of the results at once; cancelling it cancels the call."""
        reply = Reply(self.abandon)
        call = self.begin(request, reply)
        reply.call = None if call.done else call
        self.note_deadline(call)
        return reply

    def stream(self, request: Request) -> Chunks:
        """Return the chunks; closing or dropping the iterator cancels the call."""
        waker = ThreadWaker()
        return Chunks(self, self.begin(request, waker, streams=True, blocks=True), waker)

    def astream(self, request: Request) -> AsyncChunks:
        """Twin of `stream`: an async iterator; called without `await`, on the event loop."""
        waker = TaskWaker()
        return AsyncChunks(self, self.begin(request, waker, streams=True), waker)

    def wait(self, call: Call, waker: ThreadWaker) -> bool:
        """Block until woken, or until the deadline of a call; return whether it was woken."""
        return waker.wait(self.seconds_left(call))

    def seconds_left(self, call: Call) -> float:
        """Return the seconds until the deadline of a call."""
        return call.deadline - time.monotonic()

    @abstractmethod
    def begin(
        self, request: Request, waker: Waker, *, streams: bool = False, blocks: bool = False
    ) -> Call:
        """Send a call, and return what is waited for.

        Args:
            request: The call.
            waker: Tells the caller.
            streams: Whether it asks for a stream.
            blocks: Whether the caller may be kept waiting.
        """

    @abstractmethod
    def expire(self, call: Call) -> None:
        """End a call whose deadline passed, and wake its caller."""

    @abstractmethod
    def abandon(self, call: Call) -> None:
        """Cancel a call, unless it is done."""

    @abstractmethod
    def forget(self, call: Call) -> None:
        """Cancel a call soon. Takes no lock: a finalizer may call it."""

    @abstractmethod
    def note_deadline(self, call: Call) -> None:
        """See to it that the call ends in time, whoever waits for it."""
