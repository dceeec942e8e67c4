"""Transactions on a database of the embedded store: a key space, or its messages.

A read is a transaction of its own, from one snapshot. A write holds the file's write guard and is
one LMDB transaction: committed at its end, undone by an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, Protocol, TypeVar

import lmdb

from hornbeam_state.backends.data_file import damaged
from hornbeam_state.backends.lmdb_file import DAMAGE, LmdbFile
from hornbeam_state.errors import StoreError, StoreFull, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hornbeam_state.backends.lmdb_files import Database, LmdbFiles

P = ParamSpec("P")
T = TypeVar("T")

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

    def opened(self) -> LmdbFiles:
        """Return the open files, opening them where needed."""
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

    def _bind(self) -> tuple[LmdbFiles, LmdbFile]:
        """Return the store's files and this database's, opening them where needed."""
        bound = self._bound
        if bound is None:
            writing = self._writing
            if writing is not None and writing[0] == get_ident():
                return writing[1]  # closed meanwhile: opening here would wait for ourselves
            files = self._owner.opened()
            file = files.file(self._database)
            bound = self._bound = files, file
            self._db = file.databases[self._database]
            self._begin = file.environment.begin  # after _db: who sees it must see the handle
            if not self._owner.is_open(files):  # closed meanwhile: the next use opens anew
                self.detach()
        return bound

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

    def view(self, body: Callable[..., T], *args: Any) -> T:
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

    async def _awrite(
        self, body: Callable[Concatenate[Any, P], T], *args: P.args, **_: P.kwargs
    ) -> T:
        """Awaitable twin of `_write`: in a thread only if another writer makes it wait."""
        if self._bind()[1].durable:  # waits for the disk
            return await asyncio.to_thread(self._guarded, self._owner.timeout, body, *args)
        try:
            return self._guarded(LOOP_PATIENCE, body, *args)
        except Busy:
            return await asyncio.to_thread(self._guarded, self._owner.timeout, body, *args)

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
                    f"{patience} s: it is stopped or starved of CPU. Nothing was written"
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
        if error.code in (errno.ENOSPC, errno.EDQUOT):
            return StoreFull(f"the disk under the store in {place} is full")
        if isinstance(error, DAMAGE):
            path = self._bound[1].path if self._bound else Path(place)
            return damaged(path, str(error))
        return StoreUnavailable(f"the store in {place} failed: {error}")

    def _full(self) -> StoreFull:
        name = "cache_size" if self._database == "cache" else "state_size"
        place = self._owner.place
        return StoreFull(
            f"the store in {place} has reached its {name}: delete keys, or raise the limit with "
            f"HORNBEAM_STORE=lmdb://{place}?{name}=BYTES"
        )
