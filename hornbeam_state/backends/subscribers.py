"""Who subscribes to what: rows of LMDB, and the table that publishers keep of them.

Whenever a subscription comes or goes, a random version is written beside the rows. Who finds
another version than that of its table reads the rows again.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from msgspec import msgpack

from hornbeam_state.backends.base import Topics

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hornbeam_state.backends.lmdb_file import LmdbFile

_VERSION: Final = b"version"
_LARGEST: Final = 2**63 - 1


class Subscriber(NamedTuple):
    """A subscription, as publishers see it.

    Attributes:
        key: What its mailbox is called.
        topics: What it asks for.
        maxsize: How many messages may wait.
    """

    key: bytes
    topics: Topics
    maxsize: int

    @property
    def name(self) -> str:
        """What its socket is called."""
        return self.key.hex()


class Table:
    """The subscriptions of one moment, by topic. Never changes.

    Args:
        version: Of the rows it was made of.
        subscribers: All of them.
    """

    def __init__(self, version: bytes | None, subscribers: Iterable[Subscriber] = ()) -> None:
        self.version = version
        self.all = tuple(subscribers)
        self._by_name: dict[bytes, list[Subscriber]] = {}
        self._by_prefix: list[tuple[bytes, Subscriber]] = []
        for one in self.all:
            for name in one.topics.names:
                self._by_name.setdefault(name, []).append(one)
            self._by_prefix.extend((prefix, one) for prefix in one.topics.prefixes)

    def matching(self, topic: bytes) -> list[Subscriber]:
        """Return those who get a message on a topic."""
        widely = [one for prefix, one in self._by_prefix if topic.startswith(prefix)]
        return self._by_name.get(topic, []) + widely


def version(txn: Any, file: LmdbFile) -> bytes | None:
    """Return the version of the rows, or None where nobody has ever subscribed."""
    found: bytes | None = txn.get(_VERSION, db=file.meta)
    return found


def load(txn: Any, file: LmdbFile) -> Table:
    """Return the table of all rows."""
    with txn.cursor(file.databases["subscribers"]) as cursor:
        return Table(version(txn, file), [_decoded(key, row) for key, row in cursor])


def add(txn: Any, file: LmdbFile, subscriber: Subscriber) -> None:
    """Write the row of a subscription."""
    row = msgpack.encode((min(subscriber.maxsize, _LARGEST), *subscriber.topics))
    txn.put(subscriber.key, row, db=file.databases["subscribers"])
    _note_change(txn, file)


def remove(txn: Any, file: LmdbFile, key: bytes) -> None:
    """Remove the row of a subscription, if it is there."""
    if txn.delete(key, db=file.databases["subscribers"]):
        _note_change(txn, file)


def _decoded(key: bytes, row: bytes) -> Subscriber:
    maxsize, names, prefixes = msgpack.decode(
        row, type=tuple[int, tuple[bytes, ...], tuple[bytes, ...]]
    )
    return Subscriber(key, Topics(names, prefixes), maxsize)


def _note_change(txn: Any, file: LmdbFile) -> None:
    txn.put(_VERSION, os.urandom(8), db=file.meta)
