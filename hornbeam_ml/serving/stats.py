"""What a serving has done so far, in this process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyStats:
    """The figures of one batch key."""

    queued: int
    batches: int
    items: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingStats:
    """The figures of a serving in this process, since it was loaded.

    Attributes:
        name: Its name, or None.
        ready: Whether it is loaded, warm, and all of its streams run; see `Serving.ready`.
        queued: Items that wait now; never more than the queue limit.
        running: Items in batches that run now.
        batches: Batches started; warm-up and `run_inline` do not count.
        items: Items in them.
        tokens: Tokens in these items; without `length` an item counts as one.
        padded_tokens: Tokens that models were given, padding included.
        fill: Items as a share of those that the batches had room for, 0.0 to 1.0. There is room
            for `batch_size`, or as many of the longest as `max_batch_tokens` allows.
        padding: Share of `padded_tokens` that was padding.
        wait_ms: Mean time an item waited for its batch.
        longest_wait_ms: The longest such time.
        run_ms: Mean time a batch took.
        retries: Parts of failed batches that were run again to find the item at fault.
        failed: Calls that ended with an error of the model.
        refused: Calls that found the queue full.
        expired: Calls whose deadline passed.
        cancelled: Calls whose caller, or the client of whose request, went away.
        keys: The figures by batch key; with no keys declared the one key is None.
    """

    name: str | None
    ready: bool
    queued: int
    running: int
    batches: int
    items: int
    tokens: int
    padded_tokens: int
    fill: float
    padding: float
    wait_ms: float
    longest_wait_ms: float
    run_ms: float
    retries: int
    failed: int
    refused: int
    expired: int
    cancelled: int
    keys: Mapping[Any, KeyStats]


class Extent(NamedTuple):
    """How large a batch is.

    Attributes:
        room: How many items it could have held.
        tokens: In its items.
        padded_tokens: The same when every row, also one without an item, is as long as the longest.
    """

    room: int
    tokens: int
    padded_tokens: int


@dataclass
class Tally:
    """The counts behind `ServingStats`; changed under the lock of the queue."""

    batches: int = 0
    items: int = 0
    room: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    wait_s: float = 0.0
    longest_wait_s: float = 0.0
    busy_s: float = 0.0
    retries: int = 0
    failed: int = 0
    refused: int = 0
    expired: int = 0
    cancelled: int = 0
    by_key: dict[Hashable, list[int]] = field(default_factory=dict)  # batches, items

    def start(self, key: Hashable, arrivals: Sequence[float], extent: Extent, now: float) -> None:
        """Count a batch that starts now, with items that arrived then."""
        self.batches += 1
        self.items += len(arrivals)
        self.room += extent.room
        self.tokens += extent.tokens
        self.padded_tokens += extent.padded_tokens
        self.wait_s += now * len(arrivals) - sum(arrivals)
        self.longest_wait_s = max(self.longest_wait_s, now - min(arrivals))
        counts = self.by_key.setdefault(key, [0, 0])
        counts[0] += 1
        counts[1] += len(arrivals)

    def time_for(self, items: int) -> float:
        """Return the seconds that a stream has needed for so many items; 0.0 at the beginning."""
        return items * _ratio(self.busy_s, self.items)

    def stats(
        self,
        *,
        name: str | None,
        ready: bool,
        queued: Mapping[Any, int],
        running: int,
    ) -> ServingStats:
        """Return the figures, given what is known of this moment."""
        keys = {
            key: KeyStats(queued=queued.get(key, 0), batches=counts[0], items=counts[1])
            for key in {**queued, **self.by_key}
            for counts in [self.by_key.get(key, [0, 0])]
        }
        return ServingStats(
            name=name,
            ready=ready,
            queued=sum(queued.values()),
            running=running,
            batches=self.batches,
            items=self.items,
            tokens=self.tokens,
            padded_tokens=self.padded_tokens,
            fill=_ratio(self.items, self.room),
            padding=_ratio(self.padded_tokens - self.tokens, self.padded_tokens),
            wait_ms=1000 * _ratio(self.wait_s, self.items),
            longest_wait_ms=1000 * self.longest_wait_s,
            run_ms=1000 * _ratio(self.busy_s, self.batches),
            retries=self.retries,
            failed=self.failed,
            refused=self.refused,
            expired=self.expired,
            cancelled=self.cancelled,
            keys=keys,
        )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
