"""Channels for topics: their names, and which subscriptions may share a connection.

A channel is ``hb:<database>:m:<topic>``: Pub/Sub knows no databases, so the name tells them apart.

A server counts the connections that it hands a message to, and the patterns of each, so that its
count is one of subscriptions as long as no two of one connection match the same topic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from hornbeam_state.backends.redis.batches import Command, Steps, ask
from hornbeam_state.backends.redis.steps import literally

if TYPE_CHECKING:
    from hornbeam_state.backends.base import Topics


class Channels(NamedTuple):
    """What the server is asked for: names for SUBSCRIBE, patterns for PSUBSCRIBE."""

    names: tuple[bytes, ...]
    patterns: tuple[bytes, ...]


class Naming:
    """The names of the channels of one database."""

    def __init__(self, database: int) -> None:
        self._stem = b"hb:%d:m:" % database

    def channel(self, topic: bytes) -> bytes:
        """Return the channel of a topic."""
        return self._stem + topic

    def topic(self, channel: bytes) -> bytes:
        """Return the topic of a channel."""
        return channel[len(self._stem) :]

    def channels(self, topics: Topics) -> Channels:
        """Return what to subscribe to."""
        return Channels(
            names=tuple(map(self.channel, topics.names)),
            patterns=tuple(literally(self.channel(prefix)) + b"*" for prefix in topics.prefixes),
        )

    def publish(self, topic: bytes, payload: bytes) -> Steps[int]:
        """Publish a message; return the number of subscriptions that got it."""
        # In bucket 0, though there is no key: the subscriptions are at the primary of that bucket,
        # and a node of a Cluster counts only those that are its own.
        [count] = yield from ask(Command((b"PUBLISH", self.channel(topic), payload), bucket=0))
        return int(count)


class Coverage:
    """What the subscriptions of one connection match; no two of them match the same topic."""

    def __init__(self) -> None:
        self._names: set[bytes] = set()
        self._prefixes: tuple[bytes, ...] = ()

    def is_apart(self, topics: Topics) -> bool:
        """Return whether no topic is both in here and in `topics`."""
        return not (
            any(name in self._names or name.startswith(self._prefixes) for name in topics.names)
            or any(prefix.startswith(self._prefixes) for prefix in topics.prefixes)
            or (
                bool(topics.prefixes)
                and any(one.startswith(topics.prefixes) for one in (*self._names, *self._prefixes))
            )
        )

    def add(self, topics: Topics) -> None:
        """Cover these topics too."""
        self._names.update(topics.names)
        self._prefixes += topics.prefixes

    def remove(self, topics: Topics) -> None:
        """Cover these topics no more."""
        self._names.difference_update(topics.names)
        gone = frozenset(topics.prefixes)
        self._prefixes = tuple(prefix for prefix in self._prefixes if prefix not in gone)
