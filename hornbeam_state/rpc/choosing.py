"""Which of several nodes gets a call. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hornbeam_state.errors import NotExposed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

    from hornbeam_state.rpc.entries import Entry


def choose(entries: Sequence[Entry], pending: Callable[[str], int], random: Random) -> Entry:
    """Return the less busy of two random nodes.

    Two, and not the least busy of all: what is known of their load is a second old, and all callers
    would send their calls to the same node.

    Args:
        entries: The nodes, one at least.
        pending: How many calls this process has under way to a node.
        random: Where chance comes from.
    """
    candidates = random.sample(entries, min(2, len(entries)))
    # What is pending from here is part of the load, and known as of now.
    return min(candidates, key=lambda one: max(one.load, pending(one.name) / one.concurrency))


def able(entries: Sequence[Entry], function: str) -> list[Entry]:
    """Return the nodes that expose ``"module.function"``.

    Raises:
        NotExposed: none does.
    """
    found = exposing(entries, function)
    if not found:
        raise NotExposed(f"none of {len(entries)} nodes exposes {function}")
    return found


def exposing(entries: Sequence[Entry], function: str) -> list[Entry]:
    """Return the nodes that expose ``"module.function"``; maybe none."""
    return [entry for entry in entries if function in entry.functions]


def split_name(function: str) -> tuple[str, str]:
    """Return the module and the function of ``"module.function"``.

    Raises:
        ValueError: it has no dot.
    """
    module, dot, name = function.rpartition(".")
    if not (dot and module and name):
        raise ValueError(f'{function!r} is no "module.function"')
    return module, name
