"""What each operation asks of Redis and how it reads the replies. No sockets here.

Every key lives in one of `BUCKETS` hash slots, chosen by the CRC-32 of the key. The number is
fixed for good: with another one, nothing that is stored already would be found. ``b17`` is the
bucket; the letter is ``a`` (app), ``s`` (sys), ``c`` (cache) or ``l`` (locks)::

    hb:{b17}:a:<key>   a value; a counter is the plain decimal that INCRBY works on
    hb:{b17}:ai        sorted set, all scores 0: the keys of the bucket, for listing by prefix
    hb:{b17}:ae        sorted set: the keys that expire, by when (ms), for trimming the other set
    hb:{b17}:l:<name>  the token of a lock's owner

The cache is not indexed. Its entries always carry an expiry, if a far one, so that under a
``volatile-*`` eviction policy the server makes room there and never touches the app's own keys.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final, TypeVar
from zlib import crc32

from hornbeam_state.backends.base import COUNTER_MAX, Space, Usage
from hornbeam_state.backends.redis import scripts
from hornbeam_state.backends.redis.batches import (
    Command,
    OnEachPrimary,
    Steps,
    ask,
    ask_all_or_none,
    call,
)
from hornbeam_state.errors import CounterOverflow, WrongType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from hornbeam_state.backends.redis.scripts import Script

T = TypeVar("T")

BUCKETS: Final = 64
_PAGE: Final = b"1000"
_FOREVER_MS: Final = 10**14
_LONGEST_TTL_MS: Final = 10**13  # 317 years; Redis refuses times far beyond
_NO_KEY: Final = -2
NO_EXPIRY: Final = -1


def milliseconds(ttl: float) -> int:
    """Return a time to live as Redis takes it: whole milliseconds, 1 at least."""
    return min(max(1, math.ceil(ttl * 1000)), _LONGEST_TTL_MS)


def bucket_of(key: bytes) -> int:
    """Return the bucket that a key lives in."""
    return crc32(key) % BUCKETS


def _bucket_in(name: bytes) -> int:
    """Return the bucket in the name of a Redis key."""
    return int(name[5:7])


def _grouped(
    names: Iterable[bytes], bucket: Callable[[bytes], int]
) -> defaultdict[int, list[bytes]]:
    grouped: defaultdict[int, list[bytes]] = defaultdict(list)
    for name in names:
        grouped[bucket(name)].append(name)
    return grouped


def by_bucket(keys: Iterable[bytes]) -> defaultdict[int, list[bytes]]:
    """Return keys by the bucket that they live in."""
    return _grouped(keys, bucket_of)


def literally(text: bytes) -> bytes:
    """Return the glob pattern that matches `text` and nothing else."""
    return re.sub(rb"([\\*?\[\]])", rb"\\\1", text)


def names(suffix: bytes) -> tuple[bytes, ...]:
    """Return a name for each bucket."""
    return tuple(b"hb:{b%02d}:%s" % (bucket, suffix) for bucket in range(BUCKETS))


class SpaceSteps:
    """The operations of a key space that are the same with and without an index.

    Args:
        letter: The letter of the space.
        cluster: Whether the buckets may be on different servers.
    """

    _cas: Script
    _incr: Script

    def __init__(self, letter: bytes, *, cluster: bool = False) -> None:
        self._values = names(letter + b":")
        self._cluster = cluster

    def _value(self, key: bytes) -> bytes:
        return self._values[crc32(key) % BUCKETS] + key

    def _keys(self, key: bytes) -> tuple[bytes, ...]:
        """Return the Redis keys that a script about one key takes."""
        raise NotImplementedError

    def _writes(
        self, bucket: int, keys: Sequence[bytes], items: Mapping[bytes, bytes], ttl: float | None
    ) -> list[Command]:
        """Return what writes values of one bucket: on a Cluster, a single command."""
        raise NotImplementedError

    def _call(self, script: Script, key: bytes, *args: bytes) -> Command:
        """Return the command that runs a script about one key."""
        return call(script, bucket_of(key), self._keys(key), *args)

    def _ttl(self, ttl: float | None) -> bytes:
        """Return milliseconds, or nothing for a value that does not expire."""
        raise NotImplementedError

    def get(self, key: bytes) -> Steps[bytes | None]:
        """Read a value."""
        bucket = crc32(key) % BUCKETS
        command = Command((b"GET", self._values[bucket] + key), bucket)
        [value] = yield from ask(command, repeatable=True)
        return value  # type: ignore[no-any-return]

    def get_many(self, keys: Sequence[bytes]) -> Steps[list[bytes | None]]:
        """Read values in one command, hence all from one moment; on a Cluster one per bucket."""
        if not keys:
            return []
        if self._cluster:
            return (yield from self._get_by_bucket(keys))
        command = Command((b"MGET", *map(self._value, keys)))
        [values] = yield from ask(command, repeatable=True)
        return values  # type: ignore[no-any-return]

    def _get_by_bucket(self, keys: Sequence[bytes]) -> Steps[list[bytes | None]]:
        grouped = by_bucket(keys)
        commands = [
            Command((b"MGET", *map(self._value, members)), bucket)
            for bucket, members in grouped.items()
        ]
        replies = yield from ask(*commands, repeatable=True)
        found: dict[bytes, bytes | None] = {}
        for members, values in zip(grouped.values(), replies, strict=True):
            found.update(zip(members, values, strict=True))
        return [found[key] for key in keys]

    def put_many(self, items: Mapping[bytes, bytes], ttl: float | None) -> Steps[None]:
        """Write values: in one transaction, or, on a Cluster, one for each bucket."""
        commands = [
            command
            for bucket, keys in by_bucket(items).items()
            for command in self._writes(bucket, keys, items, ttl)
        ]
        if self._cluster and commands:
            yield from ask(*commands)
        elif commands:
            yield from ask_all_or_none(commands)

    def cas(
        self, key: bytes, expected: bytes | None, value: bytes, ttl: float | None
    ) -> Steps[bool]:
        """Write a value if the present one is the expected one."""
        wanted = () if expected is None else (expected,)
        command = self._call(self._cas, key, key, self._ttl(ttl), value, *wanted)
        [stored] = yield from ask(command)
        return bool(stored)

    def add(self, key: bytes, value: bytes, ttl: float | None) -> Steps[bool]:
        """Write a value if there is none."""
        return (yield from self.cas(key, None, value, ttl))

    def incr(self, key: bytes, delta: int, ttl: float | None) -> Steps[int]:
        """Add to a counter."""
        steps = [b"%d" % step for step in _within_64_bits(delta)]
        command = self._call(self._incr, key, key, self._ttl(ttl), *steps)
        [total] = yield from ask(command)
        if total == scripts.OVERFLOW:
            raise CounterOverflow(f"the counter {_shown(key)} would leave 64 bits")
        if total == scripts.NOT_A_COUNTER:
            raise WrongType(f"{_shown(key)} does not hold a 64-bit integer")
        return int(total)

    def ttl(self, key: bytes) -> Steps[float | None]:
        """Read how long a value has left."""
        command = Command((b"PTTL", self._value(key)), bucket_of(key))
        [left] = yield from ask(command, repeatable=True)
        if left == _NO_KEY:
            raise KeyError(key)
        return None if left == NO_EXPIRY or left > _LONGEST_TTL_MS else left / 1000


class IndexedSteps(SpaceSteps):
    """The operations of the app's and hornbeam's own keys, which can be listed cheaply."""

    _cas = scripts.CAS
    _incr = scripts.INCR

    def __init__(self, letter: bytes, *, cluster: bool = False) -> None:
        super().__init__(letter, cluster=cluster)
        self._indexes = names(letter + b"i")
        self._expiries = names(letter + b"e")

    def _keys(self, key: bytes) -> tuple[bytes, ...]:
        bucket = bucket_of(key)
        return self._indexes[bucket], self._expiries[bucket], self._values[bucket] + key

    def _ttl(self, ttl: float | None) -> bytes:
        return b"" if ttl is None else b"%d" % milliseconds(ttl)

    def put(self, key: bytes, value: bytes, ttl: float | None) -> Steps[None]:
        """Write a value."""
        yield from ask(self._call(scripts.PUT, key, self._ttl(ttl), key, value))

    def _writes(
        self, bucket: int, keys: Sequence[bytes], items: Mapping[bytes, bytes], ttl: float | None
    ) -> list[Command]:
        names = (self._indexes[bucket], self._expiries[bucket], *map(self._value, keys))
        words = (word for key in keys for word in (key, items[key]))
        return [call(scripts.PUT, bucket, names, self._ttl(ttl), *words)]

    def delete(self, key: bytes) -> Steps[bool]:
        """Remove a value."""
        [removed] = yield from ask(self._call(scripts.DELETE, key, key))
        return bool(removed)

    def keys(self, prefix: bytes) -> Steps[list[bytes]]:
        """List the keys of all buckets in order."""
        pages = yield from self._walk(scripts.LIST, prefix, repeatable=True)
        return sorted(key for _, page in pages for key in page)

    def clear(self, prefix: bytes) -> Steps[int]:
        """Remove keys, a page of each bucket at a time."""
        pages = yield from self._walk(scripts.CLEAR, prefix, repeatable=False)
        return sum(removed for _, removed in pages)

    def usage(self, prefix: bytes) -> Steps[Usage]:
        """Count keys; a bucket with many dead members to trim is counted again after."""
        pages = yield from self._walk(scripts.COUNT, prefix, repeatable=True)
        return Usage(entries=sum(dict(pages).values()), bytes=None, evictions=0)

    def _walk(
        self, script: Script, prefix: bytes, *, repeatable: bool
    ) -> Steps[list[tuple[int, Any]]]:
        """Run a paging script over every bucket; return each page with its bucket."""
        low, high = _bounds(prefix)
        pages: list[tuple[int, Any]] = []
        starts = dict.fromkeys(range(BUCKETS), low)
        while starts:
            commands = [
                call(
                    script,
                    bucket,
                    (self._indexes[bucket], self._expiries[bucket]),
                    *(self._values[bucket], start, high, _PAGE),
                )
                for bucket, start in starts.items()
            ]
            replies = yield from ask(*commands, repeatable=repeatable)
            answers = dict(zip(starts, replies, strict=True))
            pages += [(bucket, result) for bucket, (result, _) in answers.items()]
            starts = {bucket: start for bucket, (_, start) in answers.items() if start is not None}
        return pages


class CacheSteps(SpaceSteps):
    """The operations of the cache: no index to keep up, at the price of listing by SCAN."""

    _cas = scripts.PLAIN_CAS
    _incr = scripts.PLAIN_INCR

    def _keys(self, key: bytes) -> tuple[bytes, ...]:
        return (self._value(key),)

    def _ttl(self, ttl: float | None) -> bytes:
        return b"%d" % (_FOREVER_MS if ttl is None else milliseconds(ttl))

    def put(self, key: bytes, value: bytes, ttl: float | None) -> Steps[None]:
        """Write a value."""
        yield from ask(self._set(key, value, ttl))

    def _set(self, key: bytes, value: bytes, ttl: float | None) -> Command:
        words = (b"SET", self._value(key), value, b"PX", self._ttl(ttl))
        return Command(words, bucket_of(key))

    def _writes(
        self, bucket: int, keys: Sequence[bytes], items: Mapping[bytes, bytes], ttl: float | None
    ) -> list[Command]:
        if not self._cluster:
            return [self._set(key, items[key], ttl) for key in keys]
        names = tuple(map(self._value, keys))
        values = (items[key] for key in keys)
        return [call(scripts.PLAIN_PUT, bucket, names, self._ttl(ttl), *values)]

    def delete(self, key: bytes) -> Steps[bool]:
        """Remove a value."""
        [removed] = yield from ask(Command((b"DEL", self._value(key)), bucket_of(key)))
        return bool(removed)

    def keys(self, prefix: bytes) -> Steps[list[bytes]]:
        """List keys by walking the whole database: an operator's action."""
        found = yield OnEachPrimary(lambda _: self._names(prefix))
        skip = len(self._values[0])
        return sorted({name[skip:] for names in found for name in names})

    def _names(self, prefix: bytes) -> Steps[set[bytes]]:
        found: set[bytes] = set()
        cursor = b"0"
        while True:
            cursor, page = yield from self._scan(prefix, cursor)
            found.update(page)
            if cursor == b"0":
                return found

    def clear(self, prefix: bytes) -> Steps[int]:
        """Remove keys by walking the whole database: an operator's action."""
        return sum((yield OnEachPrimary(lambda _: self._remove(prefix))))

    def _remove(self, prefix: bytes) -> Steps[int]:
        removed = 0
        cursor = b"0"
        while True:
            cursor, page = yield from self._scan(prefix, cursor)
            commands = [
                Command((b"UNLINK", *names), bucket)
                for bucket, names in _grouped(page, _bucket_in).items()
            ]
            if commands:
                removed += sum((yield from ask(*commands)))
            if cursor == b"0":
                return removed

    def _scan(self, prefix: bytes, cursor: bytes) -> Steps[tuple[bytes, list[bytes]]]:
        pattern = b"hb:{b[0-9][0-9]}:c:" + literally(prefix) + b"*"
        words = (b"SCAN", cursor, b"MATCH", pattern, b"COUNT", _PAGE)
        [(cursor, page)] = yield from ask(Command(words), repeatable=True)
        return cursor, page

    def usage(self, prefix: bytes) -> Steps[Usage]:  # noqa: ARG002
        """Return the evictions of all primaries since they started; the rest is unknown."""
        evictions = yield OnEachPrimary(lambda _: _evictions())
        return Usage(entries=None, bytes=None, evictions=sum(evictions))


