"""How many items a node gets next. Pure.

Guided self-scheduling (Polychronopoulos and Kuck, 1987) with weights as in weighted factoring
(Hummel, Schmidt, Uma and Wein, 1996): a node that gets free takes half of what it would do until
all end together, so that chunks shrink as the end comes near, and what was not foreseen is made
good by the next ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

_SHORTEST_S: Final = 0.05  # a chunk is not cut finer: each costs a call, and models like batches
_GROWTH: Final = 4  # from one chunk of a node to its next: a rate measured on few items is rough
_OF_TIMEOUT: Final = 0.25  # what a chunk may take of its timeout, if the node keeps its pace
_FORGETTING: Final = 0.5  # what an earlier chunk still counts when a later one was measured


class Speed(NamedTuple):
    """What a node was measured to do.

    Attributes:
        items: How many items it did, the latest chunks counting most.
        seconds: In which time.
        largest: The size of its largest chunk.
    """

    items: float = 0.0
    seconds: float = 0.0
    largest: int = 0

    @property
    def rate(self) -> float | None:
        """Items a second; None: it has done none."""
        return self.items / self.seconds if self.items else None

    def after(self, items: int, seconds: float) -> Speed:
        """Return the speed when one more chunk was measured."""
        return Speed(
            self.items * _FORGETTING + items,
            self.seconds * _FORGETTING + max(seconds, 1e-6),
            max(self.largest, items),
        )


def seconds_to_end(items: int, nodes: Iterable[tuple[float, float]]) -> float:
    """Return after how many seconds all nodes end, if they end together.

    Args:
        items: What is to be shared.
        nodes: For each its rate in items a second, and in how many seconds it is free. One that
            is free only when the others have ended gets nothing.
    """
    rates, before, end = 0.0, 0.0, 0.0
    for rate, free_in in sorted(nodes, key=lambda node: node[1]):
        if rates and free_in >= end:
            break
        rates += rate
        before += rate * free_in
        end = (items + before) / rates
    return end


def chunk_size(speed: Speed, share: float, *, most: int, timeout_s: float) -> int:
    """Return how many items a node gets; 0: the others end sooner without it.

    Args:
        speed: Its own.
        share: How many items it would do until all end together.
        most: How many items a chunk has at most.
        timeout_s: When a chunk is late.
    """
    if share < 0.5:  # noqa: PLR2004 - less than half an item
        return 0
    rate = speed.rate
    if rate is None:
        return 1
    size = min(
        max(share / 2, min(share, rate * _SHORTEST_S)),
        speed.largest * _GROWTH,
        rate * timeout_s * _OF_TIMEOUT,
        most,
    )
    return max(1, round(size))
