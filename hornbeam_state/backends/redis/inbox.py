"""The messages that wait for one subscription."""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import TYPE_CHECKING

from hornbeam_state.backends.base import INBOX_BYTES
from hornbeam_state.backends.readiness import Readiness
from hornbeam_state.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable


class RedisInbox:
    """An `Inbox`: the listener puts messages in, the subscriber takes them. Never waits for them.

    Args:
        maxsize: How many messages may wait.
        unsubscribe: What `close` calls, once.
    """

    def __init__(self, maxsize: int, unsubscribe: Callable[[], None]) -> None:
        self._maxsize = maxsize
        self._unsubscribe = unsubscribe
        self._process = os.getpid()
        self._ready = Readiness()
        self._lock = threading.Lock()
        self._messages: deque[tuple[bytes, bytes]] = deque()
        self._bytes = 0
        self._error: StoreError | None = None
        self._closed = False
        self._dropped = 0
        self._gaps = 0

    @property
    def dropped(self) -> int:
        """How many messages gave way to later ones."""
        return self._dropped

    @property
    def gaps(self) -> int:
        """How often the connection was lost, and with it whatever was published meanwhile."""
        return self._gaps

    @property
    def closed(self) -> bool:
        """Whether it was closed, by itself or with its backend."""
        return self._closed

    def take(self) -> tuple[bytes, bytes] | None:
        """Remove and return the oldest message (topic, payload), or None; never waits.

        Raises:
            StoreUnavailable: the server has been out of reach for longer than a call would wait.
        """
        if self._process != os.getpid():  # the lock may have been held during the fork
            return None
        found = self._oldest()
        if found is None and not self._closed:
            self._ready.clear()
            found = self._oldest()  # what came before it was cleared would else wait unseen
            if found is not None or self._closed:
                self._ready.set()
        if isinstance(found, StoreError):
            raise found
        return found

    def fileno(self) -> int:
        """Return a descriptor to wait on: readable from when there is something to take."""
        return self._ready.fileno()

    def close(self) -> None:
        """Unsubscribe; nothing can be taken any more. Idempotent, and never raises.

        Waits for the server, on an event loop for some milliseconds at most; what is not
        acknowledged by then is done later.
        """
        if self._process == os.getpid() and self.shut():
            self._unsubscribe()

    # For the listener.

    def put(self, topic: bytes, payload: bytes) -> bool:
        """Add a message, in place of the oldest ones when it is full.

        Returns:
            Whether it is to be announced.
        """
        with self._lock:
            if self._closed:
                return False
            self._messages.append((topic, payload))
            self._bytes += len(payload)
            while len(self._messages) > self._maxsize or self._is_too_heavy():
                self._bytes -= len(self._messages.popleft()[1])
                self._dropped += 1
            return len(self._messages) == 1

    def announce(self) -> None:
        """Wake those who wait.

        It is apart from `put` because it lets other threads run: once for many messages, so that
        a busy process does not hold up the listener at each of them.
        """
        self._ready.set()

    def lost(self) -> None:
        """Count a gap."""
        with self._lock:
            self._gaps += 1

    def fail(self, error: StoreError) -> None:
        """Have `take` raise the error once it has returned what came before."""
        with self._lock:
            self._error = None if self._closed else error
        self._ready.set()

    def recover(self) -> None:
        """Take an error back that nobody has seen yet."""
        with self._lock:
            self._error = None

    def shut(self) -> bool:
        """Close it without telling the server; return False if it was closed before."""
        with self._lock:
            if self._closed:
                return False
            self._closed = True
            self._messages.clear()
            self._bytes = 0
            self._error = None
        self._ready.set()
        return True

    def _oldest(self) -> tuple[bytes, bytes] | StoreError | None:
        with self._lock:
            if self._messages:
                message = self._messages.popleft()
                self._bytes -= len(message[1])
                return message
            error, self._error = self._error, None
            return error

    def _is_too_heavy(self) -> bool:
        return self._bytes > INBOX_BYTES and len(self._messages) > 1
