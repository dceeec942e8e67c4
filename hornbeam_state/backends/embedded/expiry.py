"""Which keys of an LMDB file expire when: an index beside the records, and the sweep along it.

An entry's key is the time (milliseconds since the epoch, big-endian), a letter for the space and
the stored key; it has no value. A record and its entry change in one transaction.
"""

from __future__ import annotations

import contextlib
import struct
from typing import TYPE_CHECKING, Any, Final

from hornbeam_state.backends.embedded.records import DamagedRecord, expiry_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_TIME: Final = struct.Struct(">Q")
_START: Final = _TIME.size + 1


def entry(expiry: int, letter: bytes, stored: bytes) -> bytes:
    """Return the index entry of a record that expires at that millisecond."""
    return _TIME.pack(expiry) + letter + stored


def move(
    txn: Any, index: Any, letter: bytes, stored: bytes, *, before: bytes | None, expiry: int
) -> None:
    """Note that a record's expiry changed.

    Args:
        txn: A write transaction.
        index: The database of the index.
        letter: The letter of the record's space.
        stored: The record's key.
        before: The record it replaces, if any.
        expiry: When it expires now, 0 for never.
    """
    old = 0 if before is None else expiry_of(before)
    if old == expiry:
        return
    if old:
        txn.delete(entry(old, letter, stored), db=index)
    if expiry:
        txn.put(entry(expiry, letter, stored), b"", db=index)


def is_due(txn: Any, index: Any, now: int) -> bool:
    """Return whether any record has expired by that millisecond."""
    with txn.cursor(index) as cursor:
        return bool(cursor.first()) and _time_of(cursor.key()) <= now


def sweep(
    txn: Any,
    index: Any,
    now: int,
    most: int,
    remove: Mapping[bytes, Callable[[Any, bytes], object]],
) -> int:
    """Remove expired records, the earliest first.

    Args:
        txn: A write transaction.
        index: The database of the index.
        now: The time in milliseconds.
        most: How many to remove.
        remove: By letter, what removes a record and its entry.

    Returns:
        How many were removed; fewer than `most` when none are left.
    """
    due: list[bytes] = []
    with txn.cursor(index) as cursor:
        for key in cursor.iternext(keys=True, values=False):
            if _time_of(key) > now or len(due) == most:
                break
            due.append(key)
    for key in due:
        letter, stored = key[_TIME.size : _START], key[_START:]
        # What is damaged goes all the same: it must not keep all that expires later.
        if stored and letter in remove:
            with contextlib.suppress(DamagedRecord):
                remove[letter](txn, stored)
        txn.delete(key, db=index)
    return len(due)


def _time_of(key: bytes) -> int:
    """Return the millisecond at the start of an entry; of a damaged one, an early one."""
    return int.from_bytes(key[: _TIME.size].ljust(_TIME.size, b"\0"), "big")
