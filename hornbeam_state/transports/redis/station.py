"""What the parts of a server share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hornbeam_state.backends.redis.backend import RedisBackend
    from hornbeam_state.transports.redis.keys import NodeKeys


@dataclass(frozen=True, slots=True, kw_only=True)
class Station:
    """A node, and the store through which it is called.

    Attributes:
        backend: The store.
        node: The name of the node.
        keys: Where its things lie.
        secret: What messages are signed with; None: they are not.
        most_bytes: The largest call.
    """

    backend: RedisBackend
    node: str
    keys: NodeKeys
    secret: bytes | None
    most_bytes: int
