"""The open LMDB environments of a store directory, shared by everything in one process.

LMDB must not open a file twice in one process, and must not use after a fork what was opened
before it: this module keeps both rules.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any, Final

import lmdb

from hornbeam_state.backends.blobs import Blobs
from hornbeam_state.backends.data_file import check_data_file, damaged
from hornbeam_state.backends.directory import check_namespace, prepare_directory
from hornbeam_state.backends.eviction import Sketch
from hornbeam_state.backends.kernel_locks import lock_range
from hornbeam_state.backends.snapshots import (
    is_first_after_reboot,
    note_boot,
    recover,
    take_snapshot,
)
from hornbeam_state.backends.write_guard import WriteGuard
from hornbeam_state.errors import StoreUnavailable

if TYPE_CHECKING:
    from pathlib import Path

    from hornbeam_state.backends.base import Space
    from hornbeam_state.config import StoreConfig

logger = logging.getLogger("hornbeam.store")

_FILES: Final[dict[str, tuple[Space, ...]]] = {"state": ("app", "sys"), "cache": ("cache",)}
_META_DB: Final = b"meta"
_EXPIRY_DB: Final = b"expiry"
_BLOBS_DB: Final = b"blobs"
DAMAGE: Final = (
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.InvalidError,
    lmdb.VersionMismatchError,
    lmdb.PanicError,
)
"""LMDB's errors that mean a damaged file."""


class LmdbFiles:
    """The open environments of one directory, shared by all backends of this process.

    Attributes:
        directory: Where the files lie.
        databases: Environment and database handle of each key space.
        guards: What to hold while writing to each key space.
        cache_meta: The cache file's database for its own bookkeeping.
        expiries: The index of expiries of each key space's file.
        blobs: The large values of each key space's file.
        cache_size: Most bytes the cache file may take.
        sketch: How often the cache's keys are used.
        durable: Whether a commit waits for the disk.

    Raises:
        StoreUnavailable: a file cannot be opened or is damaged.
    """

    def __init__(self, config: StoreConfig, directory: Path) -> None:
        self.directory = directory
        self.cache_size = config.cache_size
        self.durable = config.durability == "commit"
        self.users = 0
        self._snapshot_of = 0
        self._environments: dict[str, Any] = {}
        self.databases: dict[Space, tuple[Any, Any]] = {}
        self.expiries: dict[Space, Any] = {}
        self.blobs: dict[Space, Blobs] = {}
        self._presence, alone = _announce_presence(directory)
        try:
            self.guards: dict[Space, WriteGuard] = {}
            for name, spaces in _FILES.items():
                guard = WriteGuard(directory / f"{name}.guard", fresh=alone)
                self.guards.update(dict.fromkeys(spaces, guard))
            if alone:
                _wait_for_shared_lock(self._presence)
            self._open_all({"state": config.state_size, "cache": config.cache_size})
        except BaseException:
            self.close()
            raise

    def _open_all(self, sizes: dict[str, int]) -> None:
        for name, spaces in _FILES.items():
            durable = self.durable and name == "state"
            environment = _open(self.directory / f"{name}.lmdb", sizes[name], durable=durable)
            self._environments[name] = environment
            index = environment.open_db(_EXPIRY_DB)
            references = environment.open_db(_BLOBS_DB)
            blobs = Blobs(self.directory / f"{name}.blobs", references, durable=durable)
            for space in spaces:
                self.blobs[space] = blobs
                self.expiries[space] = index
                self.databases[space] = (environment, environment.open_db(space.encode()))
        self.cache_meta = self._environments["cache"].open_db(_META_DB)
        self.sketch = Sketch(self.directory / "cache.sketch")

    def forget_dead_readers(self) -> bool:
        """Free the reader slots that killed processes left behind; nothing more to do then."""
        for environment in self._environments.values():
            environment.reader_check()
        return False

    def take_snapshot_if_changed(self) -> bool:
        """Take a snapshot of the state file if it was written to; nothing more to do then."""
        environment = self._environments["state"]
        newest = environment.info()["last_txnid"]
        if newest != self._snapshot_of:
            take_snapshot(environment, self.directory / "state.lmdb")
            self._snapshot_of = newest
        return False

    def close(self) -> None:
        """Close the environments."""
        for environment in self._environments.values():
            environment.close()
        os.close(self._presence)

    def forget_after_fork(self) -> None:
        """Give up, in a forked child, what belongs to the parent.

        Closing an inherited environment would free the parent's reader slots; dropping the last
        reference to it does not, as long as no read transaction is kept for reuse
        (``max_spare_txns=0``): freeing a kept one breaks the parent's next read.
        """
        os.close(self._presence)


