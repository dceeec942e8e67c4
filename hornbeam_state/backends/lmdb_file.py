"""One LMDB file of a store: its environment, its databases and what goes with them."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import lmdb

from hornbeam_state.backends.blobs import Blobs
from hornbeam_state.backends.data_file import damaged
from hornbeam_state.backends.write_guard import make_write_guard
from hornbeam_state.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hornbeam_state.backends.base import Space

DAMAGE: Final = (
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.InvalidError,
    lmdb.VersionMismatchError,
    lmdb.PanicError,
)
"""LMDB's errors that mean a damaged file."""

_CHECK_READERS_EVERY: Final = 1000
_CLOSING_PATIENCE: Final = 5.0


class LmdbFile:
    """An open LMDB environment.

    Args:
        path: The data file.
        spaces: The key spaces in it.
        map_size: Most bytes it may grow to.
        durable: Whether a commit waits for the disk.
        fresh: Nobody else has the store open.
        timeout: Seconds to wait for another writer where a new file needs a write.

    Attributes:
        environment: The environment.
        databases: The handle of each key space.
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
        spaces: Sequence[Space],
        *,
        map_size: int,
        durable: bool,
        fresh: bool,
        timeout: float,
    ) -> None:
        self.path = path
        self.durable = durable
        self.guard = make_write_guard(path.with_suffix(".guard"), fresh=fresh)
        self.environment = _open(path, map_size, durable=durable)
        self._writes = 0
        try:
            self._open_databases(spaces, timeout)
        except BaseException:
            self.environment.close()
            raise

    def _open_databases(self, spaces: Sequence[Space], timeout: float) -> None:
        # py-lmdb opens a database in a write transaction, even one that exists.
        if not self.guard.acquire(timeout):
            raise StoreUnavailable(
                f"cannot open {self.path}: another process has been writing to it for {timeout} s; "
                f"it is stopped or starved of CPU"
            )
        try:
            open_db = self.environment.open_db
            self.databases = {space: open_db(space.encode()) for space in spaces}
            self.index = open_db(b"expiry")
            self.meta = open_db(b"meta")
            references = open_db(b"blobs")
        except lmdb.Error as error:
            raise damaged(self.path, str(error)) from error
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
        max_readers=2048,
        max_dbs=8,
        max_spare_txns=0,
        lib_version=0,
    )


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
