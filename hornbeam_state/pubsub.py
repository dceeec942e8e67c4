"""Messages on topics: published to whoever subscribes, in any process on any machine.

Nothing is kept for later: a message reaches those who are subscribed when it is published. Each
subscription has a queue of its own, and a bound on it: a slow reader loses its oldest messages,
is told how many, and slows nobody else down.
"""

from __future__ import annotations

import asyncio
import os
import select
import threading
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from hornbeam_state.backends.base import Topics
from hornbeam_state.codec import decode
from hornbeam_state.errors import DeadlineExceeded

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from hornbeam_state.backends.base import Backend, Inbox

_IN_A_ROW: Final = 32  # messages a task may take before it lets others run
_LONGEST_POLL: Final = 3600.0  # seconds; the kernel takes no more than a month


class Message(NamedTuple):
    """What was published on a topic."""

    topic: str
    data: Any


class Subscription:
    """The messages on some topics, oldest first, from the moment of subscribing.

    A context manager and an iterator, sync and async, that any number of threads and tasks may
    share: each message goes to one of them. The sync iterator ends when the subscription is
    closed elsewhere, the async one too. Closing the store closes its subscriptions.

    Args:
        backend: Where the messages come from.
        space: What the topics of its key space begin with there.
        topics: What to subscribe to.
        maxsize: How many messages may wait; 64 MiB of them at most, unless a single one is
            larger. A new one then takes the place of the oldest.

    Raises:
        StoreUnavailable: by any method that waits: the store cannot be reached. The subscription
            stays: a later call goes on.
        CodecError: by a method that returns a message: its bytes are damaged or of an unknown
            type. The next call returns the next message.
        RuntimeError: by any method: it is closed, or it was made by the parent of this process.
    """

    def __init__(self, backend: Backend, space: bytes, topics: Topics, maxsize: int) -> None:
        self._backend = backend
        self._space = space
        self._topics = topics
        self._maxsize = maxsize
        self._inbox: Inbox | None = None
        self._closed = False
        self._opening = threading.RLock()
        self._process = os.getpid()
        self._waiting: dict[asyncio.AbstractEventLoop, set[asyncio.Future[None]]] = {}
        self._taken = 0

    @property
    def dropped(self) -> int:
        """How many messages were dropped because too many were waiting."""
        return 0 if self._inbox is None else self._inbox.dropped

    @property
    def gaps(self) -> int:
        """How often the connection was lost, and with it whatever was published meanwhile."""
        return 0 if self._inbox is None else self._inbox.gaps

    def open(self) -> Self:
        """Subscribe, if not done yet."""
        self._check()
        if self._inbox is None:
            self._keep(self._backend.subscribe(self._topics, self._maxsize))
        return self

    async def aopen(self) -> Self:
        """Awaitable twin of `open`."""
        self._check()
        if self._inbox is None:
            self._keep(await self._backend.asubscribe(self._topics, self._maxsize))
        return self

    def _keep(self, inbox: Inbox) -> None:
        """Use an inbox, unless another thread or task has opened or closed the subscription."""
        with self._opening:
            if self._inbox is None and not self._closed:
                self._inbox = inbox
                return
        inbox.close()
        self._check()

    def get(self, timeout: float | None = None) -> Message:
        """Return the next message, waiting for it for at most `timeout` seconds (None: for ever).

        Raises:
            DeadlineExceeded: none came in time.
        """
        _check_timeout(timeout)
        self.open()
        deadline = None if timeout is None else time.monotonic() + timeout
        while (message := self._take()) is None:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise self._nothing_came(timeout)
            poller = select.poll()
            poller.register(self._descriptor(), select.POLLIN)
            poller.poll(None if left is None else min(left, _LONGEST_POLL) * 1000)
        return message

    async def aget(self, timeout: float | None = None) -> Message:
        """Awaitable twin of `get`; cancelling it loses no message."""
        _check_timeout(timeout)
        await self.aopen()
        self._taken += 1
        if self._taken % _IN_A_ROW == 0:
            await asyncio.sleep(0)
        try:
            async with asyncio.timeout(timeout) as limit:
                while (message := self._take()) is None:
                    await self._something()
                return message
        except TimeoutError:
            if not limit.expired():
                raise
            raise self._nothing_came(timeout) from None

    def close(self) -> None:
        """Unsubscribe; who waits for a message is told. Idempotent."""
        if self._process != os.getpid():
            return  # it is the parent's; a lock of then may be held for ever
        with self._opening:
            self._closed = True
        if self._inbox is not None:
            self._inbox.close()

    async def aclose(self) -> None:
        """Awaitable twin of `close`."""
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Message:
        try:
            return self.get()
        except _Closed:
            raise StopIteration from None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        try:
            return await self.aget()
        except _Closed:
            raise StopAsyncIteration from None

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return await self.aopen()

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __await__(self) -> Generator[Any, None, Self]:
        return self.aopen().__await__()

    def _check(self) -> None:
        if self._process != os.getpid():
            raise RuntimeError("the subscription is the parent process's: subscribe in this one")
        if self._closed or (self._inbox is not None and self._inbox.closed):
            raise _Closed("the subscription is closed")

    def _take(self) -> Message | None:
        taken = None if self._inbox is None else self._inbox.take()
        if taken is not None:
            topic, payload = taken
            return Message(topic[len(self._space) :].decode(), decode(payload))
        if self._inbox is not None and self._inbox.closed:  # by itself, or with the store
            self._closed = True
        self._check()  # who is closed would wait for ever
        return None

    def _descriptor(self) -> int:
        return -1 if self._inbox is None else self._inbox.fileno()

    async def _something(self) -> None:
        """Wait until the descriptor is readable. A loop watches it once for all its tasks."""
        loop = asyncio.get_running_loop()
        waiting = self._waiting.setdefault(loop, set())
        if not waiting:
            loop.add_reader(self._descriptor(), self._wake, loop)
        future = loop.create_future()
        waiting.add(future)
        try:
            await future
        finally:
            waiting.discard(future)
            if not waiting and self._waiting.get(loop) is waiting:
                self._forget(loop)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        waiting = self._waiting[loop]
        self._forget(loop)
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def _forget(self, loop: asyncio.AbstractEventLoop) -> None:
        del self._waiting[loop]
        loop.remove_reader(self._descriptor())

    def _nothing_came(self, timeout: float | None) -> DeadlineExceeded:
        return DeadlineExceeded(f"no message came within {timeout} s")


class _Closed(RuntimeError):
    """The subscription is closed."""


def _check_timeout(timeout: float | None) -> None:
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise TypeError(f"timeout is a number of seconds or None, not {type(timeout).__qualname__}")
    if not timeout >= 0:
        raise ValueError(f"timeout={timeout}: give seconds, 0 or more, or None")


def make_topics(space: bytes, names: Iterable[bytes]) -> Topics:
    """Return what to subscribe to, each topic once.

    Args:
        space: What the topics of the key space begin with.
        names: Topics; one that ends in ``*`` stands for all that begin with the rest.
    """
    given = set(names)
    prefixes = {space + name[:-1] for name in given if name.endswith(b"*")}
    widest = [one for one in prefixes if not any(_covers(other, one) for other in prefixes)]
    plain = {space + name for name in given if not name.endswith(b"*")}
    return Topics(
        names=tuple(sorted(name for name in plain if not name.startswith(tuple(widest)))),
        prefixes=tuple(sorted(widest)),
    )


def _covers(prefix: bytes, other: bytes) -> bool:
    return other != prefix and other.startswith(prefix)
