"""Casts that a node gave up: looking at them, dropping them, having them run again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

from hornbeam_state.default import default_store
from hornbeam_state.rpc.carriers import is_on_redis

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hornbeam_state.backends.redis.backend import RedisBackend
    from hornbeam_state.backends.redis.batches import Steps
    from hornbeam_state.transports.redis.letters import DeadLetters, Letter

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DeadLetter:
    """A message that a node did not run, or never to its end. Its arguments are not shown.

    Attributes:
        id: What names it, on its node.
        node: For whom it was.
        function: ``"module.function"``; None: that cannot be read, or is not signed as it has to
            be.
        reason: Why it is a dead letter.
        since: Since when, in seconds since the epoch by the clock of the server.
        is_cast: Whether it can be repeated. A call cannot: nobody waits for it any more.
    """

    id: str
    node: str
    function: str | None
    reason: str
    since: float
    is_cast: bool


def dead_letters(node: str) -> list[DeadLetter]:
    """Return the dead letters of a node, the oldest first; blocks.

    The last 256 are kept, for a week after the last one. Only a store on Redis keeps any.

    Args:
        node: Its full name. It need not be there.

    Raises:
        StoreUnavailable: the server cannot be reached.
    """
    return _shown(node, _ask(node, lambda letters: letters.all(), []))


async def adead_letters(node: str) -> list[DeadLetter]:
    """Awaitable twin of `dead_letters`."""
    return _shown(node, await _aask(node, lambda letters: letters.all(), []))


def drop_dead_letters(node: str, ids: Iterable[str]) -> int:
    """Drop dead letters of a node; return how many there were. Blocks.

    Args:
        node: Its full name.
        ids: Which ones: `DeadLetter.id`.

    Raises:
        StoreUnavailable: the server cannot be reached.
    """
    return _ask(node, lambda letters: letters.drop(_encoded(ids)), 0)


async def adrop_dead_letters(node: str, ids: Iterable[str]) -> int:
    """Awaitable twin of `drop_dead_letters`."""
    return await _aask(node, lambda letters: letters.drop(_encoded(ids)), 0)


def repeat_dead_letters(node: str, ids: Iterable[str] | None = None) -> int:
    """Have casts that are dead letters wait for their node again; return how many do. Blocks.

    They are tried five times again, within a day. Large arguments are gone a day after the cast.

    Args:
        node: Its full name. It need not be there.
        ids: Which ones: `DeadLetter.id`; None: all. Those that are no casts stay.

    Raises:
        StoreUnavailable: the server cannot be reached; some may wait again.
    """
    return _ask(node, lambda letters: letters.repeat(_chosen(ids)), 0)


async def arepeat_dead_letters(node: str, ids: Iterable[str] | None = None) -> int:
    """Awaitable twin of `repeat_dead_letters`."""
    return await _aask(node, lambda letters: letters.repeat(_chosen(ids)), 0)


def _ask(node: str, question: Callable[[DeadLetters], Steps[T]], nothing: T) -> T:
    """Return what the server says of the letters of a node; `nothing`: the store keeps none."""
    place = _find(node)
    if place is None:
        return nothing
    backend, letters = place
    return backend.link.run(question(letters))


async def _aask(node: str, question: Callable[[DeadLetters], Steps[T]], nothing: T) -> T:
    place = _find(node)
    if place is None:
        return nothing
    backend, letters = place
    return await backend.alink.run(question(letters))


def _find(node: str) -> tuple[RedisBackend, DeadLetters] | None:
    """Return where the dead letters of a node lie; None: the store keeps none."""
    store = default_store()
    if not is_on_redis(store):
        return None
    from hornbeam_state.transports.redis.envelope import secret_from
    from hornbeam_state.transports.redis.letters import DeadLetters

    return cast("RedisBackend", store.backend), DeadLetters(node, secret_from(None))


def _chosen(ids: Iterable[str] | None) -> list[bytes] | None:
    return None if ids is None else _encoded(ids)


def _shown(node: str, found: Iterable[Letter]) -> list[DeadLetter]:
    return [
        DeadLetter(
            id=each.id.decode(),
            node=node,
            function=each.function,
            reason=each.reason.decode("utf-8", "replace"),
            since=int(each.id.partition(b"-")[0]) / 1000,
            is_cast=each.is_cast,
        )
        for each in found
    ]


def _encoded(ids: Iterable[str]) -> list[bytes]:
    return [each.encode() for each in ids]
