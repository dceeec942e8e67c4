"""Who is there: reading the registry."""

from __future__ import annotations

import time
from math import inf
from typing import TYPE_CHECKING, Final

from hornbeam_state.rpc.entries import PREFIX, Entry, NodeInfo, read_entry
from hornbeam_state.rpc.outcomes import unsent
from hornbeam_state.rpc.registration import TTL_S

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    from hornbeam_state.store import Store

_FRESH_S: Final = 0.25
_NOTHING: Final[tuple[float, list[Entry]]] = (-inf, [])


class Registry:
    """The nodes that share a store. Safe to use from any thread and event loop.

    Args:
        store: Where the registry is.
    """

    def __init__(self, store: Store) -> None:
        self._store = store.space("sys")
        self._listing: tuple[float, list[Entry]] = _NOTHING

    def live(self) -> list[Entry]:
        """Return the nodes that are ready, sorted by name; as of a quarter second ago at most.

        Raises:
            StoreUnavailable: the registry cannot be reached.
        """
        known = self._known()
        if known is None:
            keys = self._store.keys(PREFIX)
            known = self._note(self._store.get_multi(keys) if keys else {})
        return known

    async def alive(self) -> list[Entry]:
        """Awaitable twin of `live`."""
        known = self._known()
        if known is None:
            keys = await self._store.akeys(PREFIX)
            known = self._note(await self._store.aget_multi(keys) if keys else {})
        return known

    def look(self) -> list[Entry]:
        """Return what `live` does, as of now: for those who saw that it is out of date."""
        self._listing = _NOTHING
        return self.live()

    async def alook(self) -> list[Entry]:
        """Awaitable twin of `look`."""
        self._listing = _NOTHING
        return await self.alive()

    def find(self, name: str) -> Entry:
        """Return a node that is ready, as of now.

        Raises:
            NodeDown: there is none of that name; `sent` is False.
            StoreUnavailable: the registry cannot be reached.
        """
        entry = read_entry(self._store.get(PREFIX + name))
        if entry is None or not entry.is_ready:
            raise unsent(f"there is no node {name}")
        return entry

    def find_many(self, names: Iterable[str]) -> dict[str, Entry | None]:
        """Return the entries of several nodes as of now, None for one that is not there."""
        values = self._store.get_multi([PREFIX + name for name in names])
        return {key.removeprefix(PREFIX): read_entry(value) for key, value in values.items()}

    def info(self, name: str) -> NodeInfo:
        """Return what a node last said of itself.

        Raises:
            NodeDown: there is none of that name.
        """
        try:
            entry, left = self.find(name), self._store.ttl(PREFIX + name)
        except KeyError:  # it went between the two
            raise unsent(f"there is no node {name}") from None
        return entry.to_info(_last_seen(left))

    async def ainfo(self, name: str) -> NodeInfo:
        """Awaitable twin of `info`."""
        entry = read_entry(await self._store.aget(PREFIX + name))
        if entry is None or not entry.is_ready:
            raise unsent(f"there is no node {name}")
        try:
            left = await self._store.attl(PREFIX + name)
        except KeyError:
            raise unsent(f"there is no node {name}") from None
        return entry.to_info(_last_seen(left))

    def _known(self) -> list[Entry] | None:
        since, entries = self._listing
        return entries if time.monotonic() - since < _FRESH_S else None

    def _note(self, values: Mapping[str, Any]) -> list[Entry]:
        entries = [entry for value in values.values() if (entry := read_entry(value))]
        ready = sorted((one for one in entries if one.is_ready), key=lambda one: one.name)
        self._listing = (time.monotonic(), ready)
        return ready


def _last_seen(left: float | None) -> float:
    return time.time() - (TTL_S - (TTL_S if left is None else left))
