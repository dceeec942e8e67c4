"""Snapshots of the state file, and what becomes of a file that a power failure damaged.

With ``durability=process`` commits go to the page cache. They survive any process; when the
machine itself stops, LMDB's file may be left damaged, since the kernel writes its pages in any
order. So one process takes a snapshot now and then, which is written in full before it takes its
name, and the first process after a reboot verifies the file and falls back to the snapshot.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lmdb

from hornbeam_state.backends.directory import write_note
from hornbeam_state.errors import StoreFull, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def snapshot_of(data_file: Path) -> Path:
    """Return where the snapshot of a data file lies."""
    return data_file.with_suffix(".snapshot")


def take_snapshot(environment: Any, data_file: Path) -> None:
    """Write a compact copy of an open environment, complete on the disk or not at all.

    Raises:
        StoreFull: the disk has no room for it; the last snapshot is kept.
        StoreUnavailable: it cannot be written.
    """
    try:
        _write_copy(environment, data_file)
    except (OSError, lmdb.Error) as error:
        if shutil.disk_usage(data_file.parent).free < data_file.stat().st_size:
            raise StoreFull(f"no room on the disk for a snapshot of {data_file}") from error
        raise StoreUnavailable(f"cannot write a snapshot of {data_file}: {error}") from error


def _write_copy(environment: Any, data_file: Path) -> None:
    descriptor, name = tempfile.mkstemp(prefix=".new-", dir=data_file.parent)
    try:
        environment.copyfd(descriptor, compact=True)
        os.fsync(descriptor)
        Path(name).rename(snapshot_of(data_file))
        _sync_directory(data_file.parent)
    finally:
        Path(name).unlink(missing_ok=True)
        os.close(descriptor)


def recover(data_file: Path, problem: str, check: Callable[[Path], None]) -> str:
    """Put the snapshot in the place of a damaged data file, which is kept beside it.

    Args:
        data_file: The damaged file.
        problem: What is wrong with it.
        check: Raises `StoreUnavailable` for a damaged file.

    Returns:
        What was done, to be told loudly.

    Raises:
        StoreUnavailable: there is no snapshot, or it is damaged too; nothing was changed.
    """
    snapshot = snapshot_of(data_file)
    if not snapshot.exists():
        raise StoreUnavailable(
            f"the store file {data_file} was damaged when the machine stopped ({problem}), and "
            f"there is no snapshot of it. Nothing was changed. Restore it from a backup, or start "
            f"afresh by moving it away: mv {data_file} {data_file}.damaged"
        )
    check(snapshot)
    age = time.time() - snapshot.stat().st_mtime
    quarantine = data_file.with_name(f"{data_file.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
    data_file.rename(quarantine)
    shutil.copyfile(snapshot, data_file)
    _sync_directory(data_file.parent)
    return (
        f"the store file {data_file} was damaged when the machine stopped ({problem}): it is now "
        f"the snapshot of {age:.0f} s ago, and what was written since is lost. The damaged file "
        f"is kept as {quarantine}"
    )


def is_first_after_reboot(directory: Path) -> bool:
    """Return whether the machine was started anew since the store was last opened."""
    try:
        return (directory / "boot").read_text("ascii") != _boot_id()
    except OSError:
        return False


def was_opened_before(directory: Path) -> bool:
    """Return whether the store's files were found sound before."""
    return (directory / "boot").exists()


def note_boot(directory: Path) -> None:
    """Note that the files were found sound in this run of the machine."""
    write_note(directory / "boot", _boot_id())


def _boot_id() -> str:
    """Return what identifies this run of the machine."""
    try:
        return _BOOT_ID.read_text("ascii").strip()
    except OSError:
        return "unknown"


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
