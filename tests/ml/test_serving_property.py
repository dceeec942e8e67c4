"""Whatever arrives, fails, is cancelled or comes too late: everybody gets exactly what is theirs.

Once as a machine of single steps with a clock that is set by hand, and once with real threads,
tasks and streams.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from math import inf

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_helpers import LIMIT_S

from hornbeam_ml import DeadlineExceeded, ModelError, Overloaded, Serving, ServingClosed
from hornbeam_ml.promises import Promise
from hornbeam_ml.serving.bisection import run_batch
from hornbeam_ml.serving.calls import Call, Entry, PromiseWaker, ThreadWaker
from hornbeam_ml.serving.queue import BatchQueue
from hornbeam_ml.serving.template import Lane
from hornbeam_state.testing import ManualClock

KINDS = ["good"] * 8 + ["bad", "bad", "lost"]


class BadItem(ValueError):
    """The item at fault; `number` says which."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number


class Model:
    """Returns a receipt for each item; fails for items that are bad or lose the backend."""

    def __init__(self):
        self.succeeded = []
        self.with_lost = set()  # items that were in a batch whose backend was lost
        self.keys = {}
        self.runs = Counter()
        self.batches = []
        self.meanwhile = lambda: None  # what happens elsewhere while a run fails

    def run(self, items, key):
        self.batches.append(list(items))
        self.runs.update(number for number, _ in items)
        for number, kind in items:
            self.keys.setdefault(number, set()).add(key)
            if kind == "lost":
                self.with_lost |= {number for number, _ in items}
                raise MemoryError
        for number, kind in items:
            if kind == "bad":
                self.meanwhile()
                raise BadItem(number)
        self.succeeded += [number for number, _ in items]
        return [("receipt", number, key) for number, _ in items]

    def check(self, batch_size):
        assert len(self.succeeded) == len(set(self.succeeded)), "something that succeeded ran twice"
        assert all(len(keys) == 1 for keys in self.keys.values()), "an item ran under another key"
        assert all(1 <= len(batch) <= batch_size for batch in self.batches)

    def is_justified(self, error, items):
        """Whether a call with these items may have got this error from the model."""
        numbers = [number for number, _ in items]
        if isinstance(error, BadItem):
            return (error.number, "bad") in items
        return isinstance(error, MemoryError) and bool(self.with_lost.intersection(numbers))


class AnyItem:
    """A template that lets everything pass."""

    def check(self, lane):
        pass

    learn = check


def length(item):
    """Return some number of tokens, always the same for an item."""
    return 1 + item[0] * 7919 % 13


def keeps_budget(batch, max_tokens):
    lengths = [entry.length for entry in batch]
    return len(batch) == 1 or len(batch) * max(lengths) <= max_tokens