# The open files of this process by directory: LMDB must not open one twice.
_open_files: dict[Path, LmdbFiles] = {}
_open_files_lock = threading.Lock()


def acquire_files(config: StoreConfig) -> LmdbFiles:
    """Open a store's files, or share those this process has open already."""
    directory = prepare_directory(config).resolve()
    with _open_files_lock:
        if directory not in _open_files:
            _open_files[directory] = LmdbFiles(config, directory)
        files = _open_files[directory]
        files.users += 1
        return files


def release_files(files: LmdbFiles) -> None:
    """Close the files if nobody else of this process uses them."""
    with _open_files_lock:
        files.users -= 1
        if files.users == 0:
            del _open_files[files.directory]
            files.close()


def _forget_after_fork() -> None:
    global _open_files_lock  # noqa: PLW0603 - one held by another thread at the fork stays held
    _open_files_lock = threading.Lock()
    for files in _open_files.values():
        files.forget_after_fork()
    _open_files.clear()


os.register_at_fork(after_in_child=_forget_after_fork)


def _open(path: Path, size: int, *, durable: bool) -> Any:
    """Open one data file.

    ``writemap`` would make writes four times as fast, and a full disk a SIGBUS.
    """
    try:
        environment = lmdb.open(
            str(path),
            map_size=size,
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
        environment.reader_check()
    except DAMAGE as error:
        raise damaged(path, str(error)) from error
    except lmdb.Error as error:
        raise StoreUnavailable(f"cannot open the store file {path}: {error}") from error
    return environment


def _announce_presence(directory: Path) -> tuple[int, bool]:
    """Lock the store as one of its users; whoever finds nobody else there checks the files first.

    Returns:
        The descriptor that holds the lock, and whether the process is alone. One that is has to
        make room for others with `_wait_for_shared_lock` when it is done.
    """
    descriptor = os.open(directory / "users", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        alone = lock_range(descriptor, fcntl.F_WRLCK)
        check_namespace(directory, alone=alone)
        if alone:
            _check_files_alone(directory)
        else:
            for name in _FILES:
                check_data_file(directory / f"{name}.lmdb", thorough=False)
            _wait_for_shared_lock(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, alone


def _check_files_alone(directory: Path) -> None:
    """Check the data files while nobody else has them open, and mend what can be mended.

    The cache can be computed anew, so a damaged one is set aside. The state falls back to its
    snapshot only where a reboot explains the damage; else somebody should have a look.

    Raises:
        StoreUnavailable: the state file is damaged and stays as it is.
    """
    cache, state = directory / "cache.lmdb", directory / "state.lmdb"
    rebooted = is_first_after_reboot(directory)
    try:
        check_data_file(cache, thorough=True, whatever_its_size=rebooted)
    except StoreUnavailable as error:
        cache.rename(cache.with_suffix(".lmdb.damaged"))
        _say_loudly(f"{error}; it was moved away, and the cache starts empty")
    try:
        check_data_file(state, thorough=True, whatever_its_size=rebooted)
    except StoreUnavailable as error:
        if not rebooted:
            raise
        _say_loudly(recover(state, str(error), _check_snapshot))
    note_boot(directory)


def _check_snapshot(path: Path) -> None:
    check_data_file(path, thorough=True, whatever_its_size=True)


def _say_loudly(message: str) -> None:
    logger.error("%s", message)
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _wait_for_shared_lock(descriptor: int, timeout: float = 10.0) -> None:
    """Turn the lock into a shared one, once whoever checks the files is done."""
    deadline = time.monotonic() + timeout
    while not lock_range(descriptor, fcntl.F_RDLCK):
        if time.monotonic() > deadline:
            raise StoreUnavailable(
                f"another process has been checking the store's files for {timeout:.0f} s; "
                f"try again"
            )
        time.sleep(0.005)
