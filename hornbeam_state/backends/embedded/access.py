"""Transactions on a database of the embedded store: a key space, or its messages.

A read is a transaction of its own, from one snapshot. A write holds the file's write guard and is
one LMDB transaction: committed at its end, undone by an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import shutil
import time
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, Protocol, TypeVar

import lmdb

from hornbeam_state.backends.embedded.data_file import damaged
from hornbeam_state.backends.embedded.lmdb_file import DAMAGE, LmdbFile
from hornbeam_state.errors import StoreError, StoreFull, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hornbeam_state.backends.embedded.lmdb_files import Database, LmdbFiles

P = ParamSpec("P")
T = TypeVar("T")

_NO_ROOM: Final = 1024 * 1024
"""Bytes below which a disk counts as full."""

LOOP_PATIENCE: Final = 0.002
"""Seconds an event loop waits for another writer before a thread waits instead."""

UPKEEP_PATIENCE: Final = 0.1
"""Seconds that what can be done later waits for another writer."""


class Busy(StoreUnavailable):
    """Another writer did not finish in time; nothing was written."""


class Owner(Protocol):
    """What access to a database needs of its backend."""

    @property
    def timeout(self) -> float:
        """Seconds a writer waits for another."""
        ...

    @property
    def place(self) -> str:
        """Where the store is, for messages; known without opening it."""
        ...

    def opened(self, asked: float | None = None) -> LmdbFiles:
        """Return the open files, opening them where needed; `asked`: since when this waits."""
        ...

    def is_open(self, files: LmdbFiles) -> bool:
        """Return whether these are the files in use."""
        ...


class Access:
    """Reads and writes of one database, opened at the first of them.

    Args:
        owner: The backend.
        database: Its name.
    """

    def __init__(self, owner: Owner, database: Database) -> None:
        self._owner = owner
        self._database: Database = database
        self._bound: tuple[LmdbFiles, LmdbFile] | None = None
        self._writing: tuple[int, tuple[LmdbFiles, LmdbFile]] | None = None
        self._waiting = 0  # how many tasks wait in threads for another writer
        self._db: Any = None
        self._begin: Callable[..., Any] = self._open_and_begin

    def detach(self, *, forked: bool = False) -> None:
        """Open the files again at the next use.

        The handle is dropped in a forked child only. Elsewhere a thread may be about to begin
        with the old environment, where no handle would mean LMDB's unnamed database.
        """
        self._begin = self._open_and_begin
        self._bound = None
        if forked:
            self._db = None

    def _bind(self, asked: float | None = None) -> tuple[LmdbFiles, LmdbFile]:
        """Return the store's files and this database's, opening them where needed.

        Args:
            asked: Since when the caller waits, by the monotonic clock; None: since now.
        """
        bound = self._bound
        if bound is None:
            writing = self._writing
            if writing is not None and writing[0] == get_ident():
                return writing[1]  # closed meanwhile: opening here would wait for ourselves
            files = self._owner.opened(asked)
            file = files.file(self._database)
            bound = self._bound = files, file
            self._db = file.databases[self._database]
            self._begin = file.environment.begin  # after _db: who sees it must see the handle
            if not self._owner.is_open(files):  # closed meanwhile: the next use opens anew
                self.detach()
        return bound

    async def _aopen(self) -> None:
        """Open the files where needed, in a thread: that may mean waiting, and checking them."""
        if self._bound is None:
            await asyncio.to_thread(self._bind, time.monotonic())

    def _open_and_begin(self, _db: Any, *arguments: Any) -> Any:
        file = self._bind()[1]
        return file.environment.begin(file.databases[self._database], *arguments)

    def _read_record(self, stored: bytes) -> bytes | None:
        # `begin` and `abort` by hand: a `with` block costs a tenth of a microsecond more.
        try:
            txn = self._begin(self._db)
            try:
                return txn.get(stored)  # type: ignore[no-any-return]
            finally:
                txn.abort()
        except lmdb.Error as error:
            raise self._translated(error) from error

    def _view(self, body: Callable[..., T], *args: Any) -> T:
        """Run a function in a read transaction."""
        try:
            txn = self._begin(self._db)
            try:
                return body(txn, *args)
            finally:
                txn.abort()
        except lmdb.Error as error:
            raise self._translated(error) from error

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

    def _deadline(self) -> float:
        """Return until when a write that begins now may wait, by the monotonic clock."""
        return time.monotonic() + self._owner.timeout

    def _write_by(self, deadline: float, body: Callable[..., T], *args: Any) -> T:
        """Like `_write`, where some of the time to wait may be over."""
        return self._guarded(max(deadline - time.monotonic(), 0.0), body, *args)

    async def _awrite(
        self, body: Callable[Concatenate[Any, P], T], *args: P.args, **_: P.kwargs
    ) -> T:
        """Awaitable twin of `_write`: in a thread only if another writer makes it wait.

        Waiting for a free thread counts. Where others wait already, the loop does not wait at
        all: its patience, spent anew for each of hundreds of tasks, would hold it up.
        """
        deadline = self._deadline()
        await self._aopen()
        if not self._bind()[1].durable:  # else it waits for the disk
            with contextlib.suppress(Busy):
                return self._guarded(0.0 if self._waiting else LOOP_PATIENCE, body, *args)
        self._waiting += 1
        try:
            return await asyncio.to_thread(self._write_by, deadline, body, *args)
        finally:
            self._waiting -= 1

    def _guarded(self, patience: float, body: Callable[..., T], *args: Any) -> T:
        """Run a function in a write transaction, with the guard held.

        A signal handler may raise anywhere in here, also between taking the guard and noting
        that it was taken.
        """
        bound = self._bind()
        file = bound[1]
        release = file.guard.release
        taken: bool | None = None
        try:
            taken = file.guard.acquire(patience)
            if not taken:
                raise Busy(
                    f"another process has been writing to the store in {self._owner.place} for "
                    f"longer than a writer waits: it is stopped or starved of CPU. Nothing was "
                    f"written"
                )
            self._writing = get_ident(), bound
            file.blobs.doomed.clear()  # what an undone transaction wanted removed stays
            with self._begin(self._db, None, True) as txn:
                result = body(txn, *args)
            if file.blobs.doomed:
                file.blobs.remove_doomed()
            file.count_write()
        except lmdb.Error as error:
            raise self._translated(error) from error
        except OSError as error:  # of the file of a large value
            raise self._unwritten(error) from error
        else:
            return result
        finally:
            if taken is not False:
                self._writing = None
                release()

    def remove_abandoned(self) -> None:
        """Remove the files of large values that nothing refers to."""
        self._guarded(UPKEEP_PATIENCE, self._remove_abandoned)

    def _remove_abandoned(self, txn: Any) -> None:
        for path in list(self._bind()[1].blobs.abandoned(txn)):
            path.unlink(missing_ok=True)

    def _translated(self, error: lmdb.Error) -> StoreError:
        """Turn a driver's error into one of ours; a commit that failed changed nothing."""
        place = self._owner.place
        if isinstance(error, lmdb.MapFullError):
            return self._full()
        if error.code in (errno.ENOSPC, errno.EDQUOT) or self._was_cut_short(error):
            return self._disk_full()
        if isinstance(error, DAMAGE):
            path = self._bound[1].path if self._bound else Path(place)
            return damaged(path, str(error))
        return StoreUnavailable(f"the store in {place} failed: {error}")

    def _was_cut_short(self, error: lmdb.Error) -> bool:
        """Return whether it is what LMDB makes of a write that the disk had room for in part."""
        return error.code == errno.EIO and shutil.disk_usage(self._owner.place).free < _NO_ROOM

    def _unwritten(self, error: OSError) -> StoreError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return self._disk_full()
        return StoreUnavailable(f"cannot write to the store in {self._owner.place}: {error}")

    def _disk_full(self) -> StoreFull:
        return StoreFull(f"the disk under the store in {self._owner.place} is full")

    def _full(self) -> StoreFull:
        name = "cache_size" if self._database == "cache" else "state_size"
        place = self._owner.place
        return StoreFull(
            f"the store in {place} has reached its {name}: delete keys, or raise the limit with "
            f"HORNBEAM_STORE=lmdb://{place}?{name}=BYTES"
        )
