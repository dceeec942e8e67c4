"""A lock in front of LMDB's writer lock, for which one can wait with a bound.

LMDB's own lock has no timeout: when a writer is stopped (SIGSTOP) or starved of CPU, all others
wait for as long. Whoever takes this one first waits for a given time at most and then knows.

It is a POSIX mutex in a file that all processes map: shared between processes, and robust, so
that the kernel passes it on when its owner dies. Taking and giving it back costs half a
microsecond; a lock of a file would cost three times that and could only be polled. That one is
used where the C library has no such mutex.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hornbeam_state.backends.file_locks import FileGuard
from hornbeam_state.backends.mapped_file import map_file
from hornbeam_state.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

_SIZE: Final = 4096
_STEP: Final = 0.05  # seconds
_ATTRIBUTES_SIZE: Final = 64  # of pthread_mutexattr_t; it is smaller everywhere
_CLOCK_MONOTONIC: Final = 1
_PTHREAD_PROCESS_SHARED: Final = 1
_PTHREAD_MUTEX_ROBUST: Final = 1
_PTHREAD_MUTEX_ERRORCHECK: Final = 2


_NEEDED: Final = ("pthread_mutexattr_setrobust", "pthread_mutex_clocklock")


def make_write_guard(path: Path, *, fresh: bool) -> WriteGuard | FileGuard:
    """Return what this system has; see `WriteGuard`."""
    if has_robust_mutexes():
        return WriteGuard(path, fresh=fresh)
    return FileGuard(path)


def has_robust_mutexes() -> bool:
    """Return whether the C library has mutexes that outlive their owner, with a timeout."""
    libc = ctypes.CDLL(None)
    return all(hasattr(libc, name) for name in _NEEDED)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class WriteGuard:
    """A mutex over threads and processes. The thread that takes it has to give it back.

    Args:
        path: The file.
        fresh: Make it anew, whatever is there: nobody else uses it. A mutex that was held when
            the machine lost power would stay held for ever.

    Attributes:
        release: Gives the mutex back; does nothing when this thread does not hold it.
    """

    def __init__(self, path: Path, *, fresh: bool) -> None:
        if fresh:
            path.unlink(missing_ok=True)
        if not path.exists():
            _create(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._memory = mmap.mmap(descriptor, _SIZE)
        finally:
            os.close(descriptor)
        self._buffer = ctypes.c_char.from_buffer(self._memory)
        self._mutex = ctypes.c_void_p(ctypes.addressof(self._buffer))
        libc = ctypes.CDLL(None)
        self._try: Callable[..., int] = libc.pthread_mutex_trylock
        self._wait: Callable[..., int] = libc.pthread_mutex_clocklock
        # A call into C as a whole: no signal handler can raise between its start and its end.
        self.release: Callable[[], int] = functools.partial(libc.pthread_mutex_unlock, self._mutex)
        self._consistent: Callable[..., int] = libc.pthread_mutex_consistent

    def acquire(self, timeout: float) -> bool:
        """Take the mutex, waiting for at most `timeout` seconds; return whether it was taken.

        It is not where this very thread holds it, as in a signal handler during a write.
        """
        result = self._try(self._mutex)
        if result == errno.EBUSY and timeout > 0:
            result = self._wait_until(time.monotonic() + timeout)
        if result == 0:
            return True
        if result in (errno.EBUSY, errno.ETIMEDOUT, errno.EDEADLK):
            return False
        if result == errno.EOWNERDEAD:  # its owner died; what it guards mends itself
            self._consistent(self._mutex)
            return True
        raise StoreUnavailable(f"the store's write guard is broken: {os.strerror(result)}")

    def _wait_until(self, end: float) -> int:
        """Wait for the mutex in steps; return what the last one did.

        A waiter that is killed just when it was woken takes the wake-up with it: if someone else
        took the mutex before it could, nobody is told of the other waiters, and they would sleep
        for as long as they may. The next step finds the mutex free.
        """
        while True:
            until = min(end, time.monotonic() + _STEP)
            deadline = _Timespec(int(until), int(until % 1 * 1e9))
            result = self._wait(self._mutex, _CLOCK_MONOTONIC, ctypes.byref(deadline))
            if result != errno.ETIMEDOUT or until >= end:
                return result


def _create(path: Path) -> None:
    """Make the file complete or not at all; the first of several makers wins."""
    descriptor, name = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    try:
        with map_file(descriptor, _SIZE) as memory:
            _initialise(memory)
        try:
            os.link(name, path)
        except FileExistsError:
            return
    finally:
        os.close(descriptor)
        Path(name).unlink()


def _initialise(memory: mmap.mmap) -> None:
    libc = ctypes.CDLL(None)
    attributes = ctypes.create_string_buffer(_ATTRIBUTES_SIZE)
    buffer = ctypes.c_char.from_buffer(memory)
    result = (
        libc.pthread_mutexattr_init(attributes)
        or libc.pthread_mutexattr_setpshared(attributes, _PTHREAD_PROCESS_SHARED)
        or libc.pthread_mutexattr_setrobust(attributes, _PTHREAD_MUTEX_ROBUST)
        or libc.pthread_mutexattr_settype(attributes, _PTHREAD_MUTEX_ERRORCHECK)
        or libc.pthread_mutex_init(ctypes.c_void_p(ctypes.addressof(buffer)), attributes)
    )
    del buffer  # else the map cannot be closed
    if result:
        raise StoreUnavailable(f"cannot make the store's write guard: {os.strerror(result)}")
