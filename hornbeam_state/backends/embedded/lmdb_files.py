"""The files of a store directory, opened once for everything in this process.

LMDB must not open a file twice in one process, and must not use after a fork what was opened
before it: this module keeps both rules.
"""

from __future__ import annotations

import os
import shutil
import threading
from typing import TYPE_CHECKING, Final, Literal

from hornbeam_state.backends.base import Space
from hornbeam_state.backends.directory import prepare_directory, write_note
from hornbeam_state.backends.embedded import mailboxes, subscribers
from hornbeam_state.backends.embedded.eviction import Sketch
from hornbeam_state.backends.embedded.lmdb_file import LmdbFile
from hornbeam_state.backends.embedded.presence import Presence
from hornbeam_state.backends.embedded.snapshots import take_snapshot
from hornbeam_state.errors import StoreUnavailable

if TYPE_CHECKING:
    from pathlib import Path

    from hornbeam_state.config import StoreConfig

Database = Space | Literal["messages"]

_STATE_MAP: Final = 1 << 40
"""Bytes reserved for the state file in every process: address space, not memory or disk."""

_MESSAGES_MAP: Final = 1 << 34
"""Most bytes of messages that wait, without those that lie in files of their own."""


class LmdbFiles:
    """The open files of one directory, shared by all backends of this process.

    Attributes:
        directory: Where they lie.
        state: What is never evicted: the spaces ``app`` and ``sys``.
        cache: What is.
        state_size: Most bytes that the state's pages in use may take.
        cache_size: Most bytes that the cache's file may take.
        sketch: How often the cache's keys are used.

    Raises:
        StoreUnavailable: a file cannot be opened or is damaged.
    """

    def __init__(self, config: StoreConfig, directory: Path) -> None:
        self.directory = directory
        self.state_size = config.state_size
        self.users = 0
        self._timeout = config.timeout
        self._snapshot_of = 0
        self._messages: LmdbFile | None = None
        self._opening_messages = threading.Lock()
        self._opened: list[LmdbFile] = []
        self._presence = Presence(directory)
        try:
            fresh = self._presence.alone
            if fresh:
                _remove_messages(directory)
            self.cache_size = _agreed_cache_size(directory, config.cache_size, decide=fresh)
            self.state = LmdbFile(
                directory / "state.lmdb",
                ("app", "sys"),
                map_size=max(_STATE_MAP, 2 * config.state_size),
                durable=config.durability == "commit",
                fresh=fresh,
                timeout=config.timeout,
            )
            self._opened.append(self.state)
            self.cache = LmdbFile(
                directory / "cache.lmdb",
                ("cache",),
                map_size=self.cache_size,
                durable=False,
                fresh=fresh,
                timeout=config.timeout,
            )
            self._opened.append(self.cache)
            self.sketch = Sketch(directory / "cache.sketch")
            self._presence.welcome_others()
        except BaseException:
            self.close()
            raise

    def file(self, database: Database) -> LmdbFile:
        """Return the file that holds a database."""
        if database == "messages":
            return self._messages or self._open_messages()
        return self.cache if database == "cache" else self.state

    def has_messages(self) -> bool:
        """Return whether anyone has published or subscribed since the store was opened first."""
        return (self.directory / "messages.lmdb").exists()

    def _open_messages(self) -> LmdbFile:
        with self._opening_messages:
            if self._messages is None:
                self._messages = LmdbFile(
                    self.directory / "messages.lmdb",
                    (*mailboxes.DATABASES, subscribers.DATABASE),
                    map_size=_MESSAGES_MAP,
                    durable=False,
                    fresh=False,
                    timeout=self._timeout,
                )
                self._opened.append(self._messages)
            return self._messages

    def forget_dead_readers(self) -> bool:
        """Free the reader slots that killed processes left behind; nothing more to do then."""
        for file in self._opened:
            file.environment.reader_check()
        return False

    def take_snapshot_if_changed(self) -> bool:
        """Take a snapshot of the state file if it was written to; nothing more to do then."""
        newest = self.state.environment.info()["last_txnid"]
        if newest != self._snapshot_of:
            take_snapshot(self.state.environment, self.state.path)
            self._snapshot_of = newest
        return False

    def close(self) -> None:
        """Close the files."""
        for file in self._opened:
            file.close()
        self._presence.end()

    def forget_after_fork(self) -> None:
        """Give up, in a forked child, what belongs to the parent.

        Closing an inherited environment would free the parent's reader slots; dropping the last
        reference to it does not, as long as no read transaction is kept for reuse
        (``max_spare_txns=0``): freeing a kept one breaks the parent's next read.
        """
        self._presence.end()


def _remove_messages(directory: Path) -> None:
    """Remove what was published before; whoever it was for is gone."""
    for name in ("messages.lmdb", "messages.lmdb-lock", "messages.guard"):
        (directory / name).unlink(missing_ok=True)
    for name in ("messages.blobs", "inboxes"):
        shutil.rmtree(directory / name, ignore_errors=True)


def _agreed_cache_size(directory: Path, wanted: int, *, decide: bool) -> int:
    """Return the cache's size for all processes: the first one to open the store decides."""
    note = directory / "cache-size"
    if not decide:
        try:
            return int(note.read_text("ascii"))
        except (OSError, ValueError):
            return wanted
    write_note(note, str(wanted))
    return wanted


# The open files of this process by directory.
_open_files: dict[Path, LmdbFiles] = {}
_open_files_lock = threading.Lock()


def acquire_files(config: StoreConfig) -> LmdbFiles:
    """Open a store's files, or share those this process has open already.

    Raises:
        StoreUnavailable: they cannot be used; the message says what to do.
    """
    try:
        directory = prepare_directory(config).resolve()
        with _open_files_lock:
            if directory not in _open_files:
                _open_files[directory] = LmdbFiles(config, directory)
            files = _open_files[directory]
            files.users += 1
            return files
    except OSError as error:
        raise StoreUnavailable(
            f"cannot open the store {config.safe_url}: "
            f"{' '.join(filter(None, (error.filename, error.strerror)))}"
        ) from error


def release_files(files: LmdbFiles) -> None:
    """Close the files if nobody else of this process uses them."""
    with _open_files_lock:
        files.users -= 1
        if files.users:
            return
        del _open_files[files.directory]
        files.close()


def _forget_after_fork() -> None:
    global _open_files_lock  # noqa: PLW0603 - one held by another thread at the fork stays held
    _open_files_lock = threading.Lock()
    for files in _open_files.values():
        files.forget_after_fork()
    _open_files.clear()


os.register_at_fork(after_in_child=_forget_after_fork)
