"""Files that several processes map into their memory, and write to like to memory."""

from __future__ import annotations

import mmap
import os


def map_file(descriptor: int, size: int) -> mmap.mmap:
    """Map the first `size` bytes of a file, shared with whoever else maps it.

    Raises:
        OSError: there is no room.
    """
    reserve(descriptor, size)
    return mmap.mmap(descriptor, size)


def reserve(descriptor: int, size: int) -> None:
    """Allocate the first `size` bytes of a file, which keep what they hold.

    Writing through a map to a hole of a full disk would be a SIGBUS.

    Raises:
        OSError: there is no room.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS
        present = os.fstat(descriptor).st_size
        os.pwrite(descriptor, bytes(max(0, size - present)), present)
