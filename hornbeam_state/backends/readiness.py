"""A descriptor that other threads make readable."""

from __future__ import annotations

import contextlib
import os
import weakref


class Readiness:
    """A descriptor that is readable while it is set. Closed when the object is dropped.

    Nothing here waits or takes a lock, so that a finalizer may call it too.
    """

    def __init__(self) -> None:
        self._descriptor = _eventfd()
        # At exit other threads may still set it: it stays open until the process is gone.
        weakref.finalize(self, os.close, self._descriptor).atexit = False

    def fileno(self) -> int:
        """Return the descriptor; it stays the same."""
        return self._descriptor

    def set(self) -> None:
        """Make it readable."""
        os.eventfd_write(self._descriptor, 1)

    def clear(self) -> None:
        """Make it unreadable again."""
        with contextlib.suppress(BlockingIOError):  # it was not set
            os.eventfd_read(self._descriptor)

    def after_fork(self) -> None:
        """Share it with the parent no more."""
        own = _eventfd()
        os.dup2(own, self._descriptor, inheritable=False)
        os.close(own)


def _eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
