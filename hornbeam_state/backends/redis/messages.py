"""Publish and subscribe on Redis: at most once, over connections that many subscriptions share.

A message goes to whoever is subscribed when the server gets it. What is published while a
connection is lost is lost with it; `gaps` counts how often that was.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import weakref
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Final

from hornbeam_state.backends.redis.breaker import Breaker
from hornbeam_state.backends.redis.channels import Naming
from hornbeam_state.backends.redis.errors import Interrupted, Stage, not_tried, unreachable
from hornbeam_state.backends.redis.inbox import RedisInbox
from hornbeam_state.backends.redis.reader import Reader
from hornbeam_state.backends.redis.session import Member
from hornbeam_state.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hornbeam_state.backends.base import Topics
    from hornbeam_state.backends.redis.batches import Steps
    from hornbeam_state.backends.redis.connections import SyncConnection
    from hornbeam_state.config import StoreConfig
    from hornbeam_state.errors import StoreError

_ON_A_LOOP: Final = 0.02  # seconds that closing may keep an event loop waiting


class Messages:
    """The messages of a backend. Thread-safe; the reading thread starts when it is needed.

    Args:
        config: Of the store.
        dial: Makes a connection, or raises a `StoreError`.
        database: Number of the database, which keeps its messages to itself.
    """

    def __init__(
        self, config: StoreConfig, dial: Callable[[], SyncConnection], database: int
    ) -> None:
        self._config = config
        self._dial = dial
        self._naming = Naming(database)
        self._breaker = Breaker(config.timeout)
        self._lock = threading.Lock()
        self._reader: Reader | None = None

    def publish(self, topic: bytes, payload: bytes) -> Steps[int]:
        """Hand a message to every subscription that matches; return how many there were."""
        return self._naming.publish(topic, payload)

    def subscribe(self, topics: Topics, maxsize: int) -> RedisInbox:
        """Collect messages from now on: return when the server has acknowledged.

        Raises:
            StoreUnavailable: it did not in time, or refused.
        """
        with self._begun(topics, maxsize) as (inbox, begun):
            begun.result(self._config.timeout)
        return inbox

    async def asubscribe(self, topics: Topics, maxsize: int) -> RedisInbox:
        """Awaitable twin of `subscribe`; cancelling it leaves nothing behind."""
        with self._begun(topics, maxsize) as (inbox, begun):
            async with asyncio.timeout(self._config.timeout):
                await asyncio.wrap_future(begun)
        return inbox

    def close(self) -> None:
        """End all subscriptions; wait for the server as `RedisInbox.close` does."""
        done: Future[None] = Future()
        if self._reader is not None and self._reader.drain(done):
            self._wait_briefly(done)

    async def aclose(self) -> None:
        """Awaitable twin of `close`."""
        done: Future[None] = Future()
        if self._reader is not None and self._reader.drain(done):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.timeout):
                    await asyncio.wrap_future(done)

    def after_fork(self) -> None:
        """Let go of the parent's connections; its subscriptions are not the child's."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.after_fork()

    @contextlib.contextmanager
    def _begun(self, topics: Topics, maxsize: int) -> Iterator[tuple[RedisInbox, Future[None]]]:
        """Begin a subscription, and undo it if it comes to nothing while it is waited for."""
        started = time.monotonic()
        if pause := self._breaker.wait(started):
            raise not_tried(self._config.safe_url, pause)
        member = Member(topics, self._naming.channels(topics))
        try:
            yield self._join(member, maxsize), member.begun
        except TimeoutError as error:
            self._let_go(member)
            self._breaker.failed(started, time.monotonic())
            raise self._timed_out(error) from error
        except BaseException as error:
            self._let_go(member)
            if isinstance(error.__cause__, Interrupted):  # out of reach, and not a refusal
                self._breaker.failed(started, time.monotonic())
            raise
        self._breaker.succeeded()

    def _join(self, member: Member, maxsize: int) -> RedisInbox:
        try:
            inbox = RedisInbox(maxsize, partial(self._leave, member))
            member.inbox = weakref.ref(inbox)
            weakref.finalize(inbox, self._let_go, member).atexit = False
            with self._lock:
                if self._reader is None or not self._reader.join(member):
                    reader = Reader(self._config, self._naming, self._dial)
                    reader.join(member)
                    reader.start()
                    self._reader = reader
        except (OSError, RuntimeError) as error:
            raise StoreUnavailable(f"{self._config.safe_url}: cannot subscribe: {error}") from error
        return inbox

    def _leave(self, member: Member) -> None:
        done: Future[None] = Future()
        if self._reader is not None and self._reader.leave(member, done):
            self._wait_briefly(done)

    def _let_go(self, member: Member) -> None:
        reader = self._reader
        if reader is not None:
            reader.let_go(member)

    def _wait_briefly(self, done: Future[None]) -> None:
        with contextlib.suppress(TimeoutError):
            done.result(_ON_A_LOOP if _is_on_a_loop() else self._config.timeout)

    def _timed_out(self, error: TimeoutError) -> StoreError:
        failure = Interrupted(Stage.CONNECTING, error)
        return unreachable(failure, self._config.safe_url, self._config.timeout, write=False)


def _is_on_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
