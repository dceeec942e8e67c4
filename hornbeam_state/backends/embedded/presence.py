"""Who has an embedded store open, and what the first of them checks before anyone else comes in."""

from __future__ import annotations

import fcntl
import logging
import os
import time
import warnings
from typing import TYPE_CHECKING

from hornbeam_state.backends.directory import check_namespace
from hornbeam_state.backends.embedded.data_file import check_data_file, damaged
from hornbeam_state.backends.embedded.snapshots import (
    is_first_after_reboot,
    note_boot,
    recover,
    was_opened_before,
)
from hornbeam_state.backends.kernel_locks import lock_range
from hornbeam_state.errors import StoreUnavailable

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger("hornbeam.store")


class Presence:
    """A lock that every user of a store shares, for as long as it has the store open.

    Attributes:
        alone: Nobody else has the store open. Until `welcome_others`, nobody else can.

    Raises:
        StoreUnavailable: the state file is damaged, or the store is in use by another container.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._descriptor = os.open(directory / "users", flags, 0o600)
        try:
            self.alone = self._enter()
            if self.alone:
                check_namespace(directory, alone=True)
                _check_files_alone(directory)
            else:
                check_namespace(directory, alone=False)
                check_data_file(directory / "state.lmdb", alone=False)
                check_data_file(directory / "cache.lmdb", alone=False)
        except BaseException:
            self.end()
            raise

    def welcome_others(self) -> None:
        """Let others open the store, now that its files are there and sound."""
        if self.alone:
            note_boot(self._directory)
            lock_range(self._descriptor, fcntl.F_RDLCK)

    def end(self) -> None:
        """Stop being a user; in a forked child, leave that to the parent."""
        os.close(self._descriptor)

    def _enter(self, timeout: float = 10.0) -> bool:
        """Take the lock: alone, or with others once whoever checks the files is done.

        One that checked them and failed leaves; whoever waited for it may be alone then.
        """
        deadline = time.monotonic() + timeout
        while not (alone := lock_range(self._descriptor, fcntl.F_WRLCK)):
            if lock_range(self._descriptor, fcntl.F_RDLCK):
                break
            if time.monotonic() > deadline:
                raise StoreUnavailable(
                    f"another process has been checking the store's files for {timeout:.0f} s; "
                    f"try again"
                )
            time.sleep(0.005)
        return alone


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
        check_data_file(cache, alone=True, whatever_its_size=rebooted)
    except StoreUnavailable as error:
        cache.rename(cache.with_suffix(".lmdb.damaged"))
        _say_loudly(f"{error}; it was moved away, and the cache starts empty")
    try:
        if was_opened_before(directory) and state.exists() and not state.stat().st_size:
            raise damaged(state, "it is empty, and was not when the store was last open")
        check_data_file(state, alone=True, whatever_its_size=rebooted)
    except StoreUnavailable as error:
        if not rebooted:
            raise
        _say_loudly(recover(state, str(error), _check_snapshot))


def _check_snapshot(path: Path) -> None:
    check_data_file(path, alone=True, whatever_its_size=True)


def _say_loudly(message: str) -> None:
    logger.error("%s", message)
    warnings.warn(message, RuntimeWarning, stacklevel=2)
