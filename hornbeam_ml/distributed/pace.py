"""How fast the nodes of a batch are, and when they are likely to end what they have. Pure."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

from hornbeam_ml.distributed.sharing import seconds_to_end

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hornbeam_ml.distributed.chunks import Flight, Lane
    from hornbeam_ml.distributed.records import Records


class Pace:
    """Guesses from what was measured.

    Args:
        records: What was measured.
        nodes: The nodes of the batch, as they come and go.
    """

    def __init__(self, records: Records, nodes: Mapping[str, Lane]) -> None:
        self._records = records
        self._nodes = nodes

    def rate(self, lane: Lane) -> float:
        """Return items a second; of one that is not known the mean of all nodes, or 0."""
        rate = self._records.speed(lane.name).rate
        if rate is not None:
            return rate
        rates = [self._records.speed(name).rate for name in self._nodes]
        known = [each for each in rates if each is not None]
        return fmean(known) if known else 0.0

    def share(self, lane: Lane, items: int, now: float) -> float:
        """Return how many of so many items a free node would do until all nodes end together."""
        usable = [node for node in self._nodes.values() if node.is_usable]
        # Of nodes that are all unknown, any number will do: they get the same.
        nodes = [(self.rate(node) or 1.0, self._free_in(node, now)) for node in usable]
        return (self.rate(lane) or 1.0) * seconds_to_end(items, nodes)

    def seconds_left(self, flight: Flight, now: float) -> float:
        """Return how long a call is likely to take; what is overdue, as long as it is overdue."""
        rate = self.rate(flight.lane)
        return abs(len(flight.chunk) / rate - (now - flight.began)) if rate else 0.0

    def _free_in(self, lane: Lane, now: float) -> float:
        if lane.flight is not None:
            return self.seconds_left(lane.flight, now)
        return max(0.0, lane.rests_until - now)
