"""Which server of a Cluster a bucket lives on, and what its redirections mean. No sockets here."""

from __future__ import annotations

from binascii import crc_hqx
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from redis import exceptions as driver

from hornbeam_state.backends.redis.steps import BUCKETS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_SLOTS: Final = 16384
_NOT_LOCAL: Final = "access a non local key in a cluster node"


class Address(NamedTuple):
    """Where a server listens.

    Attributes:
        host: Its name or number, or the path of its unix socket.
        port: Its port; 0 for a unix socket.
    """

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}" if self.port else self.host


def slot_of(bucket: int) -> int:
    """Return the hash slot of all keys of a bucket: the CRC-16 of what stands in the braces."""
    return crc_hqx(b"b%02d" % bucket, 0) % _SLOTS


SLOT_OF_BUCKET: Final = tuple(map(slot_of, range(BUCKETS)))


@dataclass(frozen=True, slots=True)
class ClusterMap:
    """Who serves what in a Cluster.

    Attributes:
        owners: The primary of each bucket, or None where nobody serves its slot.
        primaries: All primaries that serve any slot.
        nodes: The primaries and their replicas.
    """

    owners: tuple[Address | None, ...]
    primaries: tuple[Address, ...]
    nodes: tuple[Address, ...]

    @classmethod
    def parse(cls, reply: Sequence[Any], asked: Address) -> ClusterMap:
        """Read the reply to ``CLUSTER SLOTS``.

        Args:
            reply: The reply.
            asked: Who gave it. A node that does not know its own address leaves it out.
        """
        owners: list[Address | None] = [None] * BUCKETS
        primaries: dict[Address, None] = {}
        nodes: dict[Address, None] = {}
        for low, high, *servers in reply:
            known = [_node(server, asked) for server in servers]
            nodes.update(dict.fromkeys(node for node in known if node))
            if known and (owner := known[0]):
                primaries[owner] = None
                for bucket in _buckets(low, high):
                    owners[bucket] = owner
        return cls(tuple(owners), tuple(primaries), tuple(nodes))

    def moved(self, slot: int, owner: Address) -> ClusterMap:
        """Return the map after a slot went to another primary."""
        owners = list(self.owners)
        for bucket in _buckets(slot, slot):
            owners[bucket] = owner
        primaries = dict.fromkeys((*self.primaries, owner))
        nodes = dict.fromkeys((*self.nodes, owner))
        return ClusterMap(tuple(owners), tuple(primaries), tuple(nodes))


def _buckets(low: int, high: int) -> Iterator[int]:
    return (bucket for bucket, slot in enumerate(SLOT_OF_BUCKET) if low <= slot <= high)


def _node(server: Sequence[Any], asked: Address) -> Address | None:
    host, port = server[:2]
    name = asked.host if not host else host.decode()
    return None if name == "?" or not port else Address(name, int(port))


class Moved(NamedTuple):
    """A slot is served by another primary from now on; nothing was done."""

    slot: int
    address: Address


class Ask(NamedTuple):
    """A slot is on its way to another primary, which has the key already; nothing was done."""

    address: Address


class Later(NamedTuple):
    """The slot cannot be served for a moment; nothing was done.

    Attributes:
        is_down: Whether that is because some slots have no primary that is reachable.
    """

    is_down: bool


class Torn(NamedTuple):
    """A script met a key of its slot that has moved already; a part of it may have been done."""


Redirection = Moved | Ask | Later | Torn


def redirection(reply: Any, asked: Address) -> Redirection | None:
    """Return what a reply of a Cluster's node asks for, or None when it is the answer."""
    if not isinstance(reply, driver.ResponseError):
        return None
    if isinstance(reply, driver.AskError):  # of which MovedError is a kind
        address = Address(reply.host.strip("[]") or asked.host, reply.port)
        return (
            Moved(reply.slot_id, address) if isinstance(reply, driver.MovedError) else Ask(address)
        )
    if isinstance(reply, driver.TryAgainError | driver.ClusterDownError):
        return Later(isinstance(reply, driver.ClusterDownError))
    return Torn() if _NOT_LOCAL in str(reply) else None
