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

from math import inf
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from hornbeam_ml.serving.lines import LengthLine, Line, Waiting

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

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
        max_tokens: The most tokens in a batch of items of similar length, padding included; None:
            lengths do not matter, and items go in the order of arrival.
    """

    def __init__(self, batch_size: int, timer_s: float, max_tokens: float | None = None) -> None:
        self._batch_size = batch_size
        self._timer_s = timer_s
        self._max_tokens = max_tokens
        self._lanes: dict[Hashable, Line[W]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[W]:
        for line in self._lanes.values():
            yield from line.items

    def hasten(self) -> None:
        """Forget the timer: from now on a lane is ready as soon as it holds an item."""
        self._timer_s = 0.0

    def emptied(self) -> Policy[W]:
        """Return a policy with the same settings in which nothing waits."""
        return Policy(self._batch_size, self._timer_s, self._max_tokens)

    def arrange(self, items: Sequence[W]) -> None:
        """Decide, when a call arrives, whether its items begin a batch of their own."""
        if not self._timer_s or self._max_tokens is not None:
            return
        first = items[0]
        whole = len(items) == self._batch_size and all(item.lane == first.lane for item in items)
        first.heads_batch = whole and first.lane in self._lanes

    def add(self, item: W, now: float) -> None:
        """Let an item wait."""
        line = self._lanes.get(item.lane)
        if line is None:
            line = self._lanes[item.lane] = self._new_line()
        line.add(item)
        self._count += 1
        _note_full(line, now)

    def remove(self, item: W) -> bool:
        """Forget an item; return whether it waited."""
        line = self._lanes.get(item.lane)
        if line is None or item not in line.items:
            return False
        line.remove(item)
        self._count -= 1
        if not line.is_full():
            line.full_at = inf
        if not line.items:
            del self._lanes[item.lane]
        return True

    def ready_at(self) -> float:
        """Return when a batch is ready, if nothing happens until then; `inf`: nothing waits."""
        return min((self._line_ready_at(line) for line in self._lanes.values()), default=inf)

    def cut(self, now: float, takers: int = 1) -> Cut[W]:
        """Take the next batch out, and those found to be too late on the way.

        Args:
            now: Seconds.
            takers: How many could run a batch now, this one included.
        """
        late: list[W] = []
        while self._lanes:
            name, line = min(self._lanes.items(), key=lambda pair: self._line_ready_at(pair[1]))
            if self._line_ready_at(line) > now:
                break
            batch = self._take(line, now, takers, late)
            if not line.items:
                del self._lanes[name]
            if batch:
                return Cut(batch, late)
        return Cut([], late)

    def _new_line(self) -> Line[W]:
        if self._max_tokens is None:
            return Line(self._batch_size)
        return LengthLine(self._batch_size, self._max_tokens)

    def _take(self, line: Line[W], now: float, takers: int, late: list[W]) -> list[W]:
        waiting = len(line.items)
        batch = line.take(now, takers, late)
        self._count -= waiting - len(line.items)
        line.full_at = inf
        _note_full(line, now)
        return batch

    def _line_ready_at(self, line: Line[W]) -> float:
        return min(line.full_at, line.oldest().arrived + self._timer_s)


def _note_full(line: Line[W], now: float) -> None:
    if line.full_at == inf and line.is_full():
        line.full_at = now
