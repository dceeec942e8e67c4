"""Where messages wait: rows of LMDB, numbered from 0 in each mailbox.

Subscriptions that ask for the same share a mailbox, so that a message is written once for all of
them. Each counts for itself what it has read; a number that is gone by then is a message that was
dropped. Now and then it notes how far it has got, and what all of them have read is removed.

There are two databases. In ``messages`` a mailbox has a row for each message and, after these, one
that says which numbers are there; in ``members`` one for each subscription, with the number it
has got to. A large payload lies in a file.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hornbeam_state.backends.base import INBOX_BYTES
from hornbeam_state.backends.embedded.blobs import Blob

if TYPE_CHECKING:
    from hornbeam_state.backends.embedded.lmdb_file import LmdbFile

DATABASES: Final = ("messages", "members")
KEY_SIZE: Final = 16
_NUMBER: Final = struct.Struct(">Q")
_STATE: Final = struct.Struct("<QQQ")  # the oldest number, the end of the numbers, the weight
_STATE_NUMBER: Final = b"\xff" * 8  # beside the newest message: mostly on the same page
_HEADER: Final = struct.Struct("<BH")  # flags, bytes of the topic
_IN_FILE: Final = 1
_REFERENCE: Final = struct.Struct("<32sQ")
_ROW_WEIGHT: Final = 32  # what LMDB adds to a row, about
_MOST_AT_ONCE: Final = 1000  # rows removed in a transaction, so that nobody waits long for it


class Member(NamedTuple):
    """A subscription's place at a mailbox.

    Attributes:
        mailbox: The key of the mailbox, `KEY_SIZE` bytes.
        key: That of the subscription.
    """

    mailbox: bytes
    key: bytes


def make_row(topic: bytes, payload: bytes | Blob) -> bytes:
    """Return the row of a message."""
    if isinstance(payload, Blob):
        reference = _REFERENCE.pack(payload.digest, payload.size)
        return _HEADER.pack(_IN_FILE, len(topic)) + topic + reference
    return _HEADER.pack(0, len(topic)) + topic + payload


def split_row(row: bytes) -> tuple[bytes, bytes, bool]:
    """Return topic and payload of a message; or topic, what `read_reference` reads, and True."""
    flags, length = _HEADER.unpack_from(row)
    start = _HEADER.size + length
    return row[_HEADER.size : start], row[start:], bool(flags & _IN_FILE)


def read_reference(payload: bytes) -> tuple[bytes, int]:
    """Return digest and size of a payload that lies in a file."""
    digest, size = _REFERENCE.unpack(payload)
    return digest, size


def weight_of(row: bytes) -> int:
    """Return how many bytes a message counts for."""
    in_file = read_reference(split_row(row)[1])[1] if row[0] & _IN_FILE else 0
    return len(row) + _ROW_WEIGHT + in_file


# All that follows takes a transaction that was begun on the database of messages.


def join(txn: Any, file: LmdbFile, member: Member) -> int:
    """Make a subscription a member of a mailbox; return the number of its first message."""
    state = _load(txn, member.mailbox)
    _save(txn, member.mailbox, *state)
    _note_position(txn, file, member, end := state[1])
    return end


def leave(txn: Any, file: LmdbFile, member: Member) -> None:
    """Take a subscription away; with the last one the mailbox goes, see `remove`."""
    txn.delete(member.mailbox + member.key, db=file.databases["members"])
    if not _positions(txn, file, member.mailbox):
        remove(txn, file, member.mailbox)


def append(txn: Any, file: LmdbFile, mailbox: bytes, row: bytes, maxsize: int) -> None:
    """Add a message; the oldest give way to it where there are too many or they weigh too much.

    At most a thousand do: the next message removes what is left to remove.
    """
    oldest, end, weight = _load(txn, mailbox)
    txn.put(mailbox + _NUMBER.pack(end), row)
    end += 1
    weight += weight_of(row)
    for _ in range(_MOST_AT_ONCE):
        if end - oldest <= maxsize and (weight <= INBOX_BYTES or end - oldest == 1):
            break
        weight -= _pop(txn, file, mailbox, oldest)
        oldest += 1
    _save(txn, mailbox, oldest, end, weight)


def get(txn: Any, mailbox: bytes, number: int) -> bytes | None:
    """Return the message of that number, or None."""
    row: bytes | None = txn.get(mailbox + _NUMBER.pack(number))
    return row


def look(txn: Any, mailbox: bytes, number: int) -> tuple[int, int, bytes | None]:
    """Return what there is from a number on.

    Returns:
        The number of the first message, or of the next to come; the end of the numbers; and the
        first message, or None.
    """
    oldest, end, _ = _load(txn, mailbox)
    first = max(number, oldest)
    return first, end, txn.get(mailbox + _NUMBER.pack(first))


def release(txn: Any, file: LmdbFile, member: Member, number: int, most: int) -> bool:
    """Note that a member has read what is below a number; remove what all of them have.

    Args:
        txn: A write transaction.
        file: The file.
        member: The member.
        number: That of its next message.
        most: How many messages to remove.

    Returns:
        Whether all that can be removed is removed.
    """
    _note_position(txn, file, member, number)
    stop = min(_positions(txn, file, member.mailbox))
    return _remove_below(txn, file, member.mailbox, stop, most)


def remove(txn: Any, file: LmdbFile, mailbox: bytes, most: int = _MOST_AT_ONCE) -> bool:
    """Remove a mailbox, or so many of its messages if there are more; return whether it is gone."""
    if not _remove_below(txn, file, mailbox, _load(txn, mailbox)[1], most):
        return False
    txn.delete(mailbox + _STATE_NUMBER)
    return True


def without_members(txn: Any, file: LmdbFile) -> list[bytes]:
    """Return the keys of the mailboxes that nobody reads."""
    found = []
    with txn.cursor() as cursor:
        more = cursor.first()
        while more:
            mailbox = cursor.key()[:KEY_SIZE]
            if not _positions(txn, file, mailbox):
                found.append(mailbox)
            cursor.set_range(mailbox + _STATE_NUMBER)
            more = cursor.next()
    return found


def _remove_below(txn: Any, file: LmdbFile, mailbox: bytes, number: int, most: int) -> bool:
    oldest, end, weight = _load(txn, mailbox)
    stop = min(number, oldest + most)
    if stop > oldest:
        for each in range(oldest, stop):
            weight -= _pop(txn, file, mailbox, each)
        _save(txn, mailbox, stop, end, weight)
    return stop >= number


def _pop(txn: Any, file: LmdbFile, mailbox: bytes, number: int) -> int:
    """Remove a message; return what it weighed."""
    row = txn.pop(mailbox + _NUMBER.pack(number))
    _, payload, in_file = split_row(row)
    if in_file:
        file.blobs.release(txn, *read_reference(payload))
    return weight_of(row)


def _load(txn: Any, mailbox: bytes) -> tuple[int, int, int]:
    stored = txn.get(mailbox + _STATE_NUMBER)
    return (0, 0, 0) if stored is None else _STATE.unpack(stored)


def _save(txn: Any, mailbox: bytes, oldest: int, end: int, weight: int) -> None:
    txn.put(mailbox + _STATE_NUMBER, _STATE.pack(oldest, end, weight))


def _note_position(txn: Any, file: LmdbFile, member: Member, number: int) -> None:
    txn.put(member.mailbox + member.key, _NUMBER.pack(number), db=file.databases["members"])


def _positions(txn: Any, file: LmdbFile, mailbox: bytes) -> list[int]:
    """Return the number each member has got to."""
    found = []
    with txn.cursor(file.databases["members"]) as cursor:
        if cursor.set_range(mailbox):
            for key, position in cursor:
                if key[:KEY_SIZE] != mailbox:
                    break
                found.append(_NUMBER.unpack(position)[0])
    return found
