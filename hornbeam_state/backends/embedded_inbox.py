"""One subscription to the messages of the embedded store, in the process that subscribed."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Final, Protocol

from hornbeam_state.backends import mailboxes
from hornbeam_state.errors import StoreError

if TYPE_CHECKING:
    from hornbeam_state.backends.wakeups import WakeupSocket

_MANY: Final = 200
_MUCH: Final = 1024 * 1024


class Mail(Protocol):
    """What an inbox needs of the store."""

    def find(self, key: bytes, number: int) -> tuple[int, bytes] | None:
        """Return the first message of that number or above, or None if there is none yet."""
        ...

    def oldest(self, key: bytes) -> int:
        """Return the number of the oldest message, or of the next where none waits."""
        ...

    def read_file(self, digest: bytes, size: int) -> bytes | None:
        """Return a payload that lies in a file, or None if that is gone."""
        ...

    def release(self, key: bytes, end: int) -> bool:
        """Remove messages below a number; return whether all of them are removed.

        Raises:
            StoreUnavailable: another writer is at work; this does not wait for it.
        """
        ...

    def unsubscribe(self, key: bytes) -> None:
        """Remove the subscription, or leave it to whoever finds that its socket is closed."""
        ...


class EmbeddedInbox:
    """See `backends.base.Inbox`.

    Messages are read one by one and without writing. What was read is released later, many at a
    time: when that is much, or when it lies in files and nothing else is waiting.

    Args:
        mail: The store.
        key: What the mailbox is called.
        socket: Where wake-ups come to.
    """

    gaps = 0

    def __init__(self, mail: Mail, key: bytes, socket: WakeupSocket) -> None:
        self.key = key
        self._mail = mail
        self._socket = socket
        self._lock = threading.RLock()
        self._next = 0  # the number of the next message
        self._dropped = 0
        self._unreleased = 0  # messages that were read
        self._weight = 0  # of these
        self._in_files = False  # whether some of these are
        self.closed = False

    @property
    def dropped(self) -> int:
        """How many messages gave way to later ones."""
        with self._lock:
            if not self.closed:
                self._look_for_dropped()
            return self._dropped

    def fileno(self) -> int:
        """Return the descriptor of the socket."""
        return self._socket.fileno()

    def take(self) -> tuple[bytes, bytes] | None:
        """Remove and return the oldest message, or None."""
        with self._lock:
            if self.closed:
                return None
            message = self._read()
            if message is None:
                self._socket.silence()
                message = self._read()  # one that came before that would wake nobody any more
                if message is not None:
                    self._socket.wake()
            self._release(drained=message is None)
            return message

    def close(self) -> None:
        """Unsubscribe."""
        with self._lock:
            if self.closed:
                return
            self._look_for_dropped()
            self.closed = True
            self._socket.close()
            self._mail.unsubscribe(self.key)

    def forget_after_fork(self) -> None:
        """Leave it, in a forked child, to the parent."""
        self._lock = threading.RLock()
        self.closed = True

    def _read(self) -> tuple[bytes, bytes] | None:
        while (found := self._mail.find(self.key, self._next)) is not None:
            number, row = found
            self._skip_to(number)
            self._next += 1
            self._unreleased += 1
            self._weight += mailboxes.weight_of(row)
            blob = mailboxes.blob_of(row)
            if blob is None:
                return mailboxes.topic_of(row), mailboxes.payload_of(row)
            self._in_files = True
            payload = self._mail.read_file(*blob)
            if payload is not None:
                return mailboxes.topic_of(row), payload
            self._dropped += 1  # since its row was read
        return None

    def _look_for_dropped(self) -> None:
        with contextlib.suppress(StoreError):
            self._skip_to(self._mail.oldest(self.key))

    def _skip_to(self, number: int) -> None:
        if number > self._next:
            self._dropped += number - self._next
            self._next = number

    def _release(self, *, drained: bool) -> None:
        """Let go of what was read, if it is time to; put it off when others are writing."""
        much = self._unreleased >= _MANY or self._weight >= _MUCH
        if much or (drained and self._in_files):
            with contextlib.suppress(StoreError):
                if self._mail.release(self.key, self._next):
                    self._unreleased = self._weight = 0
                    self._in_files = False
