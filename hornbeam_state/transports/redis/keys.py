"""Where things lie: the names of keys, which are the same for every version of hornbeam.

All keys of a node are in one bucket of the store, hence in one hash slot, and all keys of an inbox
in one, though in another::

    hb:{b17}:rpc:calls:<node>            stream: calls and casts that wait, and casts that run
    hb:{b17}:rpc:node:<node>             hash: what the node says of itself
    hb:{b17}:rpc:dead:<node>             stream: what was never run, or never to its end, and why
    hb:{b17}:rpc:once:<node>:<id>        what became of a message, so that it does not run twice
    hb:{b17}:rpc:part:<node>:<place>:<n> a piece of a large message
    hb:{b42}:rpc:inbox:<client>          stream: the answers to one process
    hb:{b42}:rpc:alive:<client>          whether that process still reads them
"""

from __future__ import annotations

from typing import Final

from hornbeam_state.backends.redis.steps import bucket_of

GROUP: Final = b"hb"
"""The consumer group of every stream of calls."""


class NodeKeys:
    """The keys of a node.

    Args:
        node: Its name.
    """

    def __init__(self, node: str) -> None:
        name = node.encode()
        self.bucket = bucket_of(name)
        stem = b"hb:{b%02d}:rpc:" % self.bucket
        self.calls = stem + b"calls:" + name
        self.node = stem + b"node:" + name
        self.dead = stem + b"dead:" + name
        self._once = stem + b"once:" + name + b":"
        self._part = stem + b"part:" + name + b":"

    def once(self, id: bytes) -> bytes:
        """Return where it is noted what became of a message."""
        return self._once + id.hex().encode()

    def parts(self, place: bytes, count: int) -> list[bytes]:
        """Return where the pieces of a large message lie."""
        stem = self._part + place.hex().encode()
        return [b"%s:%d" % (stem, number) for number in range(count)]


class InboxKeys:
    """The keys of the inbox of a process.

    Args:
        client: What names the process: random bytes.
    """

    def __init__(self, client: bytes) -> None:
        name = client.hex().encode()
        self.bucket = bucket_of(name)
        stem = b"hb:{b%02d}:rpc:" % self.bucket
        self.inbox = stem + b"inbox:" + name
        self.alive = stem + b"alive:" + name


def cancel_topic(node: str) -> bytes:
    """Return the topic on which a node hears which calls are cancelled."""
    return b"rpc:" + node.encode()
