"""When a batch closes, and what goes into it. Pure: takes `now`, waits for nothing.

Waiting items stand in *lanes*: those of a lane may share a batch. Without a timer a lane is ready
as soon as it holds an item, so that a batch is whatever came together while the streams were
busy. With a timer it is ready

- when it holds a full batch,
- when the timer has run since the arrival of its first item, or
- when a call of exactly a full batch arrives behind others: these go first, in a batch of their
  own, rather than split the call.

While no stream is free a ready lane keeps growing. The lane that became ready first goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from math import inf
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence


class Waiting(Protocol):
    """What the policy needs to know of a waiting item."""

    heads_batch: bool

    @property
    def lane(self) -> Hashable:
        """What it has in common with those it may share a batch with."""
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


class Cut(NamedTuple, Generic[W]):
    """A batch, empty when none is ready, and the items for which it is too late."""

    batch: list[W]
    late: list[W]


class Policy(Generic[W]):
    """The waiting items and when they may go.

    Args:
        batch_size: The most items in a batch.
        timer_s: How long the first item of a lane waits for others; 0: not at all.
    """

    def __init__(self, batch_size: int, timer_s: float) -> None:
        self._batch_size = batch_size
        self._timer_s = timer_s
        self._lanes: dict[Hashable, _Lane[W]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[W]:
        for lane in self._lanes.values():
            yield from lane.items

    def hasten(self) -> None:
        """Forget the timer: from now on a lane is ready as soon as it holds an item."""
        self._timer_s = 0.0

    def emptied(self) -> Policy[W]:
        """Return a policy with the same settings in which nothing waits."""
        return Policy(self._batch_size, self._timer_s)

    def arrange(self, items: Sequence[W]) -> None:
        """Decide, when a call arrives, whether its items begin a batch of their own."""
        first = items[0]
        whole = len(items) == self._batch_size and all(item.lane == first.lane for item in items)
        first.heads_batch = bool(self._timer_s) and whole and first.lane in self._lanes

    def add(self, item: W, now: float) -> None:
        """Let an item wait."""
        lane = self._lanes.get(item.lane)
        if lane is None:
            lane = self._lanes[item.lane] = _Lane()
        lane.items[item] = None
        lane.heads += item.heads_batch
        self._count += 1
        self._note_full(lane, now)

    def remove(self, item: W) -> bool:
        """Forget an item; return whether it waited."""
        lane = self._lanes.get(item.lane)
        if lane is None or item not in lane.items:
            return False
        del lane.items[item]
        lane.heads -= item.heads_batch
        self._count -= 1
        if not self._is_full(lane):
            lane.full_at = inf
        if not lane.items:
            del self._lanes[item.lane]
        return True

    def ready_at(self) -> float:
        """Return when a batch is ready, if nothing happens until then; `inf`: nothing waits."""
        return min((self._lane_ready_at(lane) for lane in self._lanes.values()), default=inf)

    def cut(self, now: float) -> Cut[W]:
        """Take the next batch out, and those found to be too late on the way."""
        late: list[W] = []
        while self._lanes:
            name, lane = min(self._lanes.items(), key=lambda pair: self._lane_ready_at(pair[1]))
            if self._lane_ready_at(lane) > now:
                break
            batch = self._take(lane, now, late)
            if not lane.items:
                del self._lanes[name]
            if batch:
                return Cut(batch, late)
        return Cut([], late)

    def _take(self, lane: _Lane[W], now: float, late: list[W]) -> list[W]:
        batch: list[W] = []
        while lane.items and len(batch) < self._batch_size:
            item = next(iter(lane.items))
            if item.heads_batch and batch:
                break
            lane.items.popitem(last=False)
            lane.heads -= item.heads_batch
            self._count -= 1
            (batch if now < item.deadline else late).append(item)
        lane.full_at = inf
        self._note_full(lane, now)
        return batch

    def _lane_ready_at(self, lane: _Lane[W]) -> float:
        return min(lane.full_at, next(iter(lane.items)).arrived + self._timer_s)

    def _note_full(self, lane: _Lane[W], now: float) -> None:
        if lane.full_at == inf and self._is_full(lane):
            lane.full_at = now

    def _is_full(self, lane: _Lane[W]) -> bool:
        if len(lane.items) >= self._batch_size:
            return True
        return bool(lane.heads) and lane.heads > next(iter(lane.items)).heads_batch


class _Lane(Generic[W]):
    """Items in the order of arrival; any of them can be taken out at once.

    Attributes:
        heads: How many of them begin a batch.
        full_at: Since when a batch of it is complete; `inf` when none is.
    """

    __slots__ = ("full_at", "heads", "items")

    def __init__(self) -> None:
        self.items: OrderedDict[W, None] = OrderedDict()
        self.heads = 0
        self.full_at = inf
