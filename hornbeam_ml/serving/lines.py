"""Waiting items that may share a batch, and which of them make up the next one. Pure.

A `Line` keeps the order of arrival. A `LengthLine` makes batches of similar length: a shorter item
is padded to the longest of its batch, and padding costs as much as text. The oldest item that
waits is in the next batch whatever its length, and the others in it are those nearest to it in
length. So none is passed over by more batches than there were older items, however many short ones
arrive. (Sorting alone, shortest first, let long texts wait for seconds at a median of 65 ms.)
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from itertools import count
from math import ceil, inf
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence


class Waiting(Protocol):
    """What a policy needs to know of a waiting item."""

    heads_batch: bool

    @property
    def lane(self) -> Hashable:
        """What it has in common with those it may share a batch with."""
        ...

    @property
    def length(self) -> int:
        """Its tokens, at least 1."""
        ...

    @property
    def arrived(self) -> float:
        """When it arrived, seconds."""
        ...

    @property
    def deadline(self) -> float:
        """When it is too late for it, seconds; `inf`: never."""
        ...


W = TypeVar("W", bound=Waiting)


class Line(Generic[W]):
    """Items in the order of arrival; any of them can be taken out at once.

    Args:
        batch_size: The most items in a batch.

    Attributes:
        items: Those that wait, oldest first.
        heads: How many of them begin a batch of their own.
        full_at: Since when a batch of it is complete; `inf` when none is.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.items: OrderedDict[W, Any] = OrderedDict()
        self.heads = 0
        self.full_at = inf

    def add(self, item: W) -> None:
        """Let an item wait."""
        self.items[item] = None
        self.heads += item.heads_batch

    def remove(self, item: W) -> None:
        """Forget an item that waits."""
        del self.items[item]
        self.heads -= item.heads_batch

    def is_full(self) -> bool:
        """Return whether a batch is complete."""
        if len(self.items) >= self.batch_size:
            return True
        return bool(self.heads) and self.heads > self.oldest().heads_batch

    def oldest(self) -> W:
        """Return the item that arrived first."""
        return next(iter(self.items))

    def take(self, now: float, takers: int, late: list[W]) -> list[W]:  # noqa: ARG002 - see LengthLine
        """Take out the next batch; none when all that wait are late.

        Args:
            now: Seconds.
            takers: How many ask for batches now, this one included.
            late: Gets the items for which it is too late.
        """
        batch: list[W] = []
        while self.items and len(batch) < self.batch_size:
            item = self.oldest()
            if item.heads_batch and batch:
                break
            self.items.popitem(last=False)
            self.heads -= item.heads_batch
            (batch if now < item.deadline else late).append(item)
        return batch


class LengthLine(Line[W]):
    """Items of similar length make a batch; see the module.

    What waits is shared out among all that ask for batches now, since two batches at the same
    time are done sooner than a large one.

    Args:
        batch_size: The most items in a batch.
        max_tokens: The most tokens in one: items times the length of the longest. An item of more
            goes alone.
    """

    def __init__(self, batch_size: int, max_tokens: float) -> None:
        super().__init__(batch_size)
        self._max_tokens = max_tokens
        self._by_length: list[tuple[int, int, W]] = []
        self._serials = count()

    def add(self, item: W) -> None:
        """Let an item wait."""
        place = (item.length, next(self._serials), item)
        self.items[item] = place
        insort(self._by_length, place)

    def remove(self, item: W) -> None:
        """Forget an item that waits."""
        place = self.items.pop(item)
        del self._by_length[bisect_left(self._by_length, place)]

    def is_full(self) -> bool:
        """Return whether all that wait no longer fit into one batch, or just do."""
        waiting = len(self.items)
        if waiting >= self.batch_size:
            return True
        return bool(waiting) and waiting * self._by_length[-1][0] >= self._max_tokens

    def take(self, now: float, takers: int, late: list[W]) -> list[W]:
        """Take out the next batch, shortest first; none when all that wait are late."""
        while self.items and self.oldest().deadline <= now:
            late.append(self.oldest())
            self.remove(self.oldest())
        if not self.items:
            return []
        position = bisect_left(self._by_length, self.items[self.oldest()])
        size = min(self.batch_size, ceil(len(self.items) / takers))
        low = max(0, position - size + 1)
        lengths = [place[0] for place in self._by_length[low : position + size]]
        start, end = window(lengths, position - low, size, self._max_tokens)
        taken = [place[2] for place in self._by_length[low + start : low + end]]
        del self._by_length[low + start : low + end]
        batch: list[W] = []
        for item in taken:
            del self.items[item]
            (batch if now < item.deadline else late).append(item)
        return batch


def window(lengths: Sequence[int], position: int, size: int, max_tokens: float) -> tuple[int, int]:
    """Return which of some lengths make the best batch with the one at a position.

    Of all runs that hold it, have at most `size` lengths, and at most `max_tokens` when each is
    padded to the longest, it is the one with the most lengths, and of these the one with the
    least padding. Takes time in proportion to `size`.

    Args:
        lengths: In growing order.
        position: Of the one that has to be in it, even when it alone is too long.
        size: The most lengths.
        max_tokens: The most tokens, padding included.

    Returns:
        Start and end of the run, as for a slice.
    """
    best, best_rank = (position, position + 1), (1, 0)
    sums = [0]
    for length in lengths:
        sums.append(sums[-1] + length)
    for end in range(position + 1, min(len(lengths), position + size) + 1):
        longest = lengths[end - 1]
        start = max(0, end - int(min(size, max_tokens // longest)))
        if start > position:
            break  # longer ones leave still less room
        number = end - start
        rank = (number, sums[end] - sums[start] - number * longest)
        if rank > best_rank:
            best, best_rank = (start, end), rank
    return best
