"""One subscription to the messages of the embedded store, in the process that subscribed."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Final, Protocol

from hornbeam_state.backends.embedded import mailboxes
from hornbeam_state.errors import StoreError

if TYPE_CHECKING:
    from hornbeam_state.backends.embedded.mailboxes import Member
    from hornbeam_state.backends.embedded.wakeups import WakeupSocket

_MANY: Final = 200
_MUCH: Final = 1024 * 1024


class Mail(Protocol):
    """What an inbox needs of the store."""

    def get(self, mailbox: bytes, number: int) -> bytes | None:
        """Return the message of that number, or None."""
        ...

    def look(self, mailbox: bytes, number: int) -> tuple[int, int, bytes | None]:
        """Return what there is from a number on; see `mailboxes.look`."""
        ...

    def read_file(self, digest: bytes, size: int) -> bytes | None:
        """Return a payload that lies in a file, or None if that is gone."""
        ...

    def release(self, member: Member, number: int) -> bool:
        """Let go of the messages below a number; return whether there is no more to do.

        Raises:
            StoreUnavailable: another writer is at work; this does not wait for it.
        """
        ...

    def unsubscribe(self, member: Member) -> None:
        """Remove the subscription, or leave it to whoever finds that its socket is closed."""
        ...


class EmbeddedInbox:
    """See `backends.base.Inbox`.

    Messages are read one by one and without writing. What was read is let go of later, many at a
    time: when that is much, or when it lies in files and nothing else is waiting.

    Args:
        mail: The store.
        member: The place at a mailbox.
        number: That of the first message.
        socket: Where wake-ups come to.

    Attributes:
        closed: Whether it was closed, by `close` or with its backend.
    """

    gaps = 0

    def __init__(self, mail: Mail, member: Member, number: int, socket: WakeupSocket) -> None:
        self.closed = False
        self._mail = mail
        self._member = member
        self._next = number
        self._end = number  # as of the last look
        self._socket = socket
        self._lock = threading.RLock()
        self._dropped = 0
        self._unreleased = 0  # messages that were read
        self._weight = 0  # of these
        self._in_files = False  # whether some of these are

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
            while not self.closed:
                row = None
                if self._next < self._end:
                    row = self._mail.get(self._member.mailbox, self._next)
                elif not self._socket.silence():
                    break  # whatever came since the last look has not been announced yet
                if row is None and (row := self._look()) is None:
                    continue
                message = self._open(row)
                if self._unreleased >= _MANY or self._weight >= _MUCH:
                    self._release()
                if message is not None:
                    return message
            if self._in_files and not self.closed:
                self._release()
            return None

    def close(self) -> None:
        """Unsubscribe."""
        with self._lock:
            if self.closed:
                return
            self._look_for_dropped()
            self.closed = True
            self._socket.close()
            self._mail.unsubscribe(self._member)

    def forget_after_fork(self) -> None:
        """Leave it, in a forked child, to the parent."""
        self._lock = threading.RLock()
        self.closed = True

    def _look(self) -> bytes | None:
        """See what there is, and return the first."""
        try:
            number, self._end, row = self._mail.look(self._member.mailbox, self._next)
        except BaseException:
            self._socket.wake()  # what was announced is still to be looked for
            raise
        if number > self._next:
            self._skip_to(number)
        if self._end - number > 1:
            self._socket.wake()  # others may wait for what comes after this one
        return row

    def _open(self, row: bytes) -> tuple[bytes, bytes] | None:
        """Return topic and payload of the next message, or None if it was dropped just now."""
        topic, payload, in_file = mailboxes.split_row(row)
        self._next += 1
        self._unreleased += 1
        if not in_file:
            self._weight += len(row)
            return topic, payload
        digest, size = mailboxes.read_reference(payload)
        self._weight += size
        self._in_files = True
        content = self._mail.read_file(digest, size)
        if content is None:
            self._dropped += 1
            return None
        return topic, content

    def _look_for_dropped(self) -> None:
        with contextlib.suppress(StoreError):
            self._skip_to(self._mail.look(self._member.mailbox, self._next)[0])

    def _skip_to(self, number: int) -> None:
        if number > self._next:
            self._dropped += number - self._next
            self._next = number

    def _release(self) -> None:
        """Let go of what was read; later, if others are writing."""
        with contextlib.suppress(StoreError):
            if self._mail.release(self._member, self._next):
                self._unreleased = self._weight = 0
                self._in_files = False
