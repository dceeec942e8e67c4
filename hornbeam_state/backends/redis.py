"""The store on Redis or Valkey, for any number of machines.

How it is laid out there: `redis_steps`. Which server is asked, and what happens when it does not
answer: `redis_routes`.
"""

from __future__ import annotations

import os
import re
import time
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from redis.exceptions import NoPermissionError, ResponseError

from hornbeam_state.backends.base import SPACES, Space, Usage
from hornbeam_state.backends.directory import runtime_directory
from hornbeam_state.backends.redis_alink import AsyncLink
from hornbeam_state.backends.redis_batches import Batch, Command, OnEachPrimary, Steps
from hornbeam_state.backends.redis_cluster import ClusterRoutes
from hornbeam_state.backends.redis_connections import Connector
from hornbeam_state.backends.redis_errors import may_have_happened
from hornbeam_state.backends.redis_link import Link
from hornbeam_state.backends.redis_locks import Keeper, Lease, upkeep
from hornbeam_state.backends.redis_routes import Routes
from hornbeam_state.backends.redis_sentinel import SentinelRoutes
from hornbeam_state.backends.redis_steps import space_steps
from hornbeam_state.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from hornbeam_state.config import StoreConfig

_OLDEST: Final = {"redis": (6, 2), "valkey": (7, 2)}


class RedisBackend:
    """A `Backend` on Redis (6.2 or newer) or Valkey (7.2 or newer).

    One server, one with replicas behind Sentinel, or a Cluster; see `redis_routes`.

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
        self._is_cluster = config.scheme.endswith("+cluster")
        self._routes = _routes(config, connector)
        self._link = Link(self._routes, connector)
        self._alink = AsyncLink(self._routes, connector)
        self._spaces = {
            space: RedisKeyspace(space, self._link, self._alink, cluster=self._is_cluster)
            for space in SPACES
        }
        self._keeper = Keeper(self._maintain)
        after_fork = partial(_call_if_alive, weakref.WeakMethod(self._after_fork))
        os.register_at_fork(after_in_child=after_fork)

    @property
    def directory(self) -> Path:
        """A directory of this machine, private to this user, for files that go with the store.

        Raises:
            StoreUnavailable: it cannot be made, or belongs to someone else.
        """
        return runtime_directory(self._config)

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

    def close(self) -> None:
        """Release connections; a later call opens them again. Held locks stay held."""
        self._keeper.rest()
        self._link.close()
        self._alink.close()

    async def aclose(self) -> None:
        """Awaitable twin of `close`."""
        self._keeper.rest()
        self._link.close()
        await self._alink.aclose()

    def _held(self, lease: Lease) -> RedisLock:
        self._keeper.keep(lease)
        return RedisLock(self, lease)

    def _settle(self, lease: Lease, error: BaseException) -> None:
        """See to it that a lock whose caller got an error instead of an answer becomes free."""
        if may_have_happened(error):
            self._keeper.abandon(lease)

    def _maintain(self, leases: Sequence[Lease]) -> list[Any]:
        return self._link.run(upkeep(leases))

    def _after_fork(self) -> None:
        self._routes.after_fork()
        self._link.after_fork()
        self._alink.after_fork()
        # The parent's locks are the parent's: a new keeper knows none of them.
        self._keeper = Keeper(self._maintain)


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


class RedisKeyspace:
    """The keys and values of one `Space`; see `Keyspace` for each method.

    `get_many` reads all values from one moment, and `put_many` writes all or none; on a Cluster
    this holds for the keys of each bucket.
    """

    def __init__(self, space: Space, link: Link, alink: AsyncLink, *, cluster: bool) -> None:
        self._steps = space_steps(space, cluster=cluster)
        self._run = link.run
        self._arun = alink.run

    def get(self, key: bytes) -> bytes | None:
        """Return the value, or None when the key is absent."""
        return self._run(self._steps.get(key))

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the value of each key in order."""
        return self._run(self._steps.get_many(keys))

    def put(self, key: bytes, value: bytes, ttl: float | None = None) -> None:
        """Store the value and replace the expiry."""
        self._run(self._steps.put(key, value, ttl))

    def put_many(self, items: Mapping[bytes, bytes], ttl: float | None = None) -> None:
        """Store all items and replace their expiry."""
        self._run(self._steps.put_many(items, ttl))

    def add(self, key: bytes, value: bytes, ttl: float | None = None) -> bool:
        """Store the value only if the key is absent; return whether it was stored."""
        return self._run(self._steps.add(key, value, ttl))

    def cas(
        self, key: bytes, expected: bytes | None, value: bytes, ttl: float | None = None
    ) -> bool:
        """Store the value only if the present one equals `expected` (None: the key is absent)."""
        return self._run(self._steps.cas(key, expected, value, ttl))

    def incr(self, key: bytes, delta: int, ttl: float | None = None) -> int:
        """Add `delta` to a counter and return the sum; an absent key counts as 0."""
        return self._run(self._steps.incr(key, delta, ttl))

    def delete(self, key: bytes) -> bool:
        """Remove the key; return whether it was there."""
        return self._run(self._steps.delete(key))

    def keys(self, prefix: bytes = b"") -> list[bytes]:
        """Return the keys that start with `prefix`, sorted by their bytes."""
        return self._run(self._steps.keys(prefix))

    def ttl(self, key: bytes) -> float | None:
        """Return the seconds left, None when the key does not expire."""
        return self._run(self._steps.ttl(key))

    def clear(self, prefix: bytes = b"") -> int:
        """Remove the keys that start with `prefix`; return how many there were."""
        return self._run(self._steps.clear(prefix))

    def usage(self, prefix: bytes = b"") -> Usage:
        """Return what the keys that start with `prefix` take."""
        return self._run(self._steps.usage(prefix))

    async def aget(self, key: bytes) -> bytes | None:
        """Awaitable twin of `get`; the others follow in the same way."""
        return await self._arun(self._steps.get(key))

    async def aget_many(self, keys: Sequence[bytes]) -> list[bytes | None]:  # noqa: D102
        return await self._arun(self._steps.get_many(keys))

    async def aput(self, key: bytes, value: bytes, ttl: float | None = None) -> None:  # noqa: D102
        await self._arun(self._steps.put(key, value, ttl))

    async def aput_many(self, items: Mapping[bytes, bytes], ttl: float | None = None) -> None:  # noqa: D102
        await self._arun(self._steps.put_many(items, ttl))

    async def aadd(self, key: bytes, value: bytes, ttl: float | None = None) -> bool:  # noqa: D102
        return await self._arun(self._steps.add(key, value, ttl))

    async def acas(  # noqa: D102
        self, key: bytes, expected: bytes | None, value: bytes, ttl: float | None = None
    ) -> bool:
        return await self._arun(self._steps.cas(key, expected, value, ttl))

    async def aincr(self, key: bytes, delta: int, ttl: float | None = None) -> int:  # noqa: D102
        return await self._arun(self._steps.incr(key, delta, ttl))

    async def adelete(self, key: bytes) -> bool:  # noqa: D102
        return await self._arun(self._steps.delete(key))

    async def akeys(self, prefix: bytes = b"") -> list[bytes]:  # noqa: D102
        return await self._arun(self._steps.keys(prefix))

    async def attl(self, key: bytes) -> float | None:  # noqa: D102
        return await self._arun(self._steps.ttl(key))

    async def aclear(self, prefix: bytes = b"") -> int:  # noqa: D102
        return await self._arun(self._steps.clear(prefix))

    async def ausage(self, prefix: bytes = b"") -> Usage:  # noqa: D102
        return await self._arun(self._steps.usage(prefix))


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
