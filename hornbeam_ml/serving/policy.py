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

from math import ceil, inf
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from hornbeam_ml.serving.length_line import LengthLine
from hornbeam_ml.serving.lines import Line, Waiting

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
        max_tokens: The most tokens in a batch of items of similar length; see `length_line`. None:
            lengths do not count, and items go in the order of arrival.
    """

    def __init__(self, batch_size: int, timer_s: float, max_tokens: float | None = None) -> None:
        self._batch_size = batch_size
        self._timer_s = timer_s
        self._max_tokens = max_tokens
        self._lines: dict[Hashable, Line[W]] = {}  # by lane
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[W]:
        for line in self._lines.values():
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
        first.heads_batch = whole and first.lane in self._lines

    def add(self, item: W, now: float) -> None:
        """Let an item wait."""
        line = self._lines.get(item.lane)
        if line is None:
            line = self._lines[item.lane] = self._new_line()
        line.add(item)
        self._count += 1
        self._note_full(line, now)

    def remove(self, item: W) -> bool:
        """Forget an item; return whether it waited."""
        line = self._lines.get(item.lane)
        if line is None or item not in line.items:
            return False
        line.remove(item)
        self._count -= 1
        if not line.items:
            del self._lines[item.lane]
        elif line.full_at != inf and not line.is_full():
            line.full_at = inf
        return True

    def ready_at(self) -> float:
        """Return when a batch is ready, if nothing happens until then; `inf`: nothing waits."""
        return min((self._line_ready_at(line) for line in self._lines.values()), default=inf)

    def cut(self, now: float, streams: int = 1) -> Cut[W]:
        """Take the next batch out, and those found to be too late on the way.

        Args:
            now: Seconds.
            streams: How many run batches; items of similar length are shared out among them.
        """
        late: list[W] = []
        while self._lines:
            lane, line = min(self._lines.items(), key=lambda pair: self._line_ready_at(pair[1]))
            if self._line_ready_at(line) > now:
                break
            batch = self._take(line, now, streams, late)
            if not line.items:
                del self._lines[lane]
            if batch:
                return Cut(batch, late)
        return Cut([], late)

    def _new_line(self) -> Line[W]:
        if self._max_tokens is None:
            return Line(self._batch_size)
        return LengthLine(self._batch_size, self._max_tokens)

    def _take(self, line: Line[W], now: float, streams: int, late: list[W]) -> list[W]:
        waiting = len(line.items)
        # With a timer the part that is left would wait for its own, beside a stream that is free.
        share = waiting if self._timer_s else ceil(waiting / streams)
        batch = line.take(now, share, late)
        self._count -= waiting - len(line.items)
        line.full_at = inf
        self._note_full(line, now)
        return batch

    def _line_ready_at(self, line: Line[W]) -> float:
        return min(line.full_at, line.oldest.arrived + self._timer_s)

    def _note_full(self, line: Line[W], now: float) -> None:
        # Without a timer it is ready anyhow.
        if self._timer_s and line.full_at == inf and line.is_full():
            line.full_at = now
