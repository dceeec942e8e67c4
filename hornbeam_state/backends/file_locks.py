"""Locks of whole files, for systems without Linux's: slower, and polled where one has to wait.

Where the kernel has no open-file-description locks or the C library no robust mutexes with a
timeout (macOS, musl), `flock` takes their place. It too belongs to what `os.open` returned, and
the kernel frees it when its owner dies. Which kind is used depends on the system alone, so that all
processes of a store agree.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
from typing import TYPE_CHECKING, Final

from hornbeam_state.errors import StoreUnavailable

if TYPE_CHECKING:
    from pathlib import Path

_FIRST_PAUSE: Final = 0.00005
_LONGEST_PAUSE: Final = 0.002


def lock_file(descriptor: int, kind: int) -> bool:
    """Lock (``F_WRLCK``, ``F_RDLCK``) or unlock (``F_UNLCK``) a whole file, without waiting.

    Returns:
        False when another description holds it in a way that excludes `kind`.
    """
    operation = {
        fcntl.F_WRLCK: fcntl.LOCK_EX,
        fcntl.F_RDLCK: fcntl.LOCK_SH,
        fcntl.F_UNLCK: fcntl.LOCK_UN,
    }[kind]
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise StoreUnavailable(f"cannot lock in the store: {error.strerror}") from error
    return True


def try_own_file(path: Path) -> int | None:
    """Take a lock that is a file of its own if it is free; return its descriptor.

    The file exists only while somebody holds or tries the lock; `remove_own_file` frees it.
    """
    while True:
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreUnavailable(f"cannot open the lock file {path}: {error.strerror}") from error
        if not lock_file(descriptor, fcntl.F_WRLCK):
            os.close(descriptor)
            return None
        # Whoever freed it a moment ago may have removed the very file that was just locked.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)


def remove_own_file(path: Path, descriptor: int) -> None:
    """Free a lock that `try_own_file` took."""
    path.unlink(missing_ok=True)  # while it is held: nobody else can have taken it
    lock_file(descriptor, fcntl.F_UNLCK)
    os.close(descriptor)


class FileGuard:
    """What `WriteGuard` is elsewhere: a lock over threads and processes, with a bound on waiting.

    The thread that takes it has to give it back.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._thread = threading.Lock()
        self._owner: int | None = None

    def __del__(self) -> None:
        os.close(self._descriptor)

    def acquire(self, timeout: float) -> bool:
        """Take the lock, waiting for at most `timeout` seconds; return whether it was taken."""
        deadline = time.monotonic() + timeout
        if not self._thread.acquire(timeout=max(timeout, 0)):
            return False
        try:
            pause = _FIRST_PAUSE
            while not lock_file(self._descriptor, fcntl.F_WRLCK):
                if time.monotonic() + pause > deadline:
                    self._thread.release()
                    return False
                time.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
        except BaseException:
            self._thread.release()
            raise
        self._owner = threading.get_ident()
        return True

    def release(self) -> None:
        """Give the lock back; does nothing when this thread does not hold it."""
        if self._owner == threading.get_ident():
            self._owner = None
            lock_file(self._descriptor, fcntl.F_UNLCK)
            self._thread.release()
