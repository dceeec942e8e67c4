"""The cache's key space with a part of it near: reads that need no server.

`NearSteps` decides, in the steps that a blocking and an asyncio connection both carry out;
`NearKeyspace` adds a short way for what is found near. Who hears of others' writes:
`tracking`.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, TypeVar

from hornbeam_state.backends.redis.batches import Command, Steps, ask
from hornbeam_state.backends.redis.keyspace import RedisKeyspace
from hornbeam_state.backends.redis.steps import NO_EXPIRY, CacheSteps, bucket_of, by_bucket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from hornbeam_state.backends.redis.alink import AsyncLink
    from hornbeam_state.backends.redis.link import Link
    from hornbeam_state.backends.redis.near_cache import NearCache

T = TypeVar("T")


class NearSteps(CacheSteps):
    """The operations of the cache; what is read is kept near, what is written no longer is.

    Args:
        near: What is kept.
        listen: Called before a read that cannot be kept because nobody listens for changes.
        cluster: Whether the buckets may be on different servers.
    """

    def __init__(
        self, near: NearCache, listen: Callable[[], None], *, cluster: bool = False
    ) -> None:
        super().__init__(b"c", cluster=cluster)
        self._near = near
        self._listen = listen

    def get(self, key: bytes) -> Steps[bytes | None]:
        """Ask the server for a value."""
        return (yield from self._fetch([key]))[key]

    def get_many(self, keys: Sequence[bytes]) -> Steps[list[bytes | None]]:
        """Take what is near, and ask the server for the others."""
        now = time.monotonic()
        found = {key: self._near.get(key, now) for key in keys}
        missing = [key for key, value in found.items() if value is None]
        if missing:
            found.update((yield from self._fetch(missing)))
        return [found[key] for key in keys]

    def put(self, key: bytes, value: bytes, ttl: float | None) -> Steps[None]:
        """Write a value."""
        yield from self._writing([key], super().put(key, value, ttl))

    def put_many(self, items: Mapping[bytes, bytes], ttl: float | None) -> Steps[None]:
        """Write values in one transaction."""
        yield from self._writing(items, super().put_many(items, ttl))

    def cas(
        self, key: bytes, expected: bytes | None, value: bytes, ttl: float | None
    ) -> Steps[bool]:
        """Write a value if the present one is the expected one; if not, see that one next."""
        return (yield from self._writing([key], super().cas(key, expected, value, ttl)))

    def incr(self, key: bytes, delta: int, ttl: float | None) -> Steps[int]:
        """Add to a counter."""
        return (yield from self._writing([key], super().incr(key, delta, ttl)))

    def delete(self, key: bytes) -> Steps[bool]:
        """Remove a value."""
        return (yield from self._writing([key], super().delete(key)))

    def clear(self, prefix: bytes) -> Steps[int]:
        """Remove keys by walking the whole database: an operator's action."""
        try:
            return (yield from super().clear(prefix))
        finally:
            self._near.flush()

    def _writing(self, keys: Iterable[bytes], steps: Steps[T]) -> Steps[T]:
        """Have this process see its own write from its end on, whatever the end was.

        What readers are told while it goes on counts for nothing after it either.
        """
        try:
            return (yield from steps)
        finally:
            self._near.forget(keys)

    def _fetch(self, keys: Sequence[bytes]) -> Steps[dict[bytes, bytes | None]]:
        if not self._near.enabled:
            self._listen()
            values = yield from super().get_many(keys)
            self._near.forget(keys)  # an answer that is on its way may be an earlier one
            return dict(zip(keys, values, strict=True))
        asked = time.monotonic()
        tokens = [self._near.token(key) for key in keys]
        found = yield from self._get_with_ttl(keys)
        told = zip(keys, tokens, strict=True)
        self._near.keep_all(
            [(key, found[key][0], token, found[key][1]) for key, token in told], asked
        )
        return {key: value for key, (value, _) in found.items()}

    def _get_with_ttl(
        self, keys: Sequence[bytes]
    ) -> Steps[dict[bytes, tuple[bytes | None, float | None]]]:
        """Read values, and how many seconds each has left, together."""
        groups = list(by_bucket(keys).items()) if self._cluster else [(None, list(keys))]
        gets = [Command((b"MGET", *map(self._value, group)), bucket) for bucket, group in groups]
        asked = [key for _, group in groups for key in group]
        lefts = [Command((b"PTTL", self._value(key)), bucket_of(key)) for key in asked]
        replies = yield from ask(*gets, *lefts, repeatable=True)
        values = itertools.chain.from_iterable(replies[: len(gets)])
        # A value that expired after it was read has less than no time left.
        return {
            key: (value, None if left == NO_EXPIRY else left / 1000)
            for key, value, left in zip(asked, values, replies[len(gets) :], strict=True)
        }


class NearKeyspace(RedisKeyspace):
    """The cache's keys and values, those that were read lately from the memory of this process.

    What another process writes is seen as soon as the server's word of it arrives, and after
    `near_cache.LONGEST` seconds at the latest. What this process writes is seen at once, and
    nobody in it sees an earlier value after a later one. `get_many` takes what it finds near, so
    its values are not of one moment.
    """

    def __init__(self, steps: NearSteps, near: NearCache, link: Link, alink: AsyncLink) -> None:
        super().__init__(steps, link, alink)
        self._near = near

    def get(self, key: bytes) -> bytes | None:
        """Return the value, or None when the key is absent."""
        value = self._near.get(key, time.monotonic())
        return self._run(self._steps.get(key)) if value is None else value

    async def aget(self, key: bytes) -> bytes | None:
        """Awaitable twin of `get`."""
        value = self._near.get(key, time.monotonic())
        return await self._arun(self._steps.get(key)) if value is None else value
