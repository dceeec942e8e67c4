"""The embedded store: LMDB, one machine, any number of processes, no server.

Three files, so that their writers do not wait for each other: ``state`` for the app's and
hornbeam's keys, which are never evicted, ``cache``, which is bounded and evicts, and ``messages``,
which is made when the first process publishes or subscribes, and goes with the last.

Commits go to the page cache, not to the disk: they survive ``kill -9`` of any process.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hornbeam_state.backends.base import SPACES, Space
from hornbeam_state.backends.embedded.cache import CacheKeyspace
from hornbeam_state.backends.embedded.keys import EmbeddedKeyspace
from hornbeam_state.backends.embedded.lmdb_files import LmdbFiles, acquire_files, release_files
from hornbeam_state.backends.embedded.messages import Messages
from hornbeam_state.backends.embedded.upkeep import Duty, Upkeep
from hornbeam_state.backends.kernel_locks import KernelLock, try_kernel_lock
from hornbeam_state.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from hornbeam_state.backends.base import Topics
    from hornbeam_state.backends.embedded.access import Access
    from hornbeam_state.backends.embedded.inbox import EmbeddedInbox
    from hornbeam_state.config import StoreConfig

_SWEEP_EVERY: Final = 1.0
_SWEEP_STEP: Final = 200
_READERS_EVERY: Final = 60.0
_ABANDONED_EVERY: Final = 600.0
_SUBSCRIBERS_EVERY: Final = 10.0


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
        self._failed: tuple[float, str] | None = None  # when opening failed last, and why
        self._open = _Open()
        self._held: weakref.WeakSet[KernelLock] = weakref.WeakSet()
        self._keyspaces: dict[Space, EmbeddedKeyspace] = {
            space: (CacheKeyspace if space == "cache" else EmbeddedKeyspace)(self, space, clock)
            for space in SPACES
        }
        self._messages = Messages(self)
        # What nobody uses any more is closed. The collector runs anywhere, also inside of locks.
        weakref.finalize(self, self._open.close_from_elsewhere).atexit = False
        _backends.add(self)

    @property
    def directory(self) -> Path:
        """The directory in use; opens the store to know it."""
        return self.opened().directory

    @property
    def place(self) -> str:
        """Where the store is, for messages; known without opening it."""
        files = self._open.files
        return str(self._config.path or "memory" if files is None else files.directory)

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

    def opened(self, asked: float | None = None) -> LmdbFiles:
        """Return the open files, opening them first where needed.

        Many who wait for one attempt share how it ends: if each tried in turn, the last would
        wait for the sum of all timeouts.

        Args:
            asked: Since when the caller waits, by the monotonic clock; None: since now.
        """
        files = self._open.files
        if files is None:
            asked = time.monotonic() if asked is None else asked
            with self._opening:
                files = self._open.files
                if files is None:
                    files = self._open_unless_failed(asked)
        return files

    def _open_unless_failed(self, asked: float) -> LmdbFiles:
        if self._failed is not None and self._failed[0] >= asked:
            raise StoreUnavailable(self._failed[1])
        try:
            files = acquire_files(self._with_directory())
        except StoreUnavailable as error:
            self._failed = time.monotonic(), str(error)
            raise
        self._failed = None
        self._open.upkeep = self._start_upkeep(files)
        self._open.files = files
        return files

    def is_open(self, files: LmdbFiles) -> bool:
        """Return whether these are the files in use."""
        return self._open.files is files

    def _start_upkeep(self, files: LmdbFiles) -> Upkeep:
        duties = [
            Duty(_weak(self._sweep_step), _SWEEP_EVERY),
            Duty(_weak(self._remove_abandoned), _ABANDONED_EVERY),
            Duty(files.forget_dead_readers, _READERS_EVERY),
            Duty(_weak(self._messages.wake_all), _SUBSCRIBERS_EVERY),
            Duty(_weak(self._messages.remove_leftovers), _SUBSCRIBERS_EVERY),
        ]
        if self._config.snapshot_every and self._config.scheme != "memory":
            duties.append(Duty(files.take_snapshot_if_changed, self._config.snapshot_every))
        return Upkeep(files.directory / "locks", duties)

    def _sweep_step(self) -> bool:
        return self.sweep(_SWEEP_STEP) == _SWEEP_STEP

    def _remove_abandoned(self) -> bool:
        """Remove the files of large values that killed processes left; nothing more to do then."""
        for space in ("app", "cache"):
            self._keyspaces[space].remove_abandoned()
        if self.opened().has_messages():
            self._messages.remove_abandoned()
        return False

    def sweep(self, most: int = 1000) -> int:
        """Remove expired keys, the earliest first. Upkeep does so every second.

        Args:
            most: How many to remove of each of the two files.

        Returns:
            How many were removed from the file that had more.
        """
        state, cache = [self._keyspaces["app"], self._keyspaces["sys"]], [self._keyspaces["cache"]]
        return max(spaces[0].sweep(most, spaces) for spaces in (state, cache))

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
        """Awaitable twin of `try_lock`, which waits at most for the store to be opened."""
        if self._open.files is None:
            await asyncio.to_thread(self.opened, time.monotonic())
        return self.try_lock(name, ttl)

    def publish(self, topic: bytes, payload: bytes) -> int:
        """Hand a message to every subscription that matches; return how many there were."""
        return self._messages.publish(topic, payload)

    async def apublish(self, topic: bytes, payload: bytes) -> int:
        """Awaitable twin of `publish`."""
        return await self._messages.apublish(topic, payload)

    def subscribe(self, topics: Topics, maxsize: int) -> EmbeddedInbox:
        """Collect from now on the messages on these topics, at most `maxsize` at a time."""
        return self._messages.subscribe(topics, maxsize)

    async def asubscribe(self, topics: Topics, maxsize: int) -> EmbeddedInbox:
        """Awaitable twin of `subscribe`."""
        return await self._messages.asubscribe(topics, maxsize)

    def close(self) -> None:
        """End the subscriptions; close the files once no other backend of this process uses them.

        It waits for who is taking a message, and thus holds no lock that opening needs.
        """
        self._messages.end()
        with self._opening:
            upkeep, files = self._open.take()
            for access in self._accesses():
                access.detach()
        # Not with the lock held: the thread of the upkeep may be waiting for it.
        if upkeep is not None:
            upkeep.stop()
        if files is not None:
            release_files(files)

    async def aclose(self) -> None:
        """Awaitable twin of `close`; in a thread, since it waits for a writer at work."""
        await asyncio.to_thread(self.close)

    @property
    def upkeep(self) -> Upkeep | None:
        """The thread that keeps the store in order, while it is open."""
        return self._open.upkeep

    def forget_after_fork(self) -> None:
        """Drop, in a forked child, all that belongs to the parent."""
        self._opening = threading.Lock()
        self._open.forget_after_fork()
        for access in self._accesses():
            access.detach(forked=True)
        for held in list(self._held):
            held.close_after_fork()

    def _accesses(self) -> list[Access]:
        return [*self._keyspaces.values(), self._messages]


class _Open:
    """What a backend has open."""

    def __init__(self) -> None:
        self.files: LmdbFiles | None = None
        self.upkeep: Upkeep | None = None

    def take(self) -> tuple[Upkeep | None, LmdbFiles | None]:
        """Return it, to be closed by the caller."""
        upkeep, files = self.upkeep, self.files
        self.files = self.upkeep = None
        return upkeep, files

    def close_from_elsewhere(self) -> None:
        """Have the thread of the upkeep close it, without waiting for that."""
        files = self.files
        if self.upkeep is not None and files is not None:
            self.upkeep.end_with(lambda: release_files(files))

    def forget_after_fork(self) -> None:
        """Leave it to the parent."""
        if self.upkeep is not None:
            self.upkeep.forget_after_fork()
        self.files = self.upkeep = None


def _weak(method: Callable[[], bool]) -> Callable[[], bool]:
    """Return a function that calls a method without keeping its object alive."""
    reference = weakref.WeakMethod(method)

    def call() -> bool:
        found = reference()
        return found is not None and found()

    return call


def _remove_if_owner(path: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(path, ignore_errors=True)


_backends: weakref.WeakSet[EmbeddedBackend] = weakref.WeakSet()  # to be told of a fork


def _hold_before_fork() -> None:
    # A thread in the middle of a transaction would, in the child, keep its environment for ever.
    _forking.acquire()  # threads may fork at the same time
    _held.extend(backend.upkeep for backend in _backends if backend.upkeep is not None)
    for upkeep in _held:
        upkeep.hold()


def _go_on_after_fork() -> None:
    while _held:
        _held.pop().go_on()
    _forking.release()


def _forget_after_fork() -> None:
    _held.clear()
    _forking.release()
    for backend in list(_backends):
        backend.forget_after_fork()


_forking = threading.Lock()  # held from the start of a fork to its end
_held: list[Upkeep] = []  # meanwhile
os.register_at_fork(
    before=_hold_before_fork,
    after_in_parent=_go_on_after_fork,
    after_in_child=_forget_after_fork,
)