class Scenario:
    """A queue, its callers and its takers, one step at a time."""

    def __init__(self, batch_size, timer, limit, takers, max_tokens):
        self.clock = ManualClock(0.0)
        self.queue = BatchQueue(
            "serving",
            batch_size=batch_size,
            timer_s=timer,
            limit=limit,
            max_tokens=max_tokens,
            clock=self.clock,
        )
        self.max_tokens = inf if max_tokens is None else max_tokens
        self.limit, self.batch_size = limit, batch_size
        self.free = [self.queue.add_taker() for _ in range(takers)]
        self.busy = []
        self.model = Model()
        self.model.meanwhile = self.leave_meanwhile
        self.going = []  # calls that are abandoned while a run fails
        self.numbers = itertools.count()
        self.calls = {}  # call -> its items
        self.gone_meanwhile = {}  # call -> how often items had run when it was abandoned
        self.left = {}  # call -> its items that must never run now
        self.closed = False

    def arrive(self, kinds, key, allowance, future):
        kinds = kinds[:1] if future else kinds
        now = self.clock()
        waker = PromiseWaker(Promise(), lambda result: result) if future else ThreadWaker()
        call = Call(len(kinds), now, now + allowance, waker)
        items = [(next(self.numbers), kind) for kind in kinds]
        lane = Lane(key, None, False)
        room = len(self.queue._policy) < self.limit
        try:
            self.queue.admit(
                call,
                [Entry(call, index, item, lane, length(item)) for index, item in enumerate(items)],
            )
        except ServingClosed:
            assert self.closed
        except DeadlineExceeded:
            assert allowance == 0
        except Overloaded:
            assert not room
        else:
            assert room
            self.calls[call] = items

    def pass_time(self, seconds):
        self.clock.advance(seconds)

    def take(self):
        if not self.free:
            return
        taker = self.free.pop(0)
        in_order = [entry for entry in self.queue._policy if self.clock() < entry.deadline]
        batch, _ = self.queue.look(taker)
        if batch:
            oldest = next(entry for entry in in_order if entry.lane == batch[0].lane)
            assert oldest in batch or self.was_cancelled(oldest), "the oldest was passed over"
            assert keeps_budget(batch, self.max_tokens)
            waits = len(self.queue._policy) > 0
            assert taker.alone == (not waits and not self.busy)
        (self.busy if batch else self.free).append(taker)
        assert len({entry.lane for entry in batch}) <= 1
        assert all(self.clock() < entry.deadline for entry in batch)

    @staticmethod
    def was_cancelled(entry):
        waker = entry.call.waker
        return isinstance(waker, PromiseWaker) and waker.promise.cancelled()

    def finish(self, which):
        if not self.busy:
            return
        taker = self.busy.pop(which % len(self.busy))
        run_batch(taker.batch, self.model, self.queue, AnyItem())
        assert all(entry.call.done or len(self.calls[entry.call]) > 1 for entry in taker.batch)
        taker.batch = ()
        self.free.append(taker)

    def leave(self, which, how):
        if not self.calls:
            return
        call = list(self.calls)[which % len(self.calls)]
        if how.startswith("cancel") and isinstance(call.waker, PromiseWaker):
            if call.waker.promise.cancel():
                self.note_left(call)
                if how == "cancel":
                    self.queue.abandon(call)
        elif how == "later":
            self.going.append(call)
        elif how == "abandon":
            self.queue.abandon(call)
        elif how == "expire" and call.deadline <= self.clock():
            self.queue.expire(call)
        if call.done:
            self.note_left(call)

    def leave_meanwhile(self):
        while self.going:
            call = self.going.pop()
            if not call.done:
                self.queue.abandon(call)
                # The batches of other takers have begun; here they run a little later.
                begun = Counter(entry.item[0] for taker in self.busy for entry in taker.batch)
                self.gone_meanwhile[call] = self.model.runs + begun

    def note_left(self, call):
        """Note which items of a call must not run any more."""
        if call not in self.left:
            taken = {entry.item[0] for taker in self.busy for entry in taker.batch}
            ran = set(self.model.keys)
            self.left[call] = {n for n, _ in self.calls[call]} - taken - ran

    def close(self, drain):
        self.closed = True
        self.queue.close(ServingClosed("closed"), drain=drain)

    def check(self):
        """Check what holds at any time."""
        assert len(self.queue._policy) <= self.limit
        assert not self.queue._feed or len(self.queue._policy) == self.limit
        if self.closed:  # a queue that drains waits for no timer
            arrivals = {call.arrived for call in self.calls}
            assert self.queue._policy.ready_at() in (inf, *arrivals)
        self.model.check(self.batch_size)
        for call, items in self.calls.items():
            if call.done:
                self.check_outcome(call, items)
        for call, runs in self.gone_meanwhile.items():
            for number, _ in self.calls[call]:
                assert self.model.runs[number] <= runs[number], "it was run once more"
        for numbers in self.left.values():
            assert not numbers.intersection(self.model.keys), "something cancelled has run"

    def check_outcome(self, call, items):
        error = call.error
        if isinstance(call.waker, PromiseWaker):
            assert call.waker.promise.done()
        if error is None and call.left:
            assert call in self.left or call in self.gone_meanwhile
        elif error is None:
            (key,) = self.model.keys[items[0][0]]
            assert call.results == [("receipt", number, key) for number, _ in items]
        elif isinstance(error, DeadlineExceeded):
            assert call.deadline <= self.clock()
        elif isinstance(error, ServingClosed):
            assert self.closed
        else:
            assert self.model.is_justified(error, items)

    def end(self):
        """Let everything come to its end: nobody is left."""
        for _ in range(1000):
            if not self.queue._unfinished:
                break
            while self.busy:
                self.finish(0)
            self.clock.advance(2.0)
            self.take()
        assert all(call.done for call in self.calls)
        assert len(self.queue._policy) == 0
        assert not self.queue._feed
        self.check()


