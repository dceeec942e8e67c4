"""The store on Redis or Valkey, for any number of machines.

How it is laid out there: `steps`. Which server is asked, and what happens when it does not
answer: `routes`.
"""

from __future__ import annotations

import os
import re
import time
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from redis.exceptions import NoPermissionError, ResponseError

from hornbeam_state.backends.base import SPACES, Space
from hornbeam_state.backends.directory import runtime_directory
from hornbeam_state.backends.redis.alink import AsyncLink
from hornbeam_state.backends.redis.batches import Batch, Command, OnEachPrimary, Steps
from hornbeam_state.backends.redis.cluster import ClusterRoutes
from hornbeam_state.backends.redis.connections import Connector
from hornbeam_state.backends.redis.errors import may_have_happened
from hornbeam_state.backends.redis.keyspace import RedisKeyspace
from hornbeam_state.backends.redis.link import Link
from hornbeam_state.backends.redis.locks import Keeper, Lease, upkeep
from hornbeam_state.backends.redis.messages import Messages
from hornbeam_state.backends.redis.near import NearKeyspace, NearSteps
from hornbeam_state.backends.redis.near_cache import NearCache
from hornbeam_state.backends.redis.routes import Routes
from hornbeam_state.backends.redis.sentinel import SentinelRoutes
from hornbeam_state.backends.redis.steps import space_steps
from hornbeam_state.backends.redis.tracking import Tracker
from hornbeam_state.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from hornbeam_state.backends.base import Topics
    from hornbeam_state.backends.redis.inbox import RedisInbox
    from hornbeam_state.config import StoreConfig

_OLDEST: Final = {"redis": (6, 2), "valkey": (7, 2)}


class RedisBackend:
    """A `Backend` on Redis (6.2 or newer) or Valkey (7.2 or newer).

    One server, one with replicas behind Sentinel, or a Cluster; see `routes`.

    Connects at first use. May be used from any thread, from any event loop and, after a fork,
    from the child. A call takes no longer than ``config.timeout`` to fail; a read whose connection
    breaks is asked once more, a write only when the server cannot have acted on it. After three
    failures in a row calls fail at once for a moment, until the server answers again.

    Args:
        config: Where the server is, or the servers are; the scheme is one of `REDIS_SCHEMES`.

    Raises:
        ConfigError: the URL has an option that is not known.
    """

    def __init__(self, config: StoreConfig) -> None:
        self._config = config
        connector = Connector(config)
        self._database = connector.database
        self._is_cluster = config.scheme.endswith("+cluster")
        self._routes = _routes(config, connector)
        self._link = Link(self._routes, connector)
        self._alink = AsyncLink(self._routes, connector)
        self._near = NearCache(config.near_size)
        self._tracker = Tracker(self._link, self._near, config.timeout, self._routes.where)
        self._spaces = {space: self._make_keyspace(space) for space in SPACES}
        self._keeper = Keeper(self._maintain)
        self._messages = self._new_messages()
        after_fork = partial(_call_if_alive, weakref.WeakMethod(self._after_fork))
        os.register_at_fork(after_in_child=after_fork)

    @property
    def directory(self) -> Path:
        """A directory of this machine, private to this user, for files that go with the store.

        Raises:
            StoreUnavailable: it cannot be made, or belongs to someone else.
        """
        return runtime_directory(self._config)

    @property
    def config(self) -> StoreConfig:
        """Where the servers are."""
        return self._config

    @property
    def link(self) -> Link:
        """Its blocking connections, for what else is kept on the same servers."""
        return self._link

    @property
    def alink(self) -> AsyncLink:
        """Its asyncio connections, likewise."""
        return self._alink

    def keyspace(self, space: Space) -> RedisKeyspace:
        """Return the key space; always the same object for the same name."""
        return self._spaces[space]

    def check(self) -> None:
        """Connect, if not done yet.

        Raises:
            StoreUnavailable: the server cannot be reached, is too old, or is not one that can be
                written to; the message says what to do.
        """
        self._link.run(_check(cluster=self._is_cluster))

    def try_lock(self, name: bytes, ttl: float) -> RedisLock | None:
        """Take the lock if it is free, without waiting; None when someone else holds it."""
        lease = Lease.of(name, ttl, time.monotonic())
        try:
            taken = self._link.run(lease.acquire())
        except BaseException as error:
            self._settle(lease, error)
            raise
        return self._held(lease) if taken else None

    async def atry_lock(self, name: bytes, ttl: float) -> RedisLock | None:
        """Awaitable twin of `try_lock`."""
        lease = Lease.of(name, ttl, time.monotonic())
        try:
            taken = await self._alink.run(lease.acquire())
        except BaseException as error:
            self._settle(lease, error)
            raise
        return self._held(lease) if taken else None

    def publish(self, topic: bytes, payload: bytes) -> int:
        """Hand a message to every subscription that matches; return how many there were.

        Raises:
            StoreUnavailable: the message says whether it may have been published nevertheless.
        """
        return self._link.run(self._messages.publish(topic, payload))

    async def apublish(self, topic: bytes, payload: bytes) -> int:
        """Awaitable twin of `publish`."""
        return await self._alink.run(self._messages.publish(topic, payload))

    def subscribe(self, topics: Topics, maxsize: int) -> RedisInbox:
        """Collect from now on the messages on these topics, at most `maxsize` at a time.

        One is delivered once at most: what is published while the connection is lost is lost.
        """
        return self._messages.subscribe(topics, maxsize)

    async def asubscribe(self, topics: Topics, maxsize: int) -> RedisInbox:
        """Awaitable twin of `subscribe`."""
        return await self._messages.asubscribe(topics, maxsize)

    def close(self) -> None:
        """Release connections and end subscriptions; a later call opens connections again.

        Held locks stay held.
        """
        self._messages.close()
        self._keeper.rest()
        self._tracker.close()
        self._link.close()
        self._alink.close()

    async def aclose(self) -> None:
        """Awaitable twin of `close`."""
        await self._messages.aclose()
        self._keeper.rest()
        self._tracker.stop()
        self._link.close()
        await self._alink.aclose()

    def _make_keyspace(self, space: Space) -> RedisKeyspace:
        if space == "cache" and self._config.near_size:
            near = NearSteps(self._near, self._tracker.start, cluster=self._is_cluster)
            keyspace = NearKeyspace(near, self._near, self._link, self._alink)
            # The thread knows nothing of who reads: without readers there is nothing to hear for.
            weakref.finalize(keyspace, self._tracker.stop)
            return keyspace
        steps = space_steps(space, cluster=self._is_cluster)
        return RedisKeyspace(steps, self._link, self._alink)

    def _held(self, lease: Lease) -> RedisLock:
        self._keeper.keep(lease)
        return RedisLock(self, lease)

    def _settle(self, lease: Lease, error: BaseException) -> None:
        """See to it that a lock whose caller got an error instead of an answer becomes free."""
        if may_have_happened(error):
            self._keeper.abandon(lease)

    def _new_messages(self) -> Messages:
        return Messages(self._config, self._link.dial, self._database)

    def _maintain(self, leases: Sequence[Lease]) -> list[Any]:
        return self._link.run(upkeep(leases))

    def _after_fork(self) -> None:
        self._routes.after_fork()
        self._link.after_fork()
        self._alink.after_fork()
        self._tracker.after_fork()
        # The parent's locks are the parent's: a new keeper knows none of them.
        self._keeper = Keeper(self._maintain)
        self._messages.after_fork()
        self._messages = self._new_messages()


