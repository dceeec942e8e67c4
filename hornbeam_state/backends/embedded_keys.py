"""The operations of the embedded store on one key space.

A read is a transaction of its own, from one snapshot. A write holds the space's write guard and is
one LMDB transaction: committed at its end, undone by an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, Protocol, TypeVar

import lmdb

from hornbeam_state.backends import eviction, expiry
from hornbeam_state.backends.base import COUNTER_MAX, COUNTER_MIN, Space, Usage
from hornbeam_state.backends.blobs import LARGEST_INLINE, Blob, Blobs, digest_of
from hornbeam_state.backends.data_file import damaged
from hornbeam_state.backends.lmdb_files import DAMAGE
from hornbeam_state.backends.records import (
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
from hornbeam_state.errors import CounterOverflow, StoreError, StoreFull, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from hornbeam_state.backends.lmdb_files import LmdbFiles
    from hornbeam_state.backends.write_guard import WriteGuard

P = ParamSpec("P")
T = TypeVar("T")

_LOOP_PATIENCE: Final = 0.002
"""Seconds an event loop waits for another writer before a thread waits instead."""
_SWEEP_PATIENCE: Final = 0.1


class Busy(StoreUnavailable):
    """Another writer did not finish in time; nothing was written."""


class Owner(Protocol):
    """What a key space needs of its backend."""

    @property
    def timeout(self) -> float:
        """Seconds a writer waits for another."""
        ...

    @property
    def directory(self) -> Path:
        """Where the files lie."""
        ...

    def opened(self) -> LmdbFiles:
        """Return the open files."""
        ...


class EmbeddedKeyspace:
    """The keys of one space; see `backends.base.Keyspace` for what each operation means."""

    def __init__(self, owner: Owner, space: Space, clock: Callable[[], float]) -> None:
        self._owner = owner
        self._space: Space = space
        self.letter = space[:1].encode()
        self._clock = clock
        self._db: Any = None
        self._begin: Callable[..., Any] = self._open_and_begin
        self._guard: tuple[WriteGuard, Blobs] | None = None

    def detach(self, *, forked: bool = False) -> None:
        """Open the files again at the next use.

        The handle is dropped in a forked child only. Elsewhere a thread may be about to begin
        with the old environment, where no handle would mean LMDB's unnamed database.
        """
        self._begin = self._open_and_begin
        self._guard = None
        if forked:
            self._db = None

    def _open_and_begin(self, _db: Any, *arguments: Any) -> Any:
        environment, db = self._owner.opened().databases[self._space]
        self._db = db  # before _begin: whoever sees the new method must see the new handle
        self._begin = environment.begin
        return environment.begin(db, *arguments)

    # Reads.

    def get(self, key: bytes) -> bytes | None:
        """Return the value, or None."""
        return self._read(key if len(key) <= LONGEST_PLAIN_KEY else stored_key(key))

    def _read(self, stored: bytes) -> bytes | None:
        # `begin` and `abort` by hand: a `with` block costs a tenth of a microsecond more.
        try:
            txn = self._begin(self._db)
            try:
                record = txn.get(stored)
            finally:
                txn.abort()
        except lmdb.Error as error:
            raise self._translated(error) from error
        if record is None:
            return None
        if record.startswith(PLAIN_HEADER):
            return record[len(PLAIN_HEADER) :]  # type: ignore[no-any-return]
        return self._value(stored, record)

    def _value(self, stored: bytes, record: bytes | None) -> bytes | None:
        """Return the value of a record that was read, unless it has expired."""
        while record is not None and self._is_live(record):
            blob = blob_of(record)
            value = payload(record) if blob is None else self._blobs.read(*blob)
            if value is not None:
                return value
            seen = record  # its file is gone, so by now it should have been replaced
            with self._transaction() as txn:
                record = txn.get(stored)
            if record == seen:
                raise damaged(self._owner.directory, "the file of a large value is missing")
        return None

    async def aget(self, key: bytes) -> bytes | None:
        """Awaitable twin of `get`: direct, since it takes less than handing it to a thread."""
        return self.get(key)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the values in order, all from one snapshot."""
        stored = [self._stored(key) for key in keys]
        with self._transaction() as txn:
            records = [txn.get(one) for one in stored]
        return [self._value(*row) for row in zip(stored, records, strict=True)]

    async def aget_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Awaitable twin of `get_many`."""
        return self.get_many(keys)

    def ttl(self, key: bytes) -> float | None:
        """Return the seconds left, or None; KeyError when absent."""
        with self._transaction() as txn:
            record = txn.get(self._stored(key))
        if record is None or not self._is_live(record):
            raise KeyError(key.decode("utf-8", "replace"))
        expiry = expiry_of(record)
        return None if expiry == 0 else expiry / 1000 - self._clock()

    async def attl(self, key: bytes) -> float | None:
        """Awaitable twin of `ttl`."""
        return self.ttl(key)

    def keys(self, prefix: bytes = b"") -> list[bytes]:
        """Return the live keys under the prefix, sorted."""
        with self._transaction(buffers=True) as txn:
            return sorted(
                key for _, key, record in self._under(txn, prefix) if self._is_live(record)
            )

    async def akeys(self, prefix: bytes = b"") -> list[bytes]:
        """Awaitable twin of `keys`; in a thread, since it may take long."""
        return await asyncio.to_thread(self.keys, prefix)

    def usage(self, prefix: bytes = b"") -> Usage:
        """Count by LMDB's own statistics; under a prefix, by walking it.

        Without a prefix, expired keys count until they are swept.
        """
        with self._transaction(buffers=True) as txn:
            if prefix:
                sizes = [len(key) + _size(record) for _, key, record in self._under(txn, prefix)]
                return Usage(entries=len(sizes), bytes=sum(sizes), evictions=self._evictions(txn))
            statistics = txn.stat(self._db)
            used = eviction.pages(statistics) * statistics["psize"] + self._blobs.size(txn)
            return Usage(entries=statistics["entries"], bytes=used, evictions=self._evictions(txn))

    async def ausage(self, prefix: bytes = b"") -> Usage:
        """Awaitable twin of `usage`; in a thread, since it may take long."""
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
        with self._large_apart(items) as prepared:
            self._write(self._put, prepared, ttl)

    async def aput_many(self, items: Mapping[bytes, bytes], ttl: float | None = None) -> None:
        """Awaitable twin of `put_many`; in a thread where it writes a file."""
        if any(len(value) > LARGEST_INLINE for value in items.values()):
            await asyncio.to_thread(self.put_many, items, ttl)
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
        with self._large_apart({key: value}) as prepared:
            return self._write(self._cas, key, expected, prepared[key], ttl)

    async def acas(
        self, key: bytes, expected: bytes | None, value: bytes, ttl: float | None = None
    ) -> bool:
        """Awaitable twin of `cas`; in a thread where it writes a file."""
        if len(value) > LARGEST_INLINE:
            return await asyncio.to_thread(self.cas, key, expected, value, ttl)
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
        record = txn.get(self._stored(key))
        if record is None or not self._is_live(record):
            total, expires = delta, self._expiry(ttl)
        else:
            total = parse_counter(b"" if blob_of(record) else payload(record)) + delta
            expires = expiry_of(record)
        if not COUNTER_MIN <= total <= COUNTER_MAX:
            raise CounterOverflow("the counter would leave 64 bits; it was not changed")
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
        return await asyncio.to_thread(self.clear, prefix)

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
        blobs = self._blobs
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
        """Write a record, and keep references to files and the index of expiries in step."""
        stored = self._stored(key)
        if isinstance(value, Blob):
            self._blobs.store(txn, value)
            reference = blob_reference(value.digest, value.size)
            record = make_record(key, reference, expires, blob=True)
        else:
            record = make_record(key, value, expires)
        before = txn.replace(stored, record)
        if expires or before is not None:
            self._replaced(txn, stored, before, expires)

    def remove(self, txn: Any, stored: bytes) -> bytes | None:
        """Remove a record and what belongs to it; return the record."""
        record: bytes | None = txn.pop(stored, db=self._owner.opened().databases[self._space][1])
        if record is not None:
            self._replaced(txn, stored, record, 0)
        return record

    def _replaced(self, txn: Any, stored: bytes, before: bytes | None, expires: int) -> None:
        index = self._owner.opened().expiries[self._space]
        expiry.move(txn, index, self.letter, stored, before=before, expiry=expires)
        if before is not None and (blob := blob_of(before)):
            self._blobs.release(txn, *blob)

    @property
    def _blobs(self) -> Blobs:
        return self._owner.opened().blobs[self._space]

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
        index = self._owner.opened().expiries[self._space]
        with self._transaction() as txn:
            if not expiry.is_due(txn, index, int(self._clock() * 1000)):
                return 0
        return self._guarded(_SWEEP_PATIENCE, self._sweep, index, most, neighbours)

    def _sweep(
        self, txn: Any, index: Any, most: int, neighbours: Sequence[EmbeddedKeyspace]
    ) -> int:
        remove = {space.letter: space.remove for space in neighbours}
        return expiry.sweep(txn, index, int(self._clock() * 1000), most, remove)

    def remove_abandoned(self) -> None:
        """Remove files of large values that nothing refers to."""
        self._guarded(_SWEEP_PATIENCE, self._remove_abandoned)

    def _remove_abandoned(self, txn: Any) -> None:
        for path in list(self._blobs.abandoned(txn)):
            path.unlink(missing_ok=True)

    def _evictions(self, txn: Any) -> int:  # noqa: ARG002 - the cache counts them
        return 0

    @contextlib.contextmanager
    def _transaction(self, *, buffers: bool = False) -> Iterator[Any]:
        """Read in a block from one snapshot."""
        try:
            with self._begin(self._db, None, False, buffers) as txn:
                yield txn
        except lmdb.Error as error:
            raise self._translated(error) from error

    def _write(self, body: Callable[Concatenate[Any, P], T], *args: P.args, **_: P.kwargs) -> T:
        """Run a function in a transaction: committed at its end, undone by an error."""
        return self._guarded(self._owner.timeout, body, *args)

    async def _awrite(
        self, body: Callable[Concatenate[Any, P], T], *args: P.args, **_: P.kwargs
    ) -> T:
        """Awaitable twin of `_write`: in a thread only if another writer makes it wait."""
        if self._owner.opened().durable:  # waits for the disk
            return await asyncio.to_thread(self._guarded, self._owner.timeout, body, *args)
        try:
            return self._guarded(_LOOP_PATIENCE, body, *args)
        except Busy:
            return await asyncio.to_thread(self._guarded, self._owner.timeout, body, *args)

    def _guarded(self, patience: float, body: Callable[..., T], *args: Any) -> T:
        guard, blobs = self._guard or self._open_guard()
        if not guard.acquire(patience):
            raise Busy(
                f"another process has been writing to the store in {self._owner.directory} for "
                f"{patience} s: it is stopped or starved of CPU. Nothing was written"
            )
        try:
            with self._begin(self._db, None, True) as txn:
                result = body(txn, *args)
            if blobs.doomed:
                blobs.remove_doomed()
        except lmdb.Error as error:
            raise self._translated(error) from error
        else:
            return result
        finally:
            blobs.doomed.clear()  # what an undone transaction wanted removed stays
            guard.release()

    def _open_guard(self) -> tuple[WriteGuard, Blobs]:
        files = self._owner.opened()
        self._guard = files.guards[self._space], files.blobs[self._space]
        return self._guard

    def _translated(self, error: lmdb.Error) -> StoreError:
        """Turn a driver's error into one of ours; a commit that failed changed nothing."""
        directory = self._owner.directory
        if isinstance(error, lmdb.MapFullError):
            return StoreFull(
                f"the {self._space} part of the store in {directory} has reached its size limit; "
                f"delete keys, or raise it: HORNBEAM_STORE=lmdb://{directory}?state_size=BYTES"
            )
        if error.code in (errno.ENOSPC, errno.EDQUOT):
            return StoreFull(f"the disk under the store in {directory} is full")
        if isinstance(error, DAMAGE):
            return damaged(directory, str(error))
        return StoreUnavailable(f"the store in {directory} failed: {error}")

    def _expiry(self, ttl: float | None) -> int:
        return 0 if ttl is None else max(int((self._clock() + ttl) * 1000), 1)

    def _is_live(self, record: bytes | memoryview) -> bool:
        expiry = expiry_of(record)
        return expiry == 0 or expiry > self._clock() * 1000


def _size(record: bytes) -> int:
    blob = blob_of(record)
    return len(record) if blob is None else blob[1]
