"""Where the messages for one subscription wait: rows of LMDB, numbered from 0.

A subscription has a key of 8 bytes. In the database ``messages`` a row's key is that and the
message's number, in ``mailboxes`` one row says which numbers are there and what they weigh. Who
reads keeps its own count: a number that is gone is a message that was dropped. A large payload
lies in a file that all mailboxes share.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hornbeam_state.backends.base import INBOX_BYTES
from hornbeam_state.backends.blobs import Blob
from hornbeam_state.errors import StoreUnavailable

if TYPE_CHECKING:
    from hornbeam_state.backends.lmdb_file import LmdbFile

KEY_SIZE: Final = 8
_NUMBER: Final = struct.Struct(">Q")
_BOX: Final = struct.Struct("<QQQ")
_HEADER: Final = struct.Struct("<BH")  # flags, bytes of the topic
_BLOB: Final = 1
_REFERENCE: Final = struct.Struct("<32sQ")
_ROW_WEIGHT: Final = 32  # what LMDB adds to a row, about
_MOST_AT_ONCE: Final = 1000  # rows removed in a transaction, so that nobody waits long for it
_MOST_NUMBER: Final = 2**64 - 1


class _Box(NamedTuple):
    """What a mailbox holds: the numbers from `oldest` to below `end`."""

    oldest: int
    end: int
    weight: int


def make_key() -> bytes:
    """Return a key that no other subscription has."""
    return os.urandom(KEY_SIZE)


def make_row(topic: bytes, payload: bytes | Blob) -> bytes:
    """Return the row of a message."""
    if isinstance(payload, Blob):
        reference = _REFERENCE.pack(payload.digest, payload.size)
        return _HEADER.pack(_BLOB, len(topic)) + topic + reference
    return _HEADER.pack(0, len(topic)) + topic + payload


def topic_of(row: bytes) -> bytes:
    """Return the topic of a message."""
    return row[_HEADER.size : _end_of_topic(row)]


def payload_of(row: bytes) -> bytes:
    """Return the payload of a message that does not lie in a file."""
    return row[_end_of_topic(row) :]


def blob_of(row: bytes) -> tuple[bytes, int] | None:
    """Return digest and size of the payload if it lies in a file."""
    if not row[0] & _BLOB:
        return None
    digest, size = _REFERENCE.unpack_from(row, _end_of_topic(row))
    return digest, size


def weight_of(row: bytes) -> int:
    """Return how many bytes a message counts for."""
    blob = blob_of(row)
    return len(row) + _ROW_WEIGHT + (0 if blob is None else blob[1])


def _end_of_topic(row: bytes) -> int:
    return _HEADER.size + int(_HEADER.unpack_from(row)[1])


# All that follows takes a transaction that was begun on the database of messages.


def create(txn: Any, file: LmdbFile, key: bytes) -> None:
    """Make an empty mailbox."""
    _save(txn, file, key, _Box(0, 0, 0))


def keys(txn: Any, file: LmdbFile) -> list[bytes]:
    """Return the keys of all mailboxes."""
    with txn.cursor(file.databases["mailboxes"]) as cursor:
        return list(cursor.iternext(keys=True, values=False))


def append(txn: Any, file: LmdbFile, key: bytes, row: bytes, maxsize: int) -> None:
    """Add a message; the oldest give way to it where there are too many or they weigh too much.

    At most a thousand do: the next message removes what is left to remove.
    """
    box = _load(txn, file, key)
    txn.put(_row_key(key, box.end), row)
    box = _Box(box.oldest, box.end + 1, box.weight + weight_of(row))
    for _ in range(_MOST_AT_ONCE):
        waiting = box.end - box.oldest
        if waiting <= maxsize and (box.weight <= INBOX_BYTES or waiting == 1):
            break
        box = _without_oldest(txn, file, key, box)
    _save(txn, file, key, box)


def find(txn: Any, file: LmdbFile, key: bytes, number: int) -> tuple[int, bytes] | None:
    """Return the first message of that number or above, or None if there is none yet.

    Raises:
        StoreUnavailable: the mailbox was removed.
    """
    row = txn.get(_row_key(key, number))
    if row is None:
        number = max(number, _load(txn, file, key).oldest)
        row = txn.get(_row_key(key, number))
    return None if row is None else (number, row)


def oldest(txn: Any, file: LmdbFile, key: bytes) -> int:
    """Return the number of the oldest message, or of the next where none waits.

    Raises:
        StoreUnavailable: the mailbox was removed.
    """
    return _load(txn, file, key).oldest


def release(txn: Any, file: LmdbFile, key: bytes, end: int, most: int) -> bool:
    """Remove at most so many messages below a number; return whether all of them are removed."""
    box = _load(txn, file, key)
    end = min(end, box.end)
    for _ in range(min(end - box.oldest, most)):
        box = _without_oldest(txn, file, key, box)
    _save(txn, file, key, box)
    return box.oldest >= end


def remove(txn: Any, file: LmdbFile, key: bytes, most: int = _MOST_AT_ONCE) -> bool:
    """Remove a mailbox, or so many of its messages if there are more; return whether it is gone."""
    if txn.get(key, db=file.databases["mailboxes"]) is None:
        return True
    if not release(txn, file, key, _MOST_NUMBER, most):
        return False
    txn.delete(key, db=file.databases["mailboxes"])
    return True


def _without_oldest(txn: Any, file: LmdbFile, key: bytes, box: _Box) -> _Box:
    row = txn.pop(_row_key(key, box.oldest))
    if row is None:
        return box._replace(oldest=box.oldest + 1)
    blob = blob_of(row)
    if blob is not None:
        file.blobs.release(txn, *blob)
    return _Box(box.oldest + 1, box.end, box.weight - weight_of(row))


def _row_key(key: bytes, number: int) -> bytes:
    return key + _NUMBER.pack(number)


def _load(txn: Any, file: LmdbFile, key: bytes) -> _Box:
    stored = txn.get(key, db=file.databases["mailboxes"])
    if stored is None:
        raise StoreUnavailable(
            "the subscription is gone from the store: its socket was found closed or was removed. "
            "Subscribe again"
        )
    return _Box(*_BOX.unpack(stored))


def _save(txn: Any, file: LmdbFile, key: bytes, box: _Box) -> None:
    txn.put(key, _BOX.pack(*box), db=file.databases["mailboxes"])
