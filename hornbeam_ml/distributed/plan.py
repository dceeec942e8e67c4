"""Which node gets which items of a batch, and when. Pure: it takes `now`."""

from __future__ import annotations

from bisect import insort
from typing import TYPE_CHECKING, Final

from hornbeam_ml.distributed.chunks import Chunk, Flight, Lane
from hornbeam_ml.distributed.failures import Failure
from hornbeam_ml.distributed.pace import Pace
from hornbeam_ml.distributed.records import LOCAL
from hornbeam_ml.distributed.sharing import chunk_size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hornbeam_ml.distributed.records import Records

_LOOK_S: Final = 0.05  # how often idle nodes are held against calls that take long
_SHORTEST_OUT_S: Final = 2.0
_LONGEST_OUT_S: Final = 60.0
_RETRY_S: Final = 0.1
# A call gets a copy elsewhere when it is likely to take so many times longer than the copy would,
# and so many seconds at least: idle nodes cost nothing, this process has other things to do.
_COPY_AT_NODES: Final = (2.0, 0.05)
_COPY_HERE: Final = (4.0, 1.0)


class Plan:
    """The chunks of one batch: given to nodes as these get free, and again where they failed.

    A chunk that failed goes to another node, or is run locally when no other is left; when it
    cannot be, `hand_out` raises its error. In the end a node with nothing to do gets a copy of a
    chunk that takes long elsewhere (a backup task, as in MapReduce), and the first answer counts.

    Args:
        total: How many items there are.
        records: How fast the nodes are; told what they do.
        most: How many items a chunk has at most.
        timeout_s: When a call is late.
        has_local: Whether chunks can be run in this process.
        nobody: What `hand_out` raises when there was no node at all.
    """

    def __init__(
        self,
        total: int,
        records: Records,
        *,
        most: int,
        timeout_s: float,
        has_local: bool,
        nobody: BaseException,
    ) -> None:
        self._total = total
        self._left = total
        self._fresh = 0  # the first item that was never given away
        self._again: list[Chunk] = []  # chunks that failed, in the order of their items
        self._records = records
        self._most = most
        self._timeout_s = timeout_s
        self._lanes: dict[str, Lane] = {}  # the nodes
        self._pace = Pace(records, self._lanes)
        self._local = Lane(LOCAL) if has_local else None
        self._why: BaseException = nobody

    @property
    def is_done(self) -> bool:
        """Whether every item has its result."""
        return not self._left

    def list_nodes(self, names: Iterable[str], now: float) -> None:
        """Take note of which nodes are there. New ones may join at any time."""
        names = list(names)
        if not names and self._local is None and self._flights():
            return  # a server that restarts with nothing: nodes that answer write the list anew
        for lane in self._lanes.values():
            lane.is_listed = False
        for name in names:
            lane = self._lanes.setdefault(name, Lane(name))
            lane.is_listed = True
            if lane.out_until is not None and lane.out_until <= now:
                lane.out_until = None

    def hand_out(self, now: float) -> list[Flight]:
        """Return the calls that are to be made now.

        Raises:
            BaseException: the error of a chunk for which nothing is left to be tried.
        """
        flights = []
        while (flight := self._next(now)) is not None:
            flights.append(flight)
        return flights

    def succeed(self, flight: Flight, now: float) -> bool:
        """Note that a call was answered; return whether the answer counts."""
        lane = self._end(flight)
        lane.failures = 0
        if flight.chunk.done:
            return False
        flight.chunk.done = True
        self._left -= len(flight.chunk)
        self._records.answered(flight.name, len(flight.chunk), now - flight.began)
        return True

    def overtaken(self, flight: Flight, now: float) -> None:
        """Note that a call was given up, since its chunk has its results from elsewhere."""
        self._end(flight)
        self._records.late(flight.name, len(flight.chunk), now - flight.began)

    def fail(self, flight: Flight, failure: Failure, error: BaseException, now: float) -> None:
        """Note that a call failed.

        Args:
            flight: The call.
            failure: What that means.
            error: What is raised if nothing is left to be tried.
            now: The time.
        """
        lane, chunk = self._end(flight), flight.chunk
        if failure is Failure.BUSY and self._may_wait(chunk, now):
            lane.rests_until = now + getattr(error, "retry_after_s", _RETRY_S)
        else:
            self._note_failure(lane, flight, failure, now)
            chunk.tried.add(flight.name)
            chunk.errors += failure is Failure.WRONG
        chunk.error = self._why = error
        if not chunk.copies and not chunk.done:
            insort(self._again, chunk, key=lambda each: each.start)

    def next_look(self, now: float) -> float | None:
        """Return when `hand_out` may have something new, even if no call ends; None: never."""
        times = [lane.rests_until for lane in self._lanes.values() if lane.rests_until > now]
        if any(self._is_free(lane, now) for lane in self._lanes.values()):
            times.append(now + _LOOK_S)
        elif self._local is not None and self._local.flight is None:
            times.append(now + _COPY_HERE[1] / 2)
        return min(times, default=None)

    # Giving away.

    def _next(self, now: float) -> Flight | None:
        free = [lane for lane in self._lanes.values() if self._is_free(lane, now)]
        for lane in sorted(free, key=self._pace.rate, reverse=True):
            chunk = self._chunk_for(lane, now) or self._copy_for(lane, now, *_COPY_AT_NODES)
            if chunk is not None:
                return self._begin(lane, chunk, now)
        chunk = self._chunk_for_here(now)
        if self._local is None or self._local.flight is not None:
            return None
        chunk = chunk or self._copy_for(self._local, now, *_COPY_HERE)
        return None if chunk is None else self._begin(self._local, chunk, now)

    def _begin(self, lane: Lane, chunk: Chunk, now: float) -> Flight:
        lane.flight = Flight(chunk, lane, now)
        chunk.copies += 1
        return lane.flight

    def _end(self, flight: Flight) -> Lane:
        if flight.lane.flight is not flight:
            raise ValueError("the call has ended before")
        flight.lane.flight = None
        flight.chunk.copies -= 1
        return flight.lane

    def _chunk_for(self, lane: Lane, now: float) -> Chunk | None:
        """Return what a free node gets: what failed elsewhere before what is new."""
        failed = next((chunk for chunk in self._again if self._may_take(lane, chunk)), None)
        if failed is None and self._fresh == self._total:
            return None
        left = self._total - self._fresh + sum(map(len, self._again))
        size = chunk_size(
            self._records.speed(lane.name),
            self._pace.share(lane, left, now),
            most=self._most,
            timeout_s=self._timeout_s,
        )
        if failed is None:
            return self._take_fresh(size) if size or not self._flights() else None
        return self._take_again(failed, max(1, size))

    def _chunk_for_here(self, now: float) -> Chunk | None:
        """Return what no node takes, if this process is free for it.

        Raises:
            BaseException: it cannot be run here either.
        """
        nodes = [lane for lane in self._lanes.values() if lane.is_usable]
        awake = [lane for lane in nodes if lane.rests_until <= now or self._local is None]
        for chunk in self._again:
            if not any(self._may_take(lane, chunk) for lane in awake):
                if self._local is None or LOCAL in chunk.tried:
                    raise chunk.error or self._why
                return None if self._local.flight else self._take_again(chunk, self._most)
        if awake or self._fresh == self._total:
            return None
        if self._local is None:
            raise self._why
        return None if self._local.flight else self._take_fresh(self._most)

    def _copy_for(self, lane: Lane, now: float, times: float, seconds: float) -> Chunk | None:
        """Return the chunk of the call that is most worth a copy."""
        rate, worth = self._pace.rate(lane), {}
        for flight in self._flights() if rate else ():
            chunk, left = flight.chunk, self._pace.seconds_left(flight, now)
            is_worth_it = left > max(times * len(chunk) / rate, seconds)
            if is_worth_it and chunk.copies == 1 and lane.name not in chunk.tried:
                worth[chunk] = left
        return max(worth, key=worth.__getitem__, default=None)

    def _take_fresh(self, size: int) -> Chunk:
        chunk = Chunk(self._fresh, min(self._total, self._fresh + max(1, size)))
        self._fresh = chunk.stop
        return chunk

    def _take_again(self, chunk: Chunk, size: int) -> Chunk:
        place = self._again.index(chunk)
        rest = chunk.split(size)
        self._again[place : place + 1] = [] if rest is None else [rest]
        return chunk

    # Who.

    def _flights(self) -> list[Flight]:
        lanes = [*self._lanes.values(), *([] if self._local is None else [self._local])]
        return [lane.flight for lane in lanes if lane.flight is not None]

    def _is_free(self, lane: Lane, now: float) -> bool:
        return lane.is_usable and lane.flight is None and lane.rests_until <= now

    def _may_take(self, lane: Lane, chunk: Chunk) -> bool:
        return lane.is_usable and lane.name not in chunk.tried and not chunk.is_spent

    # Failing.

    def _may_wait(self, chunk: Chunk, now: float) -> bool:
        """Return whether a chunk may go on waiting for room at a node."""
        if chunk.refused_at is None:
            chunk.refused_at = now
        return now - chunk.refused_at < self._timeout_s

    def _note_failure(self, lane: Lane, flight: Flight, failure: Failure, now: float) -> None:
        if failure is Failure.LATE:
            self._records.late(lane.name, len(flight.chunk), now - flight.began)
        else:
            self._records.failed(lane.name)
        if failure in (Failure.GONE, Failure.LATE):
            pause = _SHORTEST_OUT_S * 2**lane.failures
            lane.out_until = now + min(pause, _LONGEST_OUT_S)
            lane.failures += 1
