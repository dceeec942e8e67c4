"""Locks that the kernel frees when their owner dies: byte ranges of a file, per file description.

Linux calls them open-file-description locks. Unlike classic POSIX locks they belong to what
`os.open` returned and not to the process, so two threads exclude each other, and closing another
descriptor of the same file frees nothing. Other systems lock whole files instead: `file_locks`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import struct
from functools import partial
from typing import TYPE_CHECKING, Final

from hornbeam_state.backends.file_locks import lock_file, remove_own_file, try_own_file
from hornbeam_state.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HAS_RANGES = hasattr(fcntl, "F_OFD_SETLK")
"""Whether this system can lock a part of a file for whoever opened it."""

_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux


def lock_range(descriptor: int, kind: int, place: int = 0) -> bool:
    """Lock (``F_WRLCK``, ``F_RDLCK``) or unlock (``F_UNLCK``) one byte of a file, without waiting.

    Returns:
        False when another description holds it in a way that excludes `kind`.
    """
    if not HAS_RANGES:
        return lock_file(descriptor, kind)
    request = _FLOCK.pack(kind, os.SEEK_SET, place, 1, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, request)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise StoreUnavailable(f"cannot lock in the store: {error.strerror}") from error
    return True


def try_kernel_lock(path: Path, name: bytes) -> KernelLock | None:
    """Take the named lock in the file at `path` if it is free.

    Every acquisition opens the file anew: through an inherited descriptor a forked child would
    share the lock. The name picks one of 2**62 bytes by its digest, or a file of its own.
    """
    place = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 2
    if not HAS_RANGES:
        own = path.with_name(f"{path.name}.d") / f"{place:016x}"
        taken = try_own_file(own)
        return None if taken is None else KernelLock(taken, partial(remove_own_file, own, taken))
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreUnavailable(f"cannot open the lock file {path}: {error.strerror}") from error
    try:
        free = lock_range(descriptor, fcntl.F_WRLCK, place)
    except StoreUnavailable:
        os.close(descriptor)
        raise
    if not free:
        os.close(descriptor)
        return None
    return KernelLock(descriptor, partial(_unlock_range, descriptor, place))


class KernelLock:
    """A lock on a file description of its own."""

    def __init__(self, descriptor: int, free: Callable[[], None]) -> None:
        self._descriptor: int | None = descriptor
        self._free = free

    def release(self) -> bool:
        """Free the lock; return whether it was held."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return False
        self._free()
        return True

    async def arelease(self) -> bool:
        """Awaitable twin of `release`."""
        return self.release()

    def close_after_fork(self) -> None:
        """Give up, in a forked child, the parent's lock; the parent keeps it."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _unlock_range(descriptor: int, place: int) -> None:
    # Unlocked before it is closed: a child forked a moment ago may still share the descriptor.
    lock_range(descriptor, fcntl.F_UNLCK, place)
    os.close(descriptor)
