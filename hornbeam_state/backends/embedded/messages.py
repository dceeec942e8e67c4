"""Messages through the embedded store: published into mailboxes, with a wake-up for each.

They lie in a file of their own, so that they wait for no other writer, which is opened when a
process first publishes or subscribes. Nothing in it outlives the processes that use the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from typing import TYPE_CHECKING, Any, Final

from hornbeam_state.backends.embedded import mailboxes, subscribers
from hornbeam_state.backends.embedded.access import (
    LOOP_PATIENCE,
    UPKEEP_PATIENCE,
    Access,
    Busy,
    Owner,
)
from hornbeam_state.backends.embedded.blobs import Blob
from hornbeam_state.backends.embedded.inbox import EmbeddedInbox
from hornbeam_state.backends.embedded.subscribers import Audience, Table
from hornbeam_state.backends.embedded.wakeups import SocketFolder, Waker, WakeupSocket
from hornbeam_state.errors import StoreError, StoreFull

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hornbeam_state.backends.base import Topics
    from hornbeam_state.backends.embedded.mailboxes import Member

_LARGEST_INLINE: Final = 8 * 1024
_RELEASED_AT_ONCE: Final = 256
_ORPHANED_AFTER: Final = 60.0


class Messages(Access):
    """What a backend does with messages; see `backends.base.Backend`.

    Args:
        owner: The backend.
    """

    def __init__(self, owner: Owner) -> None:
        super().__init__(owner, "messages")
        self._inboxes: weakref.WeakSet[EmbeddedInbox] = weakref.WeakSet()
        self._table = Table(None, {})
        self._waker: Waker | None = None

    # Publishing.

    def publish(self, topic: bytes, payload: bytes) -> int:
        """Hand a message to every subscription that matches; return how many there were."""
        return self._publish(topic, payload, self._owner.timeout)

    async def apublish(self, topic: bytes, payload: bytes) -> int:
        """Awaitable twin of `publish`; in a thread where it opens or writes a file or waits."""
        if self._waker is not None and len(payload) <= _LARGEST_INLINE:
            with contextlib.suppress(Busy):
                return self._publish(topic, payload, LOOP_PATIENCE)
        return await asyncio.to_thread(self.publish, topic, payload)

    def _publish(self, topic: bytes, payload: bytes, patience: float) -> int:
        waker = self._waker or self._open_waker()
        if not (self._table.matching(topic) or self._view(self._current_table).matching(topic)):
            return 0
        if len(payload) <= _LARGEST_INLINE:
            reached = self._guarded(patience, self._deliver, topic, payload)
        else:
            blobs = self._bind()[1].blobs
            blob = blobs.write(payload)
            try:
                reached = self._guarded(patience, self._deliver, topic, blob)
            finally:
                blobs.discard(blob)
        return self._wake(waker, reached)

    def _deliver(self, txn: Any, topic: bytes, payload: bytes | Blob) -> list[Audience]:
        """Put a message into the mailboxes of those who get it."""
        file = self._bind()[1]
        matching = self._current_table(txn).matching(topic)
        if isinstance(payload, Blob) and matching:
            file.blobs.store(txn, payload, references=len(matching))
        row = mailboxes.make_row(topic, payload)
        for one in matching:
            mailboxes.append(txn, file, one.mailbox, row, one.maxsize)
        return matching

    def _wake(self, waker: Waker, reached: Iterable[Audience]) -> int:
        """Wake subscribers up; remove the dead ones, and return how many the others are."""
        sockets = [socket for one in reached for socket in one.sockets]
        dead = [bytes.fromhex(socket) for socket in waker.wake(sockets)]
        if not dead:
            return len(sockets)
        try:
            # One that is gone from the rows by now has closed its socket after it got the message.
            return len(sockets) - self._guarded(0.0, self._remove, dead)
        except StoreError:  # others are writing: the next one to publish to them will remove them
            return len(sockets) - len(dead)

    def _current_table(self, txn: Any) -> Table:
        table, file = self._table, self._bind()[1]
        if subscribers.version(txn, file) != table.version:
            table = self._table = subscribers.load(txn, file)
        return table

    # Subscribing.

    def subscribe(self, topics: Topics, maxsize: int) -> EmbeddedInbox:
        """Collect from now on the messages on these topics."""
        return self._subscribe(topics, maxsize, self._owner.timeout)

    async def asubscribe(self, topics: Topics, maxsize: int) -> EmbeddedInbox:
        """Awaitable twin of `subscribe`; in a thread where it opens a file or waits."""
        if self._waker is not None:
            with contextlib.suppress(Busy):
                return self._subscribe(topics, maxsize, LOOP_PATIENCE)
        return await asyncio.to_thread(self.subscribe, topics, maxsize)

    def _subscribe(self, topics: Topics, maxsize: int, patience: float) -> EmbeddedInbox:
        key = subscribers.make_key()
        socket = WakeupSocket(
            (self._waker or self._open_waker()).folder, key.hex()
        )  # else it would look dead
        member, number = self._guarded(patience, self._add, key, topics, maxsize)
        inbox = EmbeddedInbox(self, member, number, socket)
        self._inboxes.add(inbox)
        return inbox

    def _add(self, txn: Any, key: bytes, topics: Topics, maxsize: int) -> tuple[Member, int]:
        file = self._bind()[1]
        member = subscribers.add(txn, file, key, topics, maxsize)
        return member, mailboxes.join(txn, file, member)

    def _remove(self, txn: Any, keys: Iterable[bytes]) -> int:
        """Remove subscriptions; return how many of them were there."""
        file = self._bind()[1]
        members = [subscribers.remove(txn, file, key) for key in keys]
        there = [member for member in members if member is not None]
        for member in there:
            mailboxes.leave(txn, file, member)
        return len(there)

    # What inboxes ask for.

    def get(self, mailbox: bytes, number: int) -> bytes | None:
        """Return the message of that number, or None."""
        return self._view(mailboxes.get, mailbox, number)

    def look(self, mailbox: bytes, number: int) -> tuple[int, int, bytes | None]:
        """Return what there is from a number on; see `mailboxes.look`."""
        return self._view(mailboxes.look, mailbox, number)

    def read_file(self, digest: bytes, size: int) -> bytes | None:
        """Return a payload that lies in a file, or None if that is gone."""
        return self._bind()[1].blobs.read(digest, size)

    def release(self, member: Member, number: int) -> bool:
        """Let go of the messages below a number; return whether there is no more to do."""
        file = self._bind()[1]
        return self._guarded(0.0, mailboxes.release, file, member, number, _RELEASED_AT_ONCE)

    def unsubscribe(self, member: Member) -> None:
        """Remove a subscription, or leave it to whoever finds that its socket is closed."""
        with contextlib.suppress(StoreError):
            self._guarded(LOOP_PATIENCE, self._remove, [member.key])

    # Upkeep.

    def wake_all(self) -> bool:
        """Wake everyone up who has a socket, and remove the dead; nothing more to do then.

        So a wake-up that was lost, when its publisher was killed, is made up for.
        """
        if self._owner.opened().has_messages():
            waker = self._waker or self._open_waker()
            known = self._view(self._current_table).all
            self._wake(waker, known)
            old = waker.folder.names(time.time() - _ORPHANED_AFTER)
            waker.wake(set(old).difference(*(one.sockets for one in known)))
        return False

    def remove_leftovers(self) -> bool:
        """Remove mailboxes of nobody, a step at a time; return whether there are more."""
        if not self._owner.opened().has_messages():
            return False
        if not self._view(mailboxes.without_members, self._bind()[1]):
            return False
        self._guarded(UPKEEP_PATIENCE, self._remove_leftover)
        return True

    def _remove_leftover(self, txn: Any) -> None:
        file = self._bind()[1]
        for mailbox in mailboxes.without_members(txn, file)[:1]:
            mailboxes.remove(txn, file, mailbox)

    # Ends.

    def end(self) -> None:
        """End the subscriptions."""
        for inbox in list(self._inboxes):
            inbox.close()

    def detach(self, *, forked: bool = False) -> None:
        """Open the files again at the next use."""
        super().detach(forked=forked)
        self._waker = None
        if forked:
            for inbox in list(self._inboxes):
                inbox.forget_after_fork()
            self._inboxes = weakref.WeakSet()

    def _open_waker(self) -> Waker:
        waker = self._waker = Waker(SocketFolder(self._bind()[0].directory / "inboxes"))
        return waker

    def _full(self) -> StoreFull:
        return StoreFull(
            f"the messages that wait in the store in {self._owner.place} have reached their limit: "
            f"have their subscribers read them, or subscribe with a smaller maxsize"
        )
