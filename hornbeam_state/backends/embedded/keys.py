"""The operations of the embedded store on one key space."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Final

from hornbeam_state.backends.base import COUNTER_MAX, COUNTER_MIN, Space, Usage
from hornbeam_state.backends.embedded import expiry
from hornbeam_state.backends.embedded.access import UPKEEP_PATIENCE, Access, Owner
from hornbeam_state.backends.embedded.blobs import LARGEST_INLINE, Blob, digest_of
from hornbeam_state.backends.embedded.data_file import damaged
from hornbeam_state.backends.embedded.records import (
    KEPT_OF_LONG_KEY,
    LONGEST_PLAIN_KEY,
    PLAIN_HEADER,
    blob_of,
    blob_reference,
    expiry_of,
    full_key,
    make_record,
    parse_counter,
    payload,
    stored_key,
)
from hornbeam_state.errors import CounterOverflow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_ROOM_CHECKS: Final = 64  # of a limit are between two looks at how much is used


class EmbeddedKeyspace(Access):
    """The keys of one space; see `backends.base.Keyspace` for what each operation means."""

    def __init__(self, owner: Owner, space: Space, clock: Callable[[], float]) -> None:
        super().__init__(owner, space)
        self.letter = space[:1].encode()
        self._clock = clock
        self._room = 0

    # Reads.

    def get(self, key: bytes) -> bytes | None:
        """Return the value, or None."""
        return self._read(key if len(key) <= LONGEST_PLAIN_KEY else stored_key(key))

    def _read(self, stored: bytes) -> bytes | None:
        record = self._read_record(stored)
        if record is None:
            return None
        if record.startswith(PLAIN_HEADER):
            return record[len(PLAIN_HEADER) :]
        return self._value(stored, record)

    def _value(self, stored: bytes, record: bytes | None) -> bytes | None:
        """Return the value of a record that was read, unless it has expired."""
        while record is not None and self._is_live(record):
            blob = blob_of(record)
            value = payload(record) if blob is None else self._bind()[1].blobs.read(*blob)
            if value is not None:
                return value
            seen = record  # its file is gone, so by now it should have been replaced
            record = self._read_record(stored)
            if record == seen:
                raise damaged(self._bind()[1].path, "the file of a large value is missing")
        return None

    async def aget(self, key: bytes) -> bytes | None:
        """Awaitable twin of `get`: direct, since it takes less than handing it to a thread."""
        if self._bound is None:
            await self._aopen()
        return self.get(key)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the values in order, all from one snapshot."""
        stored = [self._stored(key) for key in keys]
        with self._transaction() as txn:
            records = [txn.get(one) for one in stored]
        return [self._value(*row) for row in zip(stored, records, strict=True)]

    async def aget_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Awaitable twin of `get_many`."""
        await self._aopen()
        return self.get_many(keys)

    def ttl(self, key: bytes) -> float | None:
        """Return the seconds left, or None; KeyError when absent."""
        record = self._read_record(self._stored(key))
        now = self._clock()
        expires = 0 if record is None else expiry_of(record)
        if record is None or 0 < expires <= now * 1000:
            raise KeyError(key.decode("utf-8", "replace"))
        return None if expires == 0 else expires / 1000 - now

    async def attl(self, key: bytes) -> float | None:
        """Awaitable twin of `ttl`."""
        await self._aopen()
        return self.ttl(key)

    def keys(self, prefix: bytes = b"") -> list[bytes]:
        """Return the live keys under the prefix, sorted."""
        with self._transaction(buffers=True) as txn:
            return sorted(
                key for _, key, record in self._under(txn, prefix) if self._is_live(record)
            )

    async def akeys(self, prefix: bytes = b"") -> list[bytes]:
        """Awaitable twin of `keys`; in a thread, since it may take long."""
        await self._aopen()
        return await asyncio.to_thread(self.keys, prefix)

    def usage(self, prefix: bytes = b"") -> Usage:
        """Count by LMDB's own statistics; under a prefix, by walking it.

        Without a prefix, expired keys count until they are swept, and bytes are those of the
        whole file's pages in use: of ``app`` and ``sys`` together.
        """
        with self._transaction(buffers=True) as txn:
            if prefix:
                sizes = [len(key) + _size(record) for _, key, record in self._under(txn, prefix)]
                return Usage(entries=len(sizes), bytes=sum(sizes), evictions=self._evictions(txn))
            file = self._bind()[1]
            return Usage(
                entries=txn.stat(self._db)["entries"],
                bytes=file.used(txn),
                evictions=self._evictions(txn),
            )

    async def ausage(self, prefix: bytes = b"") -> Usage:
        """Awaitable twin of `usage`; in a thread, since it may take long."""
        await self._aopen()
        return await asyncio.to_thread(self.usage, prefix)

    # Writes. Each is a function of a transaction; `_write` and `_awrite` run it.

    def put(self, key: bytes, value: bytes, ttl: float | None = None) -> None:
        """Store the value and replace the expiry."""
        if len(value) <= LARGEST_INLINE:
            self._write(self._put, {key: value}, ttl)
        else:
            self.put_many({key: value}, ttl)

    async def aput(self, key: bytes, value: bytes, ttl: float | None = None) -> None:
        """Awaitable twin of `put`."""
        await self.aput_many({key: value}, ttl)

    def put_many(self, items: Mapping[bytes, bytes], ttl: float | None = None) -> None:
        """Store all items in one transaction."""
        self._put_many(self._deadline(), items, ttl)

    def _put_many(self, deadline: float, items: Mapping[bytes, bytes], ttl: float | None) -> None:
        with self._large_apart(items) as prepared:
            self._write_by(deadline, self._put, prepared, ttl)

    async def aput_many(self, items: Mapping[bytes, bytes], ttl: float | None = None) -> None:
        """Awaitable twin of `put_many`; in a thread where it writes a file."""
        if any(len(value) > LARGEST_INLINE for value in items.values()):
            deadline = self._deadline()
            await self._aopen()
            await asyncio.to_thread(self._put_many, deadline, items, ttl)
        else:
            await self._awrite(self._put, items, ttl)

    def _put(self, txn: Any, items: Mapping[bytes, bytes | Blob], ttl: float | None) -> None:
        expires = self._expiry(ttl)
        for key, value in items.items():
            self._store(txn, key, value, expires)

    def add(self, key: bytes, value: bytes, ttl: float | None = None) -> bool:
        """Store the value if the key is absent."""
        return self.cas(key, None, value, ttl)

    async def aadd(self, key: bytes, value: bytes, ttl: float | None = None) -> bool:
        """Awaitable twin of `add`."""
        return await self.acas(key, None, value, ttl)

    def cas(
        self, key: bytes, expected: bytes | None, value: bytes, ttl: float | None = None
    ) -> bool:
        """Store the value if the present one is as expected."""
        return self._cas_by(self._deadline(), key, expected, value, ttl)

    def _cas_by(
        self, deadline: float, key: bytes, expected: bytes | None, value: bytes, ttl: float | None
    ) -> bool:
        with self._large_apart({key: value}) as prepared:
            return self._write_by(deadline, self._cas, key, expected, prepared[key], ttl)

    async def acas(
        self, key: bytes, expected: bytes | None, value: bytes, ttl: float | None = None
    ) -> bool:
        """Awaitable twin of `cas`; in a thread where it writes a file."""
        if len(value) > LARGEST_INLINE:
            deadline = self._deadline()
            await self._aopen()
            return await asyncio.to_thread(self._cas_by, deadline, key, expected, value, ttl)
        return await self._awrite(self._cas, key, expected, value, ttl)

    def _cas(
        self,
        txn: Any,
        key: bytes,
        expected: bytes | None,
        value: bytes | Blob,
        ttl: float | None,
    ) -> bool:
        record = txn.get(self._stored(key))
        if not self._holds(record, expected):
            return False
        self._store(txn, key, value, self._expiry(ttl))
        return True

    def _holds(self, record: bytes | None, expected: bytes | None) -> bool:
        if record is None or not self._is_live(record):
            return expected is None
        blob = blob_of(record)
        if blob is None or expected is None:
            return payload(record) == expected
        return blob == (digest_of(expected), len(expected))

    def incr(self, key: bytes, delta: int, ttl: float | None = None) -> int:
        """Add to a counter and return the sum."""
        return self._write(self._incr, key, delta, ttl)

    async def aincr(self, key: bytes, delta: int, ttl: float | None = None) -> int:
        """Awaitable twin of `incr`."""
        return await self._awrite(self._incr, key, delta, ttl)

    def _incr(self, txn: Any, key: bytes, delta: int, ttl: float | None) -> int:
        stored = self._stored(key)
        record = txn.get(stored)
        if record is not None and record.startswith(PLAIN_HEADER):
            # Most counters: in the place of the old number the new one needs no room.
            total = _sum(parse_counter(record[len(PLAIN_HEADER) :]), delta)
            txn.put(stored, PLAIN_HEADER + b"%d" % total)
            return total
        if record is None or not self._is_live(record):
            total, expires = _sum(0, delta), self._expiry(ttl)
        else:
            total = _sum(parse_counter(b"" if blob_of(record) else payload(record)), delta)
            expires = expiry_of(record)
        self._store(txn, key, b"%d" % total, expires)
        return total

    def delete(self, key: bytes) -> bool:
        """Remove the key."""
        return self._write(self._delete, key)

    async def adelete(self, key: bytes) -> bool:
        """Awaitable twin of `delete`."""
        return await self._awrite(self._delete, key)

    def _delete(self, txn: Any, key: bytes) -> bool:
        record = self.remove(txn, self._stored(key))
        return record is not None and self._is_live(record)

    def clear(self, prefix: bytes = b"") -> int:
        """Remove the keys under the prefix in one transaction."""
        return self._write(self._clear, prefix)

    async def aclear(self, prefix: bytes = b"") -> int:
        """Awaitable twin of `clear`; in a thread, since it may take long."""
        deadline = self._deadline()
        await self._aopen()
        return await asyncio.to_thread(self._write_by, deadline, self._clear, prefix)

    def _clear(self, txn: Any, prefix: bytes) -> int:
        found = [stored for stored, _, _ in self._under(txn, prefix)]
        records = [self.remove(txn, stored) for stored in found]
        return sum(record is not None and self._is_live(record) for record in records)

    # Parts.

    def _stored(self, key: bytes) -> bytes:
        return stored_key(key)

    def _under(self, txn: Any, prefix: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
        """Yield stored key, full key and record under the prefix, expired ones too."""
        kept = prefix[:KEPT_OF_LONG_KEY]
        with txn.cursor() as cursor:
            if not (cursor.set_range(kept) if kept else cursor.first()):
                return
            for stored, record in cursor.iternext():
                if stored[: len(kept)] != kept:
                    return
                key = full_key(stored, record)
                if key.startswith(prefix):
                    yield bytes(stored), key, record

    @contextlib.contextmanager
    def _large_apart(self, items: Mapping[bytes, bytes]) -> Iterator[Mapping[bytes, bytes | Blob]]:
        """Write large values to files for the time of a block, before anyone has to wait."""
        if all(len(value) <= LARGEST_INLINE for value in items.values()):
            yield items
            return
        prepared: dict[bytes, bytes | Blob] = dict(items)
        blobs = self._bind()[1].blobs
        try:
            for key, value in items.items():
                if len(value) > LARGEST_INLINE:
                    prepared[key] = blobs.write(value)
            yield prepared
        finally:
            for one in prepared.values():
                if isinstance(one, Blob):
                    blobs.discard(one)

    def _store(self, txn: Any, key: bytes, value: bytes | Blob, expires: int) -> None:
        """Write a record within the limit of the space.

        Raises:
            StoreFull: it would take pages beyond the limit.
        """
        self._room -= value.size if isinstance(value, Blob) else len(value)
        if self._room >= 0:
            self._write_record(txn, key, value, expires)
            return
        # What is used is looked up only now and then, so several processes may together pass the
        # limit by some hundredths.
        files, file = self._bind()
        before = file.used(txn)
        self._write_record(txn, key, value, expires)
        after = file.used(txn)
        if after > max(before, files.state_size):
            raise self._full()
        self._room = max(0, min(files.state_size - after, files.state_size // _ROOM_CHECKS))

    def _write_record(self, txn: Any, key: bytes, value: bytes | Blob, expires: int) -> None:
        """Write a record, and keep references to files and the index of expiries in step."""
        stored = self._stored(key)
        if isinstance(value, Blob):
            self._bind()[1].blobs.store(txn, value)
            reference = blob_reference(value.digest, value.size)
            record = make_record(key, reference, expires, blob=True)
        else:
            record = make_record(key, value, expires)
        before = txn.replace(stored, record)
        if expires or before is not None:
            self._replaced(txn, stored, before, expires)

    def remove(self, txn: Any, stored: bytes) -> bytes | None:
        """Remove a record and what belongs to it; return the record."""
        record: bytes | None = txn.pop(stored, db=self._bind()[1].databases[self._database])
        if record is not None:
            self._replaced(txn, stored, record, 0)
        return record

    def _replaced(self, txn: Any, stored: bytes, before: bytes | None, expires: int) -> None:
        file = self._bind()[1]
        expiry.move(txn, file.index, self.letter, stored, before=before, expiry=expires)
        if before is not None and (blob := blob_of(before)):
            file.blobs.release(txn, *blob)

    def sweep(self, most: int, neighbours: Sequence[EmbeddedKeyspace]) -> int:
        """Remove expired records of this key space's file, the earliest first.

        Args:
            most: How many to remove.
            neighbours: The key spaces of the file, this one among them.

        Returns:
            How many were removed; fewer than `most` when none are left.

        Raises:
            Busy: another writer is at work.
        """
        index = self._bind()[1].index
        with self._transaction() as txn:
            if not expiry.is_due(txn, index, int(self._clock() * 1000)):
                return 0
        return self._guarded(UPKEEP_PATIENCE, self._sweep, index, most, neighbours)

    def _sweep(
        self, txn: Any, index: Any, most: int, neighbours: Sequence[EmbeddedKeyspace]
    ) -> int:
        remove = {space.letter: space.remove for space in neighbours}
        return expiry.sweep(txn, index, int(self._clock() * 1000), most, remove)

    def _evictions(self, txn: Any) -> int:  # noqa: ARG002 - the cache counts them
        return 0

    def _expiry(self, ttl: float | None) -> int:
        return 0 if ttl is None else max(int((self._clock() + ttl) * 1000), 1)

    def _is_live(self, record: bytes | memoryview) -> bool:
        expiry = expiry_of(record)
        return expiry == 0 or expiry > self._clock() * 1000


def _sum(number: int, delta: int) -> int:
    total = number + delta
    if not COUNTER_MIN <= total <= COUNTER_MAX:
        raise CounterOverflow("the counter would leave 64 bits; it was not changed")
    return total


def _size(record: bytes) -> int:
    blob = blob_of(record)
    return len(record) if blob is None else blob[1]
