"""The store: values of any type the codec knows, shared by processes and machines."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, cast

from hornbeam_state.backends.base import COUNTER_MAX, COUNTER_MIN, Backend, Keyspace, Space
from hornbeam_state.codec import canonical, decode, encode
from hornbeam_state.config import StoreConfig
from hornbeam_state.errors import MISSING, KeyTooLong
from hornbeam_state.locks import Lock
from hornbeam_state.pubsub import Subscription, make_topics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_LONGEST_KEY: Final = 4096
_LONGEST_TTL: Final = 10**10


def open_store(url: str, **options: Any) -> Store:
    """Open a store of one's own, beside the process default.

    Args:
        url: A store URL, such as ``lmdb:///var/lib/app`` or ``redis://host:6379/0``.
        **options: ``timeout`` (seconds), ``state_size``, ``cache_size``, ``near_size`` (bytes).

    Raises:
        ConfigError: the URL or an option is wrong. The store itself is opened at first use.
    """
    return Store(StoreConfig.from_url(url, **options))


class Store:
    """Values, counters and locks under string keys, and messages on topics.

    Every operation is atomic over all threads, processes and machines that share the store, and
    may be called from any of them. An expired key is an absent key. Each method has an awaitable
    twin that starts with ``a`` and means the same.

    Keys are `str` of 1 to 4,096 bytes of UTF-8; times to live are seconds above zero, at most 10
    billion.

    Args:
        config: Where the store is.
        space: Which of the disjoint key spaces to use; an app's keys are in ``app``.
        backend: One that is open already, instead of a new one.

    Raises:
        StoreUnavailable: by any operation: the store cannot be reached, or not in time.
        StoreFull: by a writing operation: there is no room.
        CodecError: by a writing operation: the value is of an unknown type.
        TypeError, KeyTooLong: by any operation: the key is not a valid one.
    """

    def __init__(
        self, config: StoreConfig, *, space: Space = "app", backend: Backend | None = None
    ) -> None:
        self.config = config
        self.backend = backend if backend is not None else make_backend(config)
        self._space: Space = space
        self._prefix = space.encode() + b":"  # of locks and topics
        self._keyspace: Keyspace = self.backend.keyspace(space)

    def space(self, space: Space) -> Store:
        """Return a store over another key space through the same connection."""
        return Store(self.config, space=space, backend=self.backend)

    def check(self) -> None:
        """Connect, if not done yet, and raise what stands in the way."""
        self.backend.check()

    async def acheck(self) -> None:
        """Awaitable twin of `check`; in a thread, since it may take long."""
        await asyncio.to_thread(self.backend.check)

    def close(self) -> None:
        """Release connections and files; a later call opens them again."""
        self.backend.close()

    async def aclose(self) -> None:
        """Awaitable twin of `close`."""
        await self.backend.aclose()

    # Values.

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value exactly as it was set (type, dtype, shape), or the default."""
        data = self._keyspace.get(_key(key))
        return default if data is None else decode(data)

    async def aget(self, key: str, default: Any = None) -> Any:
        """Awaitable twin of `get`."""
        data = await self._keyspace.aget(_key(key))
        return default if data is None else decode(data)

    def set(self, key: str, value: Any, *, ttl: float | None = None) -> None:
        """Store a value and replace the expiry: without `ttl` it never expires."""
        self._keyspace.put(_key(key), encode(value), check_ttl(ttl))

    async def aset(self, key: str, value: Any, *, ttl: float | None = None) -> None:
        """Awaitable twin of `set`."""
        await self._keyspace.aput(_key(key), encode(value), check_ttl(ttl))

    def add(self, key: str, value: Any, *, ttl: float | None = None) -> bool:
        """Store a value only if the key is absent; return whether it was."""
        return self._keyspace.add(_key(key), encode(value), check_ttl(ttl))

    async def aadd(self, key: str, value: Any, *, ttl: float | None = None) -> bool:
        """Awaitable twin of `add`."""
        return await self._keyspace.aadd(_key(key), encode(value), check_ttl(ttl))

    def cas(self, key: str, expected: Any, value: Any, *, ttl: float | None = None) -> bool:
        """Compare and set: store `value` if the key now holds `expected`.

        Values are compared by their canonical bytes: ``1``, ``1.0`` and ``True`` differ, the
        order of a dict or set does not matter. `MISSING` as `expected` means "absent".

        Returns:
            Whether the value was stored.
        """
        if expected is MISSING:
            return self.add(key, value, ttl=ttl)
        name, data, seconds = _key(key), encode(value), check_ttl(ttl)
        seen = encode(expected)
        while not self._keyspace.cas(name, seen, data, seconds):
            # The present bytes may differ and still mean the same, as dicts in another order do.
            present = self._keyspace.get(name)
            if present is None or not _same(present, expected):
                return False
            seen = present
        return True

    async def acas(self, key: str, expected: Any, value: Any, *, ttl: float | None = None) -> bool:
        """Awaitable twin of `cas`."""
        if expected is MISSING:
            return await self.aadd(key, value, ttl=ttl)
        name, data, seconds = _key(key), encode(value), check_ttl(ttl)
        seen = encode(expected)
        while not await self._keyspace.acas(name, seen, data, seconds):
            present = await self._keyspace.aget(name)
            if present is None or not _same(present, expected):
                return False
            seen = present
        return True

    def update(
        self,
        key: str,
        fn: Callable[[Any], Any],
        default: Any = None,
        *,
        ttl: float | None = None,
    ) -> Any:
        """Replace the value by ``fn(value)``, as often as it takes for nobody to come between.

        Args:
            key: The key.
            fn: Pure function of the old value (`default` when absent); it may run several times.
            default: Its argument when the key is absent.
            ttl: Replaces the expiry.

        Returns:
            The new value.
        """
        name, seconds = _key(key), check_ttl(ttl)
        while True:
            old = self._keyspace.get(name)
            new = fn(default if old is None else decode(old))
            if self._keyspace.cas(name, old, encode(new), seconds):
                return new

    async def aupdate(
        self,
        key: str,
        fn: Callable[[Any], Any],
        default: Any = None,
        *,
        ttl: float | None = None,
    ) -> Any:
        """Awaitable twin of `update`; `fn` is a plain function."""
        name, seconds = _key(key), check_ttl(ttl)
        while True:
            old = await self._keyspace.aget(name)
            new = fn(default if old is None else decode(old))
            if await self._keyspace.acas(name, old, encode(new), seconds):
                return new

    def delete(self, key: str) -> bool:
        """Remove a key; return whether it was there."""
        return self._keyspace.delete(_key(key))

    async def adelete(self, key: str) -> bool:
        """Awaitable twin of `delete`."""
        return await self._keyspace.adelete(_key(key))

    # Counters.

    def incr(self, key: str, delta: int = 1, *, ttl: float | None = None) -> int:
        """Add to a counter and return the new value; an absent key counts as 0.

        `ttl` applies only when this call creates the key, so that a rate limit's window closes.

        Raises:
            WrongType: the key holds something other than a 64-bit integer.
            CounterOverflow: the sum would leave 64 bits; the counter was not changed.
        """
        return self._keyspace.incr(_key(key), _delta(delta), check_ttl(ttl))

    async def aincr(self, key: str, delta: int = 1, *, ttl: float | None = None) -> int:
        """Awaitable twin of `incr`."""
        return await self._keyspace.aincr(_key(key), _delta(delta), check_ttl(ttl))

    def decr(self, key: str, delta: int = 1, *, ttl: float | None = None) -> int:
        """Subtract from a counter; see `incr`."""
        return self.incr(key, -_delta(delta), ttl=ttl)

    async def adecr(self, key: str, delta: int = 1, *, ttl: float | None = None) -> int:
        """Awaitable twin of `decr`."""
        return await self.aincr(key, -_delta(delta), ttl=ttl)

    # Many keys.

    def get_multi(self, keys: Iterable[str]) -> dict[str, Any]:
        """Return every asked key with its value, a missing one with None."""
        asked = list(keys)
        return _decoded(asked, self._keyspace.get_many([_key(key) for key in asked]))

    async def aget_multi(self, keys: Iterable[str]) -> dict[str, Any]:
        """Awaitable twin of `get_multi`."""
        asked = list(keys)
        return _decoded(asked, await self._keyspace.aget_many([_key(key) for key in asked]))

    def set_multi(self, mapping: Mapping[str, Any], *, ttl: float | None = None) -> None:
        """Store all values of a mapping; see `set`."""
        self._keyspace.put_many(_encoded(mapping), check_ttl(ttl))

    async def aset_multi(self, mapping: Mapping[str, Any], *, ttl: float | None = None) -> None:
        """Awaitable twin of `set_multi`."""
        await self._keyspace.aput_many(_encoded(mapping), check_ttl(ttl))

    def keys(self, prefix: str = "") -> list[str]:
        """Return the keys that start with the prefix, sorted."""
        return sorted(key.decode() for key in self._keyspace.keys(_prefix(prefix)))

    async def akeys(self, prefix: str = "") -> list[str]:
        """Awaitable twin of `keys`."""
        return sorted(key.decode() for key in await self._keyspace.akeys(_prefix(prefix)))

    def ttl(self, key: str) -> float | None:
        """Return the seconds a key has left, None when it does not expire.

        Raises:
            KeyError: no such key.
        """
        return self._keyspace.ttl(_key(key))

    async def attl(self, key: str) -> float | None:
        """Awaitable twin of `ttl`."""
        return await self._keyspace.attl(_key(key))

    def clear(self, prefix: str = "") -> int:
        """Remove the keys that start with the prefix; return how many there were."""
        return self._keyspace.clear(_prefix(prefix))

    async def aclear(self, prefix: str = "") -> int:
        """Awaitable twin of `clear`."""
        return await self._keyspace.aclear(_prefix(prefix))

    def lock(self, name: str, *, ttl: float = 30.0, timeout: float | None = None) -> Lock:
        """Return a lock to use in a `with` or `async with` statement; see `Lock`."""
        return Lock(self.backend, self._prefix + _key(name), ttl=ttl, timeout=timeout)

    # Messages.

    def publish(self, topic: str, message: Any) -> int:
        """Hand a message to everyone who is subscribed to the topic, in any process.

        Args:
            topic: As a key: 1 to 4,096 bytes of UTF-8.
            message: A value of any type the codec knows.

        Returns:
            The number of subscriptions it was handed to.
        """
        return self.backend.publish(self._prefix + _key(topic), encode(message))

    async def apublish(self, topic: str, message: Any) -> int:
        """Awaitable twin of `publish`."""
        return await self.backend.apublish(self._prefix + _key(topic), encode(message))

    def subscribe(self, *topics: str, maxsize: int = 1000) -> Subscription:
        """Receive what is published on the topics from now on; see `Subscription`.

        Args:
            *topics: One or more; one that ends in ``*`` stands for all that begin with the rest.
            maxsize: How many messages may wait before the oldest are dropped.
        """
        return self.asubscribe(*topics, maxsize=maxsize).open()

    def asubscribe(self, *topics: str, maxsize: int = 1000) -> Subscription:
        """Return a subscription that begins when it is awaited, entered or iterated over."""
        if not topics:
            raise TypeError("subscribe to one topic at least")
        if isinstance(maxsize, bool) or not isinstance(maxsize, int):
            raise TypeError(f"maxsize is an int, not {type(maxsize).__qualname__}")
        if maxsize < 1:
            raise ValueError(f"maxsize={maxsize}: give 1 or more")
        asked = make_topics(self._prefix, map(_key, topics))
        return Subscription(self.backend, self._prefix, asked, maxsize)


