"""What is known of nodes from the chunks they were given: how fast they are, and counts."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Final

from hornbeam_ml.distributed.sharing import Speed

LOCAL: Final = ""
"""In the place of a node's name: the function of this process."""
_MOST_NODES: Final = 1024  # names may come and go for ever
_UNKNOWN: Final = Speed()


@dataclass(frozen=True, kw_only=True)
class NodeFigures:
    """What a node did, or the function of this process.

    Attributes:
        chunks: Calls whose results were used.
        items: Items in them.
        failed: Calls that failed.
        late: Calls that were not answered in time, or later than a copy of them elsewhere.
        items_per_second: How fast it was lately; None: not measured.
    """

    chunks: int = 0
    items: int = 0
    failed: int = 0
    late: int = 0
    items_per_second: float | None = None


@dataclass(frozen=True, kw_only=True)
class DistributionStats:
    """What became of the batches of a `DistributedInference` in this process.

    Attributes:
        chunks: Calls whose results were used, at nodes and here.
        items: Items in them.
        failed: Calls that failed; their chunks were repeated, or their batch failed.
        late: Calls that were not answered in time, or later than a copy of them elsewhere.
        local: What the function of this process did; part of the sums above.
        nodes: The same for each node, by its name.
    """

    chunks: int
    items: int
    failed: int
    late: int
    local: NodeFigures
    nodes: dict[str, NodeFigures] = field(default_factory=dict)


class Records:
    """Figures and speeds by name of node. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._figures: OrderedDict[str, NodeFigures] = OrderedDict()
        self._speeds: dict[str, Speed] = {}

    def speed(self, name: str) -> Speed:
        """Return how fast a node is, as far as that is known."""
        return self._speeds.get(name, _UNKNOWN)

    def answered(self, name: str, items: int, seconds: float) -> None:
        """Note a chunk whose results are used."""
        with self._lock:
            before = self._of(name)
            self._figures[name] = replace(
                before, chunks=before.chunks + 1, items=before.items + items
            )
            self._speeds[name] = self.speed(name).after(items, seconds)

    def failed(self, name: str) -> None:
        """Note a call that failed."""
        with self._lock:
            before = self._of(name)
            self._figures[name] = replace(before, failed=before.failed + 1)

    def late(self, name: str, items: int, seconds: float) -> None:
        """Note a call that took longer than so many seconds, if it ever ends."""
        with self._lock:
            before = self._of(name)
            self._figures[name] = replace(before, late=before.late + 1)
            rate = self.speed(name).rate
            if rate is not None and items < rate * seconds:
                self._speeds[name] = self.speed(name).after(items, seconds)

    def stats(self) -> DistributionStats:
        """Return the figures so far."""
        with self._lock:
            shown = {
                name: replace(figures, items_per_second=self.speed(name).rate)
                for name, figures in self._figures.items()
            }
        return DistributionStats(
            chunks=sum(each.chunks for each in shown.values()),
            items=sum(each.items for each in shown.values()),
            failed=sum(each.failed for each in shown.values()),
            late=sum(each.late for each in shown.values()),
            local=shown.pop(LOCAL, NodeFigures()),
            nodes=dict(sorted(shown.items())),
        )

    def forget_lock(self) -> None:
        """In a forked child: another thread of the parent may have held it."""
        self._lock = threading.Lock()

    def _of(self, name: str) -> NodeFigures:
        """Return the figures of a node, forgetting the one that was used longest ago."""
        self._figures.setdefault(name, NodeFigures())
        self._figures.move_to_end(name)
        if len(self._figures) > _MOST_NODES:
            gone, _ = self._figures.popitem(last=False)
            self._speeds.pop(gone, None)
        return self._figures[name]