def _evictions() -> Steps[int]:
    [info] = yield from ask(Command((b"INFO", b"stats")), repeatable=True)
    evicted = re.search(rb"evicted_keys:(\d+)", info)
    return int(evicted[1]) if evicted else 0


def space_steps(space: Space, *, cluster: bool = False) -> IndexedSteps | CacheSteps:
    """Return the operations of a key space, on one server or on a Cluster."""
    kind = CacheSteps if space == "cache" else IndexedSteps
    return kind(space[:1].encode(), cluster=cluster)


def _within_64_bits(delta: int) -> list[int]:
    """Split a delta into numbers that INCRBY takes and that add up to it, or leave 64 bits."""
    if -COUNTER_MAX - 1 <= delta <= COUNTER_MAX:
        return [delta]
    step = COUNTER_MAX if delta > 0 else -COUNTER_MAX
    # From one end of the range to the other it is less than three steps; more always overflows.
    steps = [step] * min(abs(delta) // COUNTER_MAX, 3)
    return [*steps, delta - sum(steps)] if len(steps) < 3 else steps  # noqa: PLR2004


def _bounds(prefix: bytes) -> tuple[bytes, bytes]:
    """Return the lexicographic range of all keys that start with `prefix`."""
    stem = prefix.rstrip(b"\xff")
    high = b"(" + stem[:-1] + bytes([stem[-1] + 1]) if stem else b"+"
    return b"[" + prefix if prefix else b"-", high


def _shown(key: bytes) -> str:
    return repr(key.decode("utf-8", "replace"))