arrivals = st.tuples(
    st.just("arrive"),
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=10),
    st.sampled_from("aab"),
    st.sampled_from([inf, inf, inf, 0.0, 1.0, 3.0]),
    st.booleans(),
)
leaving = st.tuples(
    st.just("leave"),
    st.integers(0, 99),
    st.sampled_from(["abandon", "expire", "cancel", "cancel, not noticed yet", "later"]),
)
steps = st.lists(
    st.one_of(
        arrivals,
        arrivals,
        arrivals,
        st.just(("take",)),
        st.just(("take",)),
        st.tuples(st.just("finish"), st.integers(0, 9)),
        st.tuples(st.just("finish"), st.integers(0, 9)),
        leaving,
        st.tuples(st.just("pass_time"), st.integers(1, 3)),
    ),
    min_size=20,
    max_size=80,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.builds(
        Scenario,
        batch_size=st.integers(1, 6),
        timer=st.sampled_from([0.0, 0.0, 2.0]),
        limit=st.integers(1, 9),
        takers=st.integers(1, 3),
        max_tokens=st.sampled_from([None, inf, 40, 12]),
    ),
    steps,
    st.sampled_from([None, None, None, True, False]),
)
def test_every_call_ends_as_it_should_whatever_the_order_of_events(scenario, plan, drain):
    """Nothing is lost, mixed up, run twice, run after it was cancelled; the bound holds."""
    for action, *arguments in plan:
        getattr(scenario, action)(*arguments)
        scenario.check()
    if drain is not None:
        scenario.close(drain)
        scenario.arrive(["good"], "a", inf, False)
        scenario.check()
    scenario.end()


class Slow(Model):
    """The same model under threads, with a pause in each batch."""

    def __init__(self, pause_s):
        super().__init__()
        self._pause_s = pause_s
        self._lock = threading.Lock()

    def __call__(self, batch, key):
        time.sleep(self._pause_s)
        with self._lock:
            return self.run(batch, key)


plans = st.lists(
    st.tuples(
        st.lists(st.sampled_from(KINDS), min_size=1, max_size=9),
        st.sampled_from("ab"),
        st.sampled_from([None, None, None, 2.0, 30.0]),
        st.sampled_from(["run", "arun", "submit", "cancel", "acancel"]),
    ),
    min_size=1,
    max_size=24,
)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    plans,
    st.fixed_dictionaries(
        {
            "batch_size": st.integers(1, 6),
            "batch_timeout_ms": st.sampled_from([0, 0, 2]),
            "queue_limit": st.sampled_from([1, 4, 64]),
            "streams": st.integers(1, 3),
        }
    ),
    st.sampled_from([{}, {"length": length}, {"length": length, "max_batch_tokens": 24}]),
    st.sampled_from([0, 0.001]),
    st.sampled_from([None, True, False]),
)
def test_everybody_gets_exactly_what_is_theirs(plan, options, lengths, pause_s, early_end):
    """Threads, tasks and futures at once; sometimes the serving is closed under them."""
    model, numbers = Slow(pause_s), itertools.count()
    serving = Serving(lambda: model, batch_keys=["a", "b"], **options, **lengths)
    bound = options["queue_limit"]

    def sync(items, key, timeout_ms, how):
        if how == "run":
            return serving.run_batch(items, key=key, timeout_ms=timeout_ms)
        future = serving.submit(items[0], key=key, timeout_ms=timeout_ms)
        if how == "cancel" and future.cancel():
            return "cancelled"
        return [future.result(LIMIT_S)]

    async def awaiting(items, key, timeout_ms, how):
        task = asyncio.ensure_future(serving.arun_batch(items, key=key, timeout_ms=timeout_ms))
        await asyncio.sleep(0)
        if how == "acancel" and task.cancel():
            await asyncio.wait([task])
            return "cancelled" if task.cancelled() else task.result()
        return await asyncio.wait_for(task, LIMIT_S)

    async def all_calls():
        loop, made = asyncio.get_running_loop(), []
        with ThreadPoolExecutor(24) as pool:
            for kinds, key, timeout_ms, how in plan:
                single = how in ("submit", "cancel")
                items = [(next(numbers), kind) for kind in (kinds[:1] if single else kinds)]
                arguments = items, key, timeout_ms, how
                if how.startswith("a"):
                    call = asyncio.ensure_future(awaiting(*arguments))
                else:
                    call = loop.run_in_executor(pool, sync, *arguments)
                made.append((items, key, call))
                assert serving.stats().queued <= bound
            if early_end is not None:
                await serving.aclose(drain=early_end)
            await asyncio.wait([call for _, _, call in made], timeout=LIMIT_S)
            return made

    made = asyncio.run(all_calls())
    serving.close()
    for items, key, call in made:
        assert call.done(), "somebody hangs"
        error = call.exception()
        if error is None:
            receipts = [("receipt", number, key) for number, _ in items]
            assert call.result() in ("cancelled", receipts)
        elif not isinstance(error, Overloaded | DeadlineExceeded):
            assert not isinstance(error, ModelError)
            closed = isinstance(error, ServingClosed) and early_end is not None
            assert closed or model.is_justified(error, items)
    model.check(options["batch_size"])
    for batch in model.batches:
        longest = max(map(length, batch))
        budget = lengths.get("max_batch_tokens", inf)
        assert len(batch) == 1 or len(batch) * longest <= budget, "more than the budget"
    stats = serving.stats()
    assert stats.queued == 0
    assert stats.items <= stats.tokens <= stats.padded_tokens
