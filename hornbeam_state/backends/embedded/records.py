"""How the embedded store lays out a key and its value in LMDB.

A record is a header (flags, expiry in milliseconds since the epoch, 0 for none) and the value.
LMDB keys end at 511 bytes; a longer key keeps its first bytes, so that prefix listing still finds
it, and gains a digest; its full text lies between header and value.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Final
from zlib import crc32

from hornbeam_state.errors import StoreUnavailable, WrongType

_HEADER: Final = struct.Struct("<BQ")
_SIZE: Final = _HEADER.size
_LONG_KEY: Final = 1  # flags
_BLOB: Final = 2
_ALL_FLAGS: Final = _LONG_KEY | _BLOB
_REFERENCE: Final = struct.Struct("<32sQ")
_HASH: Final = struct.Struct(">I")
HASH_SIZE: Final = _HASH.size
_KEY_LENGTH: Final = struct.Struct("<H")
PLAIN_HEADER: Final = _HEADER.pack(0, 0)
"""What the record of a plain key that does not expire begins with: most of them."""
LONGEST_PLAIN_KEY: Final = 480
KEPT_OF_LONG_KEY: Final = 448
"""Bytes of a long key that its stored form begins with; 33 more make 481, never a plain key."""


class DamagedRecord(StoreUnavailable):
    """LMDB holds something that was never written there: nothing was changed."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"a record of the store is damaged: {problem}. Restore the store from a backup, or "
            f"move its directory away to start afresh"
        )


def stored_key(key: bytes) -> bytes:
    """Return the LMDB key for a key of 1 to 4,096 bytes."""
    if len(key) <= LONGEST_PLAIN_KEY:
        return key
    return key[:KEPT_OF_LONG_KEY] + b"\0" + hashlib.blake2b(key, digest_size=32).digest()


def scattered_key(key: bytes) -> bytes:
    """Return an LMDB key that begins with a hash, so that neighbours have nothing in common."""
    return _HASH.pack(crc32(key)) + stored_key(key)


def make_record(key: bytes, value: bytes, expiry: int, *, blob: bool = False) -> bytes:
    """Return the record of a value that expires at that millisecond (0: never).

    Args:
        key: The key as it was given.
        value: The value, or with `blob` what `blob_reference` makes.
        expiry: When it expires.
        blob: Whether the value lies in a file.
    """
    flags = _BLOB if blob else 0
    if len(key) <= LONGEST_PLAIN_KEY:
        return _HEADER.pack(flags, expiry) + value
    return _HEADER.pack(flags | _LONG_KEY, expiry) + _KEY_LENGTH.pack(len(key)) + key + value


def blob_reference(digest: bytes, size: int) -> bytes:
    """Return what stands in the record of a value that lies in a file."""
    return _REFERENCE.pack(digest, size)


def blob_of(record: bytes | memoryview) -> tuple[bytes, int] | None:
    """Return digest and size of a record's value if it lies in a file.

    Raises:
        DamagedRecord: there is no telling.
    """
    if not _flags_of(record) & _BLOB:
        return None
    reference = payload(bytes(record))
    if len(reference) != _REFERENCE.size:
        raise DamagedRecord("its reference to a file is of another length")
    digest, size = _REFERENCE.unpack(reference)
    return digest, int(size)


def expiry_of(record: bytes | memoryview) -> int:
    """Return the millisecond at which the record expires, 0 for never.

    Raises:
        DamagedRecord: there is no telling.
    """
    try:
        return int(_HEADER.unpack_from(record)[1])
    except struct.error:
        raise DamagedRecord("its header is cut off") from None


def payload(record: bytes) -> bytes:
    """Return the value in a record.

    Raises:
        DamagedRecord: it holds none.
    """
    return record[_end_of_key(record) if _flags_of(record) & _LONG_KEY else _SIZE :]


def full_key(stored: bytes | memoryview, record: bytes | memoryview) -> bytes:
    """Return the key as it was given.

    Raises:
        DamagedRecord: it is not there.
    """
    if not _flags_of(record) & _LONG_KEY:
        return bytes(stored)
    return bytes(record[_SIZE + _KEY_LENGTH.size : _end_of_key(record)])


def parse_counter(value: bytes) -> int:
    """Return the number a counter's value stands for.

    Raises:
        WrongType: it is the value of something else.
    """
    digits = value[1:] if value[:1] == b"-" else value
    if not digits.isdigit():
        raise WrongType("the key holds a value that is not a counter")
    return int(value)


def parse_count(text: bytes) -> int:
    """Return a number from the store's own books.

    Raises:
        DamagedRecord: it is none.
    """
    if not text.isdigit():
        raise DamagedRecord("a count is no number")
    return int(text)


def _flags_of(record: bytes | memoryview) -> int:
    if len(record) < _SIZE:
        raise DamagedRecord("its header is cut off")
    if record[0] > _ALL_FLAGS:
        raise DamagedRecord("its flags make no sense")
    return record[0]


def _end_of_key(record: bytes | memoryview) -> int:
    start = _SIZE + _KEY_LENGTH.size
    end = start + int.from_bytes(record[_SIZE:start], "little")
    if not start < end <= len(record):
        raise DamagedRecord("its key is cut off")
    return end