class RedisLock:
    """A lock that was acquired; renewed until it is released, or until its process dies."""

    def __init__(self, backend: RedisBackend, lease: Lease) -> None:
        self._backend = backend
        self._lease = lease

    def release(self) -> bool:
        """Free the lock; return whether it was still held until now. Idempotent.

        In a child of the process that acquired it, it does nothing and returns False.

        Raises:
            StoreUnavailable: the server did not answer; the lock becomes free by itself.
        """
        backend, lease = self._backend, self._lease
        if not backend._keeper.drop(lease):  # noqa: SLF001 - the lock is a part of its backend
            return False
        try:
            return backend._link.run(lease.release())  # noqa: SLF001
        except BaseException as error:
            backend._settle(lease, error)  # noqa: SLF001
            raise

    async def arelease(self) -> bool:
        """Awaitable twin of `release`."""
        backend, lease = self._backend, self._lease
        if not backend._keeper.drop(lease):  # noqa: SLF001
            return False
        try:
            return await backend._alink.run(lease.release())  # noqa: SLF001
        except BaseException as error:
            backend._settle(lease, error)  # noqa: SLF001
            raise


def _call_if_alive(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    """Call a method of a backend that nobody may use any more."""
    if (call := method()) is not None:
        call()


def _routes(config: StoreConfig, connector: Connector) -> Routes:
    if config.scheme.endswith("+sentinel"):
        return SentinelRoutes(config)
    if config.scheme.endswith("+cluster"):
        return ClusterRoutes(config)
    return Routes(config, connector.address)


def _check(*, cluster: bool) -> Steps[None]:
    yield OnEachPrimary(lambda where: _check_primary(where, cluster=cluster))


def _check_primary(where: str, *, cluster: bool) -> Steps[None]:
    """Refuse a server that the scripts would not work on."""
    # HELLO and not INFO: the latter is closed to ordinary users on many servers.
    commands = (Command((b"PING",)), Command((b"HELLO",)))
    pong, hello = yield Batch(commands, repeatable=True, whole=False)
    if isinstance(pong, Exception):
        raise pong
    if isinstance(hello, NoPermissionError):
        return
    if isinstance(hello, ResponseError):
        raise StoreUnavailable(f"{where} is older than Redis 6.2: use Redis 6.2 or Valkey 7.2")
    told = dict(zip(hello[::2], hello[1::2], strict=True))
    server, version = (told.get(name, b"").decode() for name in (b"server", b"version"))
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < _OLDEST.get(server, (0,)):
        raise StoreUnavailable(f"{where} is {server} {version}: use Redis 6.2 or Valkey 7.2")
    if told.get(b"mode") == b"cluster" and not cluster:
        raise StoreUnavailable(
            f"{where} is a node of a Cluster: use redis+cluster:// in the store URL"
        )
    if told.get(b"role") in (b"replica", b"slave"):
        raise StoreUnavailable(f"{where} is a replica: give the address of the primary")
