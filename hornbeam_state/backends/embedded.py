"""The embedded store: LMDB, one machine, any number of processes, no server.

Two files, so that their writers do not wait for each other: ``state`` for the app's and
hornbeam's keys, which are never evicted, and ``cache``, which is bounded and evicts.

Commits go to the page cache, not to the disk: they survive ``kill -9`` of any process.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import tempfile
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar

import lmdb

from hornbeam_state.backends.base import COUNTER_MAX, COUNTER_MIN, SPACES, Space, Usage
from hornbeam_state.backends.directory import damaged
from hornbeam_state.backends.kernel_locks import KernelLock, try_kernel_lock
from hornbeam_state.backends.lmdb_files import DAMAGE, LmdbFiles, acquire_files, release_files
from hornbeam_state.backends.records import (
    KEPT_OF_LONG_KEY,
    LONGEST_PLAIN_KEY,
    PLAIN_HEADER,
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

    from hornbeam_state.backends.write_guard import WriteGuard
    from hornbeam_state.config import StoreConfig

P = ParamSpec("P")
T = TypeVar("T")

_EVICTIONS: Final = b"evictions"
_EVICT_ABOVE: Final = 0.75  # of the cache's size: copy-on-write needs the rest for its old pages
_EVICT_AT_ONCE: Final = 64
_LOOP_PATIENCE: Final = 0.002
"""Seconds an event loop waits for another writer before a thread waits instead."""


class _Busy(StoreUnavailable):
    """Another writer did not finish in time."""


class EmbeddedBackend:
    """A store in LMDB files of one directory (see `backends.base` for the contract).

    Opened lazily in the process that uses it and, after a fork, anew in the child: an inherited
    LMDB environment must not be used there.

    Args:
        config: A store of scheme ``lmdb``, or ``memory`` for a private temporary directory that
            goes away with the process.
        clock: Returns seconds since the epoch; tests pass their own.
    """

    def __init__(self, config: StoreConfig, *, clock: Callable[[], float] = time.time) -> None:
        self._config = config
        self._opening = threading.Lock()
        self._files: LmdbFiles | None = None
        self._held: weakref.WeakSet[KernelLock] = weakref.WeakSet()
        self._keyspaces = {space: EmbeddedKeyspace(self, space, clock) for space in SPACES}
        _backends.add(self)

    @property
    def directory(self) -> Path:
        """The directory in use; opens the store to know it."""
        return self.opened().directory

    @property
    def timeout(self) -> float:
        """Seconds a writer waits for another."""
        return self._config.timeout

    def keyspace(self, space: Space) -> EmbeddedKeyspace:
        """Return the key space of that name."""
        return self._keyspaces[space]

    def check(self) -> None:
        """Open the files, if not done yet."""
        self.opened()

    def opened(self) -> LmdbFiles:
        """Return the open files, opening them first where needed."""
        files = self._files
        if files is None:
            with self._opening:
                files = self._files
                if files is None:
                    files = self._files = acquire_files(self._with_directory())
        return files

    def _with_directory(self) -> StoreConfig:
        if self._config.scheme == "memory" and self._config.path is None:
            shared_memory = Path("/dev/shm")  # noqa: S108 - mkdtemp makes the directory safely
            parent = shared_memory if os.access(shared_memory, os.W_OK) else None
            path = Path(tempfile.mkdtemp(prefix="hornbeam-", dir=parent))
            self._config = replace(self._config, path=path)
            weakref.finalize(self, _remove_if_owner, path, os.getpid())
        return self._config

    def try_lock(self, name: bytes, ttl: float) -> KernelLock | None:  # noqa: ARG002
        """Take the lock if it is free; the kernel frees it when this process dies."""
        held = try_kernel_lock(self.opened().directory / "locks", name)
        if held is not None:
            self._held.add(held)
        return held

    async def atry_lock(self, name: bytes, ttl: float) -> KernelLock | None:
        """Awaitable twin of `try_lock`, which does not wait."""
        return self.try_lock(name, ttl)

    def close(self) -> None:
        """Close the files once no other backend of this process uses them."""
        with self._opening:
            files, self._files = self._files, None
            for keyspace in self._keyspaces.values():
                keyspace.detach()
        if files is not None:
            release_files(files)

    async def aclose(self) -> None:
        """Awaitable twin of `close`."""
        self.close()

    def forget_after_fork(self) -> None:
        """Drop, in a forked child, all that belongs to the parent."""
        self._opening = threading.Lock()
        self._files = None
        for keyspace in self._keyspaces.values():
            keyspace.detach(forked=True)
        for held in list(self._held):
            held.close_after_fork()


class EmbeddedKeyspace:
    """The keys of one space; see `backends.base.Keyspace` for what each operation means."""

    def __init__(self, backend: EmbeddedBackend, space: Space, clock: Callable[[], float]) -> None:
        self._backend = backend
        self._space: Space = space
        self._clock = clock
        self._db: Any = None
        self._begin: Callable[..., Any] = self._open_and_begin
        self._guard: WriteGuard | None = None
        self._evicts = space == "cache"

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
        environment, db = self._backend.opened().databases[self._space]
        self._db = db  # before _begin: whoever sees the new method must see the new handle
        self._begin = environment.begin
        return environment.begin(db, *arguments)

    # Reads. `begin` and `abort` by hand: a `with` block costs a tenth of a microsecond more.

    def get(self, key: bytes) -> bytes | None:
        """Return the value, or None."""
        try:
            txn = self._begin(self._db)
            try:
                record = txn.get(key if len(key) <= LONGEST_PLAIN_KEY else stored_key(key))
            finally:
                txn.abort()
        except lmdb.Error as error:
            raise self._translated(error) from error
        if record is None:
            return None
        if record.startswith(PLAIN_HEADER):
            return record[len(PLAIN_HEADER) :]  # type: ignore[no-any-return]
        return self._value(record)

    async def aget(self, key: bytes) -> bytes | None:
        """Awaitable twin of `get`: direct, since it takes less than handing it to a thread."""
        return self.get(key)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the values in order, all from one snapshot."""
        with self._transaction() as txn:
            records = [txn.get(stored_key(key)) for key in keys]
        return [None if record is None else self._value(record) for record in records]

    async def aget_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Awaitable twin of `get_many`."""
        return self.get_many(keys)

    def ttl(self, key: bytes) -> float | None:
        """Return the seconds left, or None; KeyError when absent."""
        with self._transaction() as txn:
            record = txn.get(stored_key(key))
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
            return sorted(key for _, key, record in _under(txn, prefix) if self._is_live(record))

    async def akeys(self, prefix: bytes = b"") -> list[bytes]:
        """Awaitable twin of `keys`; in a thread, since it may take long."""
        return await asyncio.to_thread(self.keys, prefix)

    def usage(self, prefix: bytes = b"") -> Usage:
        """Count by LMDB's own statistics; under a prefix, by walking it.

        Without a prefix, expired keys count until something removes them.
        """
        with self._transaction(buffers=True) as txn:
            if prefix:
                sizes = [len(stored) + len(record) for stored, _, record in _under(txn, prefix)]
                entries, used = len(sizes), sum(sizes)
            else:
                statistics = txn.stat(self._db)
                entries, used = statistics["entries"], _pages(statistics) * statistics["psize"]
            return Usage(entries=entries, bytes=used, evictions=self._evictions(txn))

    async def ausage(self, prefix: bytes = b"") -> Usage:
        """Awaitable twin of `usage`; in a thread, since it may take long."""
        return await asyncio.to_thread(self.usage, prefix)

    # Writes. Each is a function of a transaction; `_write` and `_awrite` run it.

    def put(self, key: bytes, value: bytes, ttl: float | None = None) -> None:
        """Store the value and replace the expiry."""
        self._write(self._put, {key: value}, ttl)

    async def aput(self, key: bytes, value: bytes, ttl: float | None = None) -> None:
        """Awaitable twin of `put`."""
        await self._awrite(self._put, {key: value}, ttl)

    def put_many(self, items: Mapping[bytes, bytes], ttl: float | None = None) -> None:
        """Store all items in one transaction."""
        self._write(self._put, items, ttl)

    async def aput_many(self, items: Mapping[bytes, bytes], ttl: float | None = None) -> None:
        """Awaitable twin of `put_many`."""
        await self._awrite(self._put, items, ttl)

    def _put(self, txn: Any, items: Mapping[bytes, bytes], ttl: float | None) -> None:
        expiry = self._expiry(ttl)
        for key, value in items.items():
            txn.put(stored_key(key), make_record(key, value, expiry))
        if self._evicts:
            self._make_room(txn)

    def add(self, key: bytes, value: bytes, ttl: float | None = None) -> bool:
        """Store the value if the key is absent."""
        return self._write(self._cas, key, None, value, ttl)

    async def aadd(self, key: bytes, value: bytes, ttl: float | None = None) -> bool:
        """Awaitable twin of `add`."""
        return await self._awrite(self._cas, key, None, value, ttl)

    def cas(
        self, key: bytes, expected: bytes | None, value: bytes, ttl: float | None = None
    ) -> bool:
        """Store the value if the present one is as expected."""
        return self._write(self._cas, key, expected, value, ttl)

    async def acas(
        self, key: bytes, expected: bytes | None, value: bytes, ttl: float | None = None
    ) -> bool:
        """Awaitable twin of `cas`."""
        return await self._awrite(self._cas, key, expected, value, ttl)

    def _cas(
        self, txn: Any, key: bytes, expected: bytes | None, value: bytes, ttl: float | None
    ) -> bool:
        record = txn.get(stored_key(key))
        if (None if record is None else self._value(record)) != expected:
            return False
        txn.put(stored_key(key), make_record(key, value, self._expiry(ttl)))
        return True

    def incr(self, key: bytes, delta: int, ttl: float | None = None) -> int:
        """Add to a counter and return the sum."""
        return self._write(self._incr, key, delta, ttl)

    async def aincr(self, key: bytes, delta: int, ttl: float | None = None) -> int:
        """Awaitable twin of `incr`."""
        return await self._awrite(self._incr, key, delta, ttl)

    def _incr(self, txn: Any, key: bytes, delta: int, ttl: float | None) -> int:
        stored = stored_key(key)
        record = txn.get(stored)
        if record is None or not self._is_live(record):
            total, expiry = delta, self._expiry(ttl)
        else:
            total = parse_counter(payload(record)) + delta
            expiry = expiry_of(record)
        if not COUNTER_MIN <= total <= COUNTER_MAX:
            raise CounterOverflow("the counter would leave 64 bits; it was not changed")
        txn.put(stored, make_record(key, b"%d" % total, expiry))
        return total

    def delete(self, key: bytes) -> bool:
        """Remove the key."""
        return self._write(self._delete, key)

    async def adelete(self, key: bytes) -> bool:
        """Awaitable twin of `delete`."""
        return await self._awrite(self._delete, key)

    def _delete(self, txn: Any, key: bytes) -> bool:
        record = txn.pop(stored_key(key))
        return record is not None and self._is_live(record)

    def clear(self, prefix: bytes = b"") -> int:
        """Remove the keys under the prefix in one transaction."""
        return self._write(self._clear, prefix)

    async def aclear(self, prefix: bytes = b"") -> int:
        """Awaitable twin of `clear`; in a thread, since it may take long."""
        return await asyncio.to_thread(self.clear, prefix)

    def _clear(self, txn: Any, prefix: bytes) -> int:
        found = [(stored, self._is_live(record)) for stored, _, record in _under(txn, prefix)]
        for stored, _ in found:
            txn.delete(stored)
        return sum(live for _, live in found)

    # Parts.

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
        return self._guarded(self._backend.timeout, body, *args)

    async def _awrite(
        self, body: Callable[Concatenate[Any, P], T], *args: P.args, **_: P.kwargs
    ) -> T:
        """Awaitable twin of `_write`: in a thread only if another writer makes it wait."""
        try:
            return self._guarded(_LOOP_PATIENCE, body, *args)
        except _Busy:
            return await asyncio.to_thread(self._guarded, self._backend.timeout, body, *args)

    def _guarded(self, patience: float, body: Callable[..., T], *args: Any) -> T:
        guard = self._guard or self._open_guard()
        if not guard.acquire(patience):
            raise _Busy(
                f"another process has been writing to the store in {self._backend.directory} for "
                f"{patience} s: it is stopped or starved of CPU. Nothing was written"
            )
        try:
            with self._begin(self._db, None, True) as txn:
                return body(txn, *args)
        except lmdb.Error as error:
            raise self._translated(error) from error
        finally:
            guard.release()

    def _open_guard(self) -> WriteGuard:
        self._guard = self._backend.opened().guards[self._space]
        return self._guard

    def _translated(self, error: lmdb.Error) -> StoreError:
        """Turn a driver's error into one of ours; a commit that failed changed nothing."""
        directory = self._backend.directory
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

    def _value(self, record: bytes) -> bytes | None:
        return payload(record) if self._is_live(record) else None

    def _evictions(self, txn: Any) -> int:
        meta = self._backend.opened().cache_meta
        return int(bytes(txn.get(_EVICTIONS, b"0", db=meta))) if self._evicts else 0

    def _make_room(self, txn: Any) -> None:
        """Remove entries while the cache holds more than its share of the file.

        The hand walks the keys in order and goes on where it stopped. Cache keys end in a
        digest, so that is random eviction.
        """
        files = self._backend.opened()
        statistics = txn.stat(self._db)
        if _pages(statistics) * statistics["psize"] <= files.cache_size * _EVICT_ABOVE:
            return
        with txn.cursor() as cursor:
            present = cursor.set_range(files.eviction_hand) or cursor.first()
            removed = 0
            while present and removed < _EVICT_AT_ONCE:
                present = cursor.delete()
                removed += 1
            files.eviction_hand = cursor.key() if present else b"\0"
        txn.put(_EVICTIONS, b"%d" % (self._evictions(txn) + removed), db=files.cache_meta)


def _remove_if_owner(path: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(path, ignore_errors=True)


def _under(txn: Any, prefix: bytes) -> Iterator[tuple[bytes, bytes, memoryview]]:
    """Yield stored key, full key and record of every key under the prefix, expired ones too."""
    kept = prefix[:KEPT_OF_LONG_KEY]
    with txn.cursor() as cursor:
        if not (cursor.set_range(kept) if kept else cursor.first()):
            return
        for stored, record in cursor.iternext():
            if stored[: len(kept)] != kept:
                return
            key = full_key(memoryview(stored), memoryview(record))
            if key.startswith(prefix):
                yield bytes(stored), key, memoryview(record)


def _pages(statistics: Mapping[str, int]) -> int:
    return sum(statistics[kind] for kind in ("branch_pages", "leaf_pages", "overflow_pages"))


_backends: weakref.WeakSet[EmbeddedBackend] = weakref.WeakSet()  # to be told of a fork


def _forget_after_fork() -> None:
    for backend in list(_backends):
        backend.forget_after_fork()


os.register_at_fork(after_in_child=_forget_after_fork)