def make_backend(config: StoreConfig) -> Backend:
    """Return the backend for a store, not connected yet; its driver is imported here."""
    if config.scheme in ("lmdb", "memory"):
        from hornbeam_state.backends.embedded.backend import EmbeddedBackend

        return EmbeddedBackend(config)
    from hornbeam_state.backends.redis.backend import RedisBackend

    return cast("Backend", RedisBackend(config))


def _key(key: str) -> bytes:
    try:
        name = str.encode(key)
    except TypeError:
        raise TypeError(f"a key is a str, not {type(key).__qualname__}") from None
    except UnicodeEncodeError:
        raise ValueError("a key cannot be encoded as UTF-8: it holds a lone surrogate") from None
    if not 0 < len(name) <= _LONGEST_KEY:
        if not name:
            raise ValueError("a key is not empty")
        raise KeyTooLong(f"a key has at most {_LONGEST_KEY} bytes of UTF-8, this one {len(name)}")
    return name


def _prefix(prefix: str) -> bytes:
    if not isinstance(prefix, str):
        raise TypeError(f"a prefix is a str, not {type(prefix).__qualname__}")
    return _key(prefix) if prefix else b""


def check_ttl(ttl: float | None) -> float | None:
    """Return a time to live in seconds, or None.

    Raises:
        TypeError, ValueError: it is not a number above zero, or too large.
    """
    if ttl is None:
        return None
    if isinstance(ttl, bool) or not isinstance(ttl, int | float):
        raise TypeError(f"ttl is a number of seconds or None, not {type(ttl).__qualname__}")
    if ttl > _LONGEST_TTL:  # not shown: it may be an int that is too long to print
        raise ValueError(
            f"ttl is beyond {_LONGEST_TTL:,} seconds (317 years), the longest that Redis takes: "
            f"give less, or None for no expiry"
        )
    if not ttl > 0:
        raise ValueError(f"ttl={ttl}: give seconds above 0, or None for no expiry")
    return ttl


def _delta(delta: int) -> int:
    if isinstance(delta, bool) or not isinstance(delta, int):
        raise TypeError(f"delta is an int, not {type(delta).__qualname__}")
    if not COUNTER_MIN < delta <= COUNTER_MAX:
        raise ValueError("delta does not fit into 64 bits")
    return delta


def _same(present: bytes, expected: Any) -> bool:
    return bool(canonical(decode(present)) == canonical(expected))


def _decoded(keys: list[str], values: list[bytes | None]) -> dict[str, Any]:
    return {
        key: None if data is None else decode(data) for key, data in zip(keys, values, strict=True)
    }


def _encoded(mapping: Mapping[str, Any]) -> dict[bytes, bytes]:
    return {_key(key): encode(value) for key, value in mapping.items()}
