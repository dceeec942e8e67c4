"""Finding out which node of a Cluster serves what, and keeping that up to date."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any, Final

from redis import exceptions as driver

from hornbeam_state.backends.redis.breaker import Breaker
from hornbeam_state.backends.redis.errors import (
    Interrupted,
    not_tried,
    rearranged,
    refused,
    unreachable,
)
from hornbeam_state.backends.redis.flight import Flight
from hornbeam_state.backends.redis.routes import Inquiry, Pause, Work, pauses
from hornbeam_state.backends.redis.topology import Address, ClusterMap
from hornbeam_state.errors import StoreUnavailable

if TYPE_CHECKING:
    from hornbeam_state.config import StoreConfig

_INTERVAL: Final = 0.25


class SlotTable:
    """The map of a Cluster, as far as is known.

    It is asked for at first use, and again after it was found to be old: by one caller at a time,
    and then not more often than every quarter of a second. The others go on with what is known.

    Args:
        config: The store.
    """

    def __init__(self, config: StoreConfig) -> None:
        self._where = config.safe_url
        self._timeout = config.timeout
        self._seeds = [Address(*host) for host in config.hosts]
        self._map: ClusterMap | None = None
        self._is_old = False
        self._silent: set[Address] = set()
        self._failed_at = 0.0
        self.after_fork()

    def after_fork(self) -> None:
        """Begin anew: another thread may have held a lock, or been asking."""
        self._breaker = Breaker(self._timeout)
        self._flight = Flight(self._timeout, _INTERVAL)

    def knows(self, address: Address) -> bool:
        """Return whether a server is a node of the Cluster, or may be one."""
        return self._map is None or address in self._map.nodes

    def moved(self, slot: int, owner: Address) -> None:
        """Note that a slot went elsewhere; others may have, too."""
        if self._map is not None:
            self._map = self._map.moved(slot, owner)
        self.doubt()

    def doubt(self, silent: Address | None = None) -> None:
        """Have the map asked for anew; last of all of a node that does not answer."""
        self._is_old = True
        if silent is not None:
            self._silent.add(silent)

    def current(self, deadline: float) -> Work[ClusterMap]:
        """Return the map, brought up to date if need be and if no other caller is at it.

        Raises:
            StoreUnavailable: nothing is known yet, and no node says anything.
        """
        began = time.monotonic()
        for pause in pauses():
            known, now = self._map, time.monotonic()
            if known is not None and not self._is_old:
                return known
            if self._flight.begin(now, at_once=known is None):
                try:
                    return (yield from self._ask_nodes(known, deadline))
                finally:
                    self._flight.end()
            if known is not None:
                return known
            if self._failed_at > began or now + pause >= deadline:
                break
            yield Pause(pause)
        raise StoreUnavailable(f"{self._where}: no node of it could be reached just now")

    def _ask_nodes(self, known: ClusterMap | None, deadline: float) -> Work[ClusterMap]:
        """Ask one node after the other, each for its share of the time that is left."""
        began = time.monotonic()
        if known is None and (pause := self._breaker.wait(began)):
            raise not_tried(self._where, pause)
        nodes = self._informants(known)
        failure: Interrupted | None = None
        for number, node in enumerate(nodes):
            share = (deadline - time.monotonic()) / (len(nodes) - number)
            if share <= 0:
                break
            outcome = yield Inquiry(node, (b"CLUSTER", b"SLOTS"), share)
            if isinstance(outcome, Interrupted):
                failure = outcome
                self._silent.add(node)
            elif found := self._read(outcome, node, known):
                self._map, self._is_old = found, False
                self._silent.clear()
                self._breaker.succeeded()
                return found
        if known is not None:
            return known
        self._failed_at = time.monotonic()
        self._breaker.failed(began, self._failed_at)
        if failure is None:
            raise rearranged(None, self._where, self._timeout, write=False)
        raise unreachable(failure, self._where, self._timeout, write=False) from failure

    def _informants(self, known: ClusterMap | None) -> list[Address]:
        """Return whom to ask: in any order, but those last that did not answer."""
        nodes = list(dict.fromkeys((*(known.nodes if known else ()), *self._seeds)))
        random.shuffle(nodes)
        return sorted(nodes, key=self._silent.__contains__)

    def _read(
        self, outcome: list[Any] | driver.RedisError, node: Address, known: ClusterMap | None
    ) -> ClusterMap | None:
        """Return the map, or None when this node knows none.

        Raises:
            StoreUnavailable: the node refused, and there is no older map to go on with.
        """
        reply = outcome[0] if isinstance(outcome, list) else outcome
        if isinstance(reply, list):
            found = ClusterMap.parse(reply, node)
            return found if found.primaries else None
        if known is None and "cluster support disabled" in str(reply):
            raise StoreUnavailable(
                f"{self._where}: {node} is no node of a Cluster: use redis:// in the store URL"
            )
        if known is None and isinstance(reply, driver.RedisError):
            raise refused(reply, f"{self._where} (node {node})") from reply
        return None
