"""Who subscribes to what: rows of LMDB, and the table that publishers keep of them.

Whenever a subscription comes or goes, a random version is written beside the rows. Who finds
another version than that of its table reads the rows again.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from msgspec import msgpack

from hornbeam_state.backends.base import Topics
from hornbeam_state.backends.embedded.mailboxes import KEY_SIZE, Member

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hornbeam_state.backends.embedded.lmdb_file import LmdbFile

DATABASE: Final = "subscribers"
_VERSION: Final = b"version"
_LARGEST: Final = 2**63 - 1
_MEMBER_KEY_SIZE: Final = 8


class Audience(NamedTuple):
    """All who ask for the same, and thus share a mailbox.

    Attributes:
        mailbox: Its key.
        maxsize: How many messages may wait in it.
        sockets: The name of each one's socket.
    """

    mailbox: bytes
    maxsize: int
    sockets: tuple[str, ...]


class Table:
    """The subscriptions of one moment, by topic. Never changes.

    Args:
        version: That of the rows it is made of.
        rows: What is asked for, and by whom.
    """

    def __init__(self, version: bytes | None, rows: Mapping[bytes, Sequence[bytes]]) -> None:
        self.version = version
        self.all: list[Audience] = []
        self._by_name: defaultdict[bytes, list[Audience]] = defaultdict(list)
        self._by_prefix: list[tuple[bytes, Audience]] = []
        for row, keys in rows.items():
            topics, maxsize = _decoded(row)
            audience = Audience(_mailbox(row), maxsize, tuple(key.hex() for key in keys))
            self.all.append(audience)
            for name in topics.names:
                self._by_name[name].append(audience)
            self._by_prefix.extend((prefix, audience) for prefix in topics.prefixes)

    def matching(self, topic: bytes) -> list[Audience]:
        """Return those who get a message on a topic."""
        named = self._by_name.get(topic, [])
        if not self._by_prefix:
            return named
        return named + [one for prefix, one in self._by_prefix if topic.startswith(prefix)]


def version(txn: Any, file: LmdbFile) -> bytes | None:
    """Return the version of the rows, or None where nobody has ever subscribed."""
    found: bytes | None = txn.get(_VERSION, None, file.meta)
    return found


def load(txn: Any, file: LmdbFile) -> Table:
    """Return the table of all rows."""
    rows = defaultdict(list)
    with txn.cursor(file.databases[DATABASE]) as cursor:
        for key, row in cursor:
            rows[row].append(key)
    return Table(version(txn, file), rows)


def add(txn: Any, file: LmdbFile, key: bytes, topics: Topics, maxsize: int) -> Member:
    """Write the row of a subscription; return the mailbox that it is to join."""
    row = msgpack.encode((min(maxsize, _LARGEST), *topics))
    txn.put(key, row, db=file.databases[DATABASE])
    _note_change(txn, file)
    return Member(_mailbox(row), key)


def remove(txn: Any, file: LmdbFile, key: bytes) -> Member | None:
    """Remove the row of a subscription; return the mailbox that it is to leave."""
    row = txn.pop(key, db=file.databases[DATABASE])
    if row is None:
        return None
    _note_change(txn, file)
    return Member(_mailbox(row), key)


def make_key() -> bytes:
    """Return a key that no other subscription has."""
    return os.urandom(_MEMBER_KEY_SIZE)


def _decoded(row: bytes) -> tuple[Topics, int]:
    maxsize, names, prefixes = msgpack.decode(
        row, type=tuple[int, tuple[bytes, ...], tuple[bytes, ...]]
    )
    return Topics(names, prefixes), maxsize


def _mailbox(row: bytes) -> bytes:
    """Return the key of the mailbox of those who have the same row."""
    return hashlib.blake2b(row, digest_size=KEY_SIZE).digest()


def _note_change(txn: Any, file: LmdbFile) -> None:
    txn.put(_VERSION, os.urandom(8), db=file.meta)
