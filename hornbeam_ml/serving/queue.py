"""Calls on their way to a batch: bounded admission, deadlines, cancellation, finishing.

One lock guards everything here and every call's fields. Whoever waits is woken outside of it, and
nothing that a user wrote runs under it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from math import inf
from typing import TYPE_CHECKING, Any, Final

from hornbeam_ml.errors import ClientDisconnected
from hornbeam_ml.serving.calls import Call, Entry, PromiseWaker, StreamingCall
from hornbeam_ml.serving.failures import copies
from hornbeam_ml.serving.policy import Policy
from hornbeam_ml.serving.stats import Extent, ServingStats, Tally
from hornbeam_ml.serving.takers import Taker, Takers
from hornbeam_state.errors import DeadlineExceeded, Overloaded
from hornbeam_state.waking import wake

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from hornbeam_state.errors import HornbeamError

_LONGEST_RETRY_S: Final = 60.0


class BatchQueue:
    """The waiting calls of a serving. Safe to use from any thread.

    Args:
        name: What errors call the serving.
        batch_size: The most items in a batch.
        timer_s: How long the first item of a lane waits for others.
        limit: The most items that wait.
        max_tokens: The most tokens in a batch of items of similar length; see `Policy`.
        pads: Whether the model pads the items of a batch to the longest: asked for each batch.
        rows_for: From the number of items in a batch to the rows it is padded to.
        clock: Seconds.
    """

    def __init__(
        self,
        name: str,
        *,
        batch_size: int,
        timer_s: float = 0.0,
        limit: int = 1024,
        max_tokens: float | None = None,
        pads: Callable[[], bool] = lambda: True,
        rows_for: Callable[[int], int] = int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self.tally = Tally()
        self.name = name
        self._batch_size = batch_size
        self._limit = limit
        self._pads = pads
        self._rows_for = rows_for
        self._lock = threading.Lock()
        self._max_tokens = inf if max_tokens is None else max_tokens
        self._policy: Policy[Entry] = Policy(batch_size, timer_s, max_tokens)
        self._feed: deque[Entry] = deque()  # of the one call that is larger than the room
        self._unfinished: set[Call] = set()
        self._takers = Takers()
        self._closed: BaseException | None = None
        self._dropped = False

    # Callers.

    def admit(self, call: Call, entries: Sequence[Entry]) -> None:
        """Let the entries of a call wait for a batch.

        A call with more entries than there is room for feeds them in as room appears; until then
        the queue is full for everybody else.

        Raises:
            Overloaded: there is no room at all.
            DeadlineExceeded: it is too late already.
            ClientDisconnected: nobody waits for it any more.
            ServingClosed: as `close` was told.
        """
        if self._closed is not None:
            raise copies(self._closed, 2)[1]
        with self._lock:
            now = self.clock()
            if self._closed is not None:
                raise copies(self._closed, 2)[1]
            if call.error is not None:  # `disconnect` was quicker
                raise call.error
            if call.deadline <= now:
                self.tally.expired += 1
                raise self._too_late()
            if len(self._policy) >= self._limit:
                self.tally.refused += 1
                raise self._overloaded()
            call.entries = entries
            self._unfinished.add(call)
            self._policy.arrange(entries)
            self._feed.extend(entries)
            taker = self._refill(now)
        if taker:
            taker.wake()

    def expire(self, call: Call) -> None:
        """Finish a call with `DeadlineExceeded`, unless it is finished."""
        self._leave(call, self._too_late())

    def abandon(self, call: Call) -> None:
        """Finish a call that nobody waits for any more: what has not started never runs."""
        self._leave(call, None)

    def forget(self, call: StreamingCall) -> None:
        """Let the chunks of a call go unheard, without a lock: a finalizer calls it."""
        call.unheard = True

    def seconds_left(self, call: Call) -> float:
        """Return the seconds until the deadline of a call."""
        return call.deadline - self.clock()

    def disconnect(self, call: Call) -> None:
        """Finish a call whose HTTP client left: what has not started never runs."""
        left = ClientDisconnected(f"{self.name}: the client left before there was a result")
        self._leave(call, left)

    def _leave(self, call: Call, error: HornbeamError | None) -> None:
        with self._lock:
            if call.done:
                return
            self._count_as_left(error)
            self._end(call, error)
            taker = self._refill(self.clock())
        if taker:
            taker.wake()
        wake([call])

    # Streams.

    def add_taker(self) -> Taker:
        """Return a new taker of batches."""
        with self._lock:
            return self._takers.add()

    def remove_taker(self, taker: Taker) -> None:
        """Forget a taker, whose batch is finished."""
        with self._lock:
            self._takers.remove(taker)

    def take(self, taker: Taker) -> Sequence[Entry]:
        """Wait for a batch and return it: entries of one lane whose callers still wait.

        Returns:
            The entries; none: the queue is closed, and nothing waits any more.
        """
        while True:
            batch, over = self.look(taker)
            if batch or over:
                return batch
            if not self._dropped:  # `drop` may have looked for idle ones before this was one
                taker.wait(taker.until - self.clock())

    def look(self, taker: Taker) -> tuple[Sequence[Entry], bool]:
        """Take a batch if one is ready; else note that the taker is idle.

        Returns:
            The entries, and whether there will never be any again.
        """
        with self._lock:
            now = self.clock()
            if taker.batch:
                self.tally.busy_s += now - taker.since
                taker.batch = ()
            else:
                self._takers.note_awake(taker)
            batch, late = self._cut(now)
            taker.batch, taker.since, taker.progress = batch, now, now
            other, over = None, self._is_over()
            if batch:
                taker.alone = not len(self._policy) and self._takers.is_only_busy(taker)
                other = self._taker_to_wake(now)
            elif not over:
                self._takers.note_idle(taker, until=self._policy.ready_at())
        wake(late)
        if other:
            other.wake()
        return batch, over

    def settle(self, entries: Sequence[Entry], results: Sequence[Any]) -> None:
        """Hand out the results of some entries."""
        finished: list[Call] = []
        with self._lock:
            for entry, result in zip(entries, results, strict=True):
                call = entry.call
                if not call.done:
                    call.settle(entry.index, result)
                    if call.done:
                        finished.append(call)
            self._unfinished.difference_update(finished)
        wake(finished)

    def push(self, entries: Sequence[Entry], chunks: Sequence[Any]) -> bool:
        """Hand out one chunk for each entry; return whether anybody still listens."""
        told = []
        with self._lock:
            for entry, chunk in zip(entries, chunks, strict=True):
                call = entry.call
                if isinstance(call, StreamingCall) and not call.done:
                    call.push(chunk)
                    told.append(call)
            listening = [call for call in told if not call.done]
            self._unfinished.difference_update(call for call in told if call.done)
        wake(told)
        return bool(listening)

    def end(self, entries: Iterable[Entry]) -> None:
        """Finish the calls of entries whose chunks have all been handed out."""
        with self._lock:
            calls = _unfinished(entries)
            for call in calls:
                call.end()
            self._unfinished.difference_update(calls)
        wake(calls)

    def fail(self, entries: Iterable[Entry], error: BaseException) -> None:
        """Finish the calls of some entries with an error, each with one of its own."""
        self._fail_calls(_unfinished(entries), error)

    def retry(self, entries: Sequence[Entry]) -> list[Entry]:
        """Return those of some entries, to be run again, whose callers still wait."""
        with self._lock:
            now = self.clock()
            late = [call for call in _unfinished(entries) if call.deadline <= now]
            self._expire(late)
            self._feed_in(now)
            waiting = [entry for entry in entries if not entry.call.done]
            self.tally.retries += bool(waiting)
        wake(late)
        return waiting

    # The end.

    def close(self, error: BaseException, *, drain: bool) -> None:
        """Take no more calls, which get `error`; `drain`: serve those that wait."""
        with self._lock:
            if self._closed is None:
                self._closed = error
            self._policy.hasten()
            takers = self._takers.idle()
            waiting = [] if drain else _unfinished([*self._policy, *self._feed])
        self._fail_calls(waiting, error)
        for taker in takers:
            taker.wake()

    def abort(self, error: BaseException) -> None:
        """Take no more calls, and fail those that wait and those that run."""
        self.close(error, drain=False)
        with self._lock:
            rest = list(self._unfinished)
        self._fail_calls(rest, error)

    def recover(self, taker: Taker, error: BaseException) -> None:
        """After a fault of our own: finish whatever it may have kept from being finished.

        That is what the taker was running. A fault on the way to a batch may have lost any of
        the waiting calls, so all of these fail.
        """
        if taker.batch:
            calls = [entry.call for entry in taker.batch]
        else:
            with self._lock:
                running = {entry.call for entry in self._takers.running()}
                calls = [call for call in self._unfinished if call not in running]
                self._policy = self._policy.emptied()
                self._feed.clear()
        self._fail_calls(calls, error)
        wake(calls)  # it may have hit between finishing and waking

    def drop(self) -> None:
        """Serve what waits, then end: no new call can come. Safe while garbage is collected."""
        # No lock: the collector may have interrupted this thread while it holds it.
        self._dropped = True
        for taker in self._takers.idle():
            taker.wake()

    def forget_after_fork(self, error: BaseException) -> None:
        """In a forked child: finish whoever waits, without the threads and locks of the parent."""
        self._lock = threading.Lock()
        self._closed = error
        for call in list(self._unfinished):
            call.fail(error)
            if isinstance(call.waker, PromiseWaker):
                call.waker.promise.fail_after_fork(error)

    def note_progress(self, taker: Taker) -> None:
        """Note that a batch goes on."""
        taker.progress = self.clock()

    @property
    def unfinished(self) -> int:
        """How many calls wait or run."""
        return len(self._unfinished)

    def any_stuck(self, limit_s: float) -> bool:
        """Return whether there is a batch in which nothing has happened for so long."""
        with self._lock:
            return self._takers.any_stuck(self.clock(), limit_s)

    def stats(self, *, name: str | None, ready: bool) -> ServingStats:
        """Return the figures of this moment."""
        with self._lock:
            return self.tally.stats(
                name=name,
                ready=ready,
                queued=Counter(entry.lane.key for entry in self._policy),
                running=len(self._takers.running()),
            )

    def _fail_calls(self, calls: Sequence[Call], error: BaseException) -> None:
        errors = copies(error, len(calls))  # code of the user: not under the lock
        with self._lock:
            for call, own in zip(calls, errors, strict=True):
                if not call.done:
                    self.tally.failed += 1
                    self._end(call, own)
            taker = self._refill(self.clock())
        if taker:
            taker.wake()
        wake(calls)

    # Under the lock.

    def _cut(self, now: float) -> tuple[list[Entry], list[Call]]:
        gone: list[Call] = []
        while True:
            # Where length makes no difference, a stream takes what there is.
            cut = self._policy.cut(now, streams=len(self._takers) if self._pads() else 1)
            late = _unfinished(cut.late)
            self._expire(late)
            gone += late
            self._feed_in(now)
            batch = [entry for entry in cut.batch if self._start(entry)]
            if batch:
                arrivals = [entry.arrived for entry in batch]
                self.tally.start(batch[0].lane.key, arrivals, self._extent(batch), now)
            if batch or not (cut.batch or cut.late):
                return batch, gone

    def _extent(self, batch: Sequence[Entry]) -> Extent:
        lengths = [entry.length for entry in batch]
        longest = max(lengths)
        room = max(1, min(self._batch_size, self._max_tokens / longest))
        padded = self._rows_for(len(batch)) * longest if self._pads() else sum(lengths)
        return Extent(int(room), sum(lengths), padded)

    def _start(self, entry: Entry) -> bool:
        """Return whether to run an entry: somebody waits for it."""
        call = entry.call
        if not call.done and not call.start():
            self._count_as_left(None)
            self._end(call, None)
        return not call.done

    def _end(self, call: Call, error: BaseException | None) -> None:
        """Finish a call, and forget what of it waits."""
        entries = call.entries
        call.fail(error)
        self._unfinished.discard(call)
        for entry in entries:
            self._policy.remove(entry)
        if self._feed and self._feed[0].call is call:
            self._feed.clear()

    def _expire(self, calls: Iterable[Call]) -> None:
        for call in calls:
            error = self._too_late()
            self._count_as_left(error)
            self._end(call, error)

    def _count_as_left(self, error: BaseException | None) -> None:
        if isinstance(error, DeadlineExceeded):
            self.tally.expired += 1
        else:
            self.tally.cancelled += 1

    def _refill(self, now: float) -> Taker | None:
        """Let in what there is room for; return a taker to wake for it."""
        self._feed_in(now)
        return self._taker_to_wake(now)

    def _feed_in(self, now: float) -> None:
        while self._feed and len(self._policy) < self._limit:
            self._policy.add(self._feed.popleft(), now)

    def _taker_to_wake(self, now: float) -> Taker | None:
        return self._takers.to_wake(self._policy.ready_at(), now) if self._takers.any_idle else None

    def _is_over(self) -> bool:
        ended = self._closed is not None or self._dropped
        return ended and not len(self._policy)

    def _overloaded(self) -> Overloaded:
        error = Overloaded.refusal(f"{self.name}: {self._limit} items wait already")
        wait_s = self.tally.time_for(self._limit) / max(1, len(self._takers))
        error.retry_after_s = min(max(1.0, wait_s), _LONGEST_RETRY_S)
        return error

    def _too_late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"{self.name}: the deadline passed before there was a result")


def _unfinished(entries: Iterable[Entry]) -> list[Call]:
    """Return the calls of some entries that are not done, each once."""
    return list(dict.fromkeys(entry.call for entry in entries if not entry.call.done))
