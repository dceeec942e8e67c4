"""Where messages wait: rows of LMDB, numbered from 0 in each mailbox.

Subscriptions that ask for the same share a mailbox, so that a message is written once for all of
them. Each counts for itself what it has read; a number that is gone by then is a message that was
dropped. Now and then it notes how far it has got, and what all of them have read is removed.

There are three databases: ``messages`` (mailbox and number, to the message), ``mailboxes`` (which
numbers are there) and ``members`` (mailbox and subscription, to the number it has got to). A large
payload lies in a file.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hornbeam_state.backends.base import INBOX_BYTES
from hornbeam_state.backends.blobs import Blob
from hornbeam_state.errors import StoreUnavailable

if TYPE_CHECKING:
    from hornbeam_state.backends.lmdb_file import LmdbFile

DATABASES: Final = ("messages", "mailboxes", "members")
KEY_SIZE: Final = 16
_NUMBER: Final = struct.Struct(">Q")
_STATE: Final = struct.Struct("<QQQ")
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


class _State(NamedTuple):
    """What a mailbox holds: the numbers from `oldest` to below `end`."""

    oldest: int
    end: int
    weight: int


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


def row_key(mailbox: bytes, number: int) -> bytes:
    """Return the key of a message."""
    return mailbox + _NUMBER.pack(number)


# All that follows takes a transaction that was begun on the database of messages.


def join(txn: Any, file: LmdbFile, member: Member) -> int:
    """Make a subscription a member of a mailbox; return the number of its first message."""
    state = _load(txn, file, member.mailbox)
    _save(txn, file, member.mailbox, state)
    _note_position(txn, file, member, state.end)
    return state.end


def leave(txn: Any, file: LmdbFile, member: Member) -> None:
    """Take a subscription away; with the last one the mailbox goes, see `remove`."""
    txn.delete(member.mailbox + member.key, db=file.databases["members"])
    if not _positions(txn, file, member.mailbox):
        remove(txn, file, member.mailbox)


def append(txn: Any, file: LmdbFile, mailbox: bytes, row: bytes, maxsize: int) -> None:
    """Add a message; the oldest give way to it where there are too many or they weigh too much.

    At most a thousand do: the next message removes what is left to remove.
    """
    oldest, end, weight = _load(txn, file, mailbox)
    txn.put(mailbox + _NUMBER.pack(end), row)
    end += 1
    weight += weight_of(row)
    for _ in range(_MOST_AT_ONCE):
        if end - oldest <= maxsize and (weight <= INBOX_BYTES or end - oldest == 1):
            break
        weight -= _pop(txn, file, mailbox, oldest)
        oldest += 1
    _save(txn, file, mailbox, _State(oldest, end, weight))


def find(txn: Any, file: LmdbFile, member: Member, number: int) -> tuple[int, bytes] | None:
    """Return the first message of that number or above, or None if there is none yet.

    Raises:
        StoreUnavailable: the subscription is no member any more.
    """
    number = max(number, oldest(txn, file, member))
    row = txn.get(member.mailbox + _NUMBER.pack(number))
    return None if row is None else (number, row)


def oldest(txn: Any, file: LmdbFile, member: Member) -> int:
    """Return the number of the oldest message, or of the next where there is none.

    Raises:
        StoreUnavailable: the subscription is no member any more.
    """
    if txn.get(member.mailbox + member.key, None, file.databases["members"]) is None:
        raise StoreUnavailable(
            "the subscription is gone from the store, since its socket could not be reached: "
            "subscribe again"
        )
    return _load(txn, file, member.mailbox).oldest


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
    if not _remove_below(txn, file, mailbox, _load(txn, file, mailbox).end, most):
        return False
    txn.delete(mailbox, db=file.databases["mailboxes"])
    return True


def without_members(txn: Any, file: LmdbFile) -> list[bytes]:
    """Return the keys of the mailboxes that nobody reads."""
    with txn.cursor(file.databases["mailboxes"]) as cursor:
        keys = list(cursor.iternext(keys=True, values=False))
    return [key for key in keys if not _positions(txn, file, key)]


def _remove_below(txn: Any, file: LmdbFile, mailbox: bytes, number: int, most: int) -> bool:
    oldest, end, weight = _load(txn, file, mailbox)
    stop = min(number, oldest + most)
    if stop > oldest:
        for each in range(oldest, stop):
            weight -= _pop(txn, file, mailbox, each)
        _save(txn, file, mailbox, _State(stop, end, weight))
    return stop >= number


def _pop(txn: Any, file: LmdbFile, mailbox: bytes, number: int) -> int:
    """Remove a message; return what it weighed."""
    row = txn.pop(mailbox + _NUMBER.pack(number))
    _, payload, in_file = split_row(row)
    if in_file:
        file.blobs.release(txn, *read_reference(payload))
    return weight_of(row)


def _load(txn: Any, file: LmdbFile, mailbox: bytes) -> _State:
    stored = txn.get(mailbox, None, file.databases["mailboxes"])
    return _State(0, 0, 0) if stored is None else _State(*_STATE.unpack(stored))


def _save(txn: Any, file: LmdbFile, mailbox: bytes, state: _State) -> None:
    txn.put(mailbox, _STATE.pack(*state), db=file.databases["mailboxes"])


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
