"""One LMDB file of a store: its environment, its databases and what goes with them."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import lmdb

from hornbeam_state.backends.embedded.blobs import Blobs
from hornbeam_state.backends.embedded.data_file import check_while_shared, damaged
from hornbeam_state.backends.embedded.write_guard import make_write_guard
from hornbeam_state.backends.mapped_file import reserve
from hornbeam_state.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

DAMAGE: Final = (
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.InvalidError,
    lmdb.VersionMismatchError,
    lmdb.PanicError,
)
"""LMDB's errors that mean a damaged file."""

_MOST_READERS: Final = 2048
_LOCK_FILE_SIZE: Final = 64 * _MOST_READERS + 128  # what LMDB 0.9 makes of so many readers
_CHECK_READERS_EVERY: Final = 1000
_CLOSING_PATIENCE: Final = 5.0


class LmdbFile:
    """An open LMDB environment.

    Args:
        path: The data file.
        databases: The names of what it holds beside expiries and bookkeeping.
        map_size: Most bytes it may grow to.
        durable: Whether a commit waits for the disk.
        fresh: Nobody else has the store open.
        timeout: Seconds to wait for another writer where a new file needs a write.

    Attributes:
        environment: The environment.
        databases: The handle of each of these.
        index: The database of expiries.
        meta: The database for bookkeeping.
        blobs: The large values.
        guard: What to hold while writing.

    Raises:
        StoreUnavailable: the file cannot be opened or is damaged.
    """

    def __init__(
        self,
        path: Path,
        databases: Sequence[str],
        *,
        map_size: int,
        durable: bool,
        fresh: bool,
        timeout: float,
    ) -> None:
        self.path = path
        self.durable = durable
        self.guard = make_write_guard(path.with_suffix(".guard"), fresh=fresh)
        self._writes = 0
        new = fresh and not (path.exists() and path.stat().st_size)
        try:
            self.environment = _open(path, map_size, durable=durable)
        except StoreUnavailable:
            if new:  # on a full disk LMDB leaves half a header, which would look like damage
                path.unlink(missing_ok=True)
            raise
        try:
            suspect = not fresh and self._looks_damaged()
            self._open_databases(databases, timeout, suspect=suspect)
        except BaseException:
            self.environment.close()
            raise

    def _looks_damaged(self) -> bool:
        """Look at a file that others are writing to, without making them wait.

        Their writes may look like damage, which has to be looked at again with the guard held. A
        read transaction would keep the pages in place, and leave a small cache without room.
        """
        try:
            check_while_shared(self.path)
        except StoreUnavailable:
            return True
        return False

    def _open_databases(self, names: Sequence[str], timeout: float, *, suspect: bool) -> None:
        # py-lmdb opens a database in a write transaction, even one that exists.
        if not self.guard.acquire(timeout):
            raise StoreUnavailable(
                f"cannot open {self.path}: another process has been writing to it for {timeout} s; "
                f"it is stopped or starved of CPU"
            )
        try:
            if suspect:
                check_while_shared(self.path)
            open_db = self.environment.open_db
            self.databases = {name: open_db(name.encode()) for name in names}
            self.index = open_db(b"expiry")
            self.meta = open_db(b"meta")
            references = open_db(b"blobs")
        except DAMAGE as error:
            raise damaged(self.path, str(error)) from error
        except lmdb.Error as error:
            raise StoreUnavailable(f"cannot open the store file {self.path}: {error}") from error
        finally:
            self.guard.release()
        directory = self.path.with_suffix(".blobs")
        self.blobs = Blobs(directory, references, durable=self.durable)

    def used(self, txn: Any) -> int:
        """Return how many bytes its pages in use and its large values take."""
        handles = [*self.databases.values(), self.index, self.meta]
        statistics = [txn.stat(handle) for handle in handles]
        pages = sum(
            one["branch_pages"] + one["leaf_pages"] + one["overflow_pages"] for one in statistics
        )
        return int(pages * statistics[0]["psize"]) + self.blobs.size(txn)

    def count_write(self) -> None:
        """Free, now and then, the reader slots of killed processes, which keep old pages alive."""
        self._writes += 1
        if self._writes % _CHECK_READERS_EVERY == 0:
            self.environment.reader_check()

    def close(self) -> None:
        """Close the environment, once no thread is writing.

        The guard stays mapped for as long as a thread may be waiting for it.
        """
        taken = self.guard.acquire(_CLOSING_PATIENCE)
        try:
            self.environment.close()
        finally:
            if taken:
                self.guard.release()


def _open(path: Path, map_size: int, *, durable: bool) -> Any:
    """Open an environment.

    ``writemap`` would make writes four times as fast, and a full disk a SIGBUS.
    """
    try:
        _reserve_lock_file(path)
        try:
            environment = _open_once(path, map_size, durable=durable)
        except lmdb.Error as error:
            if "already open in this process" not in str(error):
                raise
            _forget_inherited(path)
            environment = _open_once(path, map_size, durable=durable)
        environment.reader_check()
    except DAMAGE as error:
        raise damaged(path, str(error)) from error
    except lmdb.Error as error:
        raise StoreUnavailable(f"cannot open the store file {path}: {error}") from error
    _keep_from_children(path)
    return environment


def _open_once(path: Path, map_size: int, *, durable: bool) -> Any:
    return lmdb.open(
        str(path),
        map_size=map_size,
        subdir=False,
        sync=durable,
        metasync=durable,
        readahead=False,
        mode=0o600,
        max_readers=_MOST_READERS,
        max_dbs=8,
        max_spare_txns=0,
        lib_version=0,
    )


def _reserve_lock_file(path: Path) -> None:
    """Allocate LMDB's table of readers, which it makes as one large hole and writes to by a map.

    Closing a descriptor of that file gives up the locks that this process has on it, so this
    must come before LMDB opens it.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    descriptor = os.open(path.with_name(f"{path.name}-lock"), flags, 0o600)
    try:
        if os.fstat(descriptor).st_blocks * 512 < _LOCK_FILE_SIZE:
            reserve(descriptor, _LOCK_FILE_SIZE)
    finally:
        os.close(descriptor)


def _forget_inherited(path: Path) -> None:
    """Have py-lmdb forget, in a forked child, an environment that only the parent uses.

    It notes the files that are open in a process, and drops the note with the environment. When
    a thread of the parent was in the middle of a transaction, its frame keeps the environment in
    the child for ever, though no thread is left to use it. py-lmdb has no other way in.
    """
    files = [file.stat() for file in (path, path.with_name(f"{path.name}-lock"))]
    stale = frozenset(("ino", file.st_dev, file.st_ino) for file in files)
    for one in gc.get_objects():
        if type(one) is set and not stale.isdisjoint(one):
            one.difference_update(stale)


def _keep_from_children(path: Path) -> None:
    """Close the file's descriptors in programs that this process starts; LMDB leaves them open."""
    folder = Path("/proc/self/fd")
    for link in folder.iterdir() if folder.exists() else ():
        try:
            target = str(link.readlink())
        except OSError:  # the one that read the folder
            continue
        if target.startswith(str(path)):
            os.set_inheritable(int(link.name), False)
