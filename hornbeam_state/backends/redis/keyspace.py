"""A key space of the Redis backend: the steps of each operation, over both kinds of connection."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hornbeam_state.backends.base import Usage
    from hornbeam_state.backends.redis.alink import AsyncLink
    from hornbeam_state.backends.redis.link import Link
    from hornbeam_state.backends.redis.steps import CacheSteps, IndexedSteps


class RedisKeyspace:
    """The keys and values of one `Space`; see `Keyspace` for each method.

    `get_many` reads all values from one moment, and `put_many` writes all or none; on a Cluster
    this holds for the keys of each bucket.
    """

    def __init__(self, steps: IndexedSteps | CacheSteps, link: Link, alink: AsyncLink) -> None:
        self._steps = steps
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
