"""How a node is reached: over which transports it listens, and which of them a caller takes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hornbeam_state.backends.directory import runtime_directory
from hornbeam_state.config import REDIS_SCHEMES
from hornbeam_state.errors import NodeDown
from hornbeam_state.rpc.entrances import Entrance, LocalEntrance
from hornbeam_state.rpc.outcomes import unsent
from hornbeam_state.rpc.places import place
from hornbeam_state.transports import local
from hornbeam_state.transports.local.sockets import LONGEST_PATH

if TYPE_CHECKING:
    from hornbeam_state.rpc.entries import Entry
    from hornbeam_state.store import Store
    from hornbeam_state.transports.base import Channel

_DIRECTORY = "nodes"


def is_on_redis(store: Store) -> bool:
    """Whether calls and casts can go through the server of a store, which keeps casts."""
    return store.config.scheme in REDIS_SCHEMES


def entrances(store: Store, name: str, *, most_waiting: int) -> list[Entrance]:
    """Return where a node listens that is registered in this store.

    Args:
        store: Where it is registered.
        name: Its full name.
        most_waiting: How many calls may wait at an entrance that keeps them.
    """
    found: list[Entrance] = [LocalEntrance(_socket_path(store, name))]
    if is_on_redis(store):
        from hornbeam_state.rpc.over_redis import RedisEntrance

        found.append(RedisEntrance(store.config, name, most_waiting=most_waiting))
    return found


def connect(
    store: Store, entry: Entry, hello: dict[str, Any], timeout: float, *, keeps: bool = False
) -> Channel:
    """Return a channel to a node, the shortest there is; blocks.

    Args:
        store: Where the node is registered.
        entry: The node.
        hello: What it is told of this process.
        timeout: Seconds that a node of this machine has to answer.
        keeps: Whether it is for casts: over what keeps them, where there is that.

    Raises:
        NodeDown: it cannot be reached; `sent` is False.
        StoreUnavailable: the server cannot be reached.
        ConfigError: the node signs its messages, and this process does not, or the other way
            round.
    """
    by_redis = "redis" in entry.transports and is_on_redis(store)
    if is_near(entry) and not (keeps and by_redis):
        path = Path(entry.transports["local"]["path"])
        try:
            return local.connect(path, hello, timeout=timeout)
        except NodeDown:
            if not by_redis:
                raise
    if by_redis:
        from hornbeam_state.transports import redis

        return redis.connect(store.backend, entry.name)  # type: ignore[arg-type]
    raise unsent(
        f"the node {entry.name} cannot be reached from here: it listens for processes of one user "
        f"on {entry.host}, outside of containers that this process is not in"
    )


def is_near(entry: Entry) -> bool:
    """Whether a node listens on a socket that this process may connect to."""
    address = entry.transports.get("local")
    return address is not None and entry.place == place() and address.get("uid") == os.geteuid()


def _socket_path(store: Store, name: str) -> Path:
    """Return a path that a node of the same name finds again, and replaces."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
    path = store.backend.directory / _DIRECTORY / digest
    if len(os.fsencode(path)) > LONGEST_PATH:
        return runtime_directory(store.config) / _DIRECTORY / digest
    return path
