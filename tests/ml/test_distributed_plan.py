"""Who gets which items of a batch, with a clock that is set by hand and nodes that are made up."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hornbeam_ml.distributed.chunks import Chunk
from hornbeam_ml.distributed.failures import Failure, failure_of
from hornbeam_ml.distributed.plan import Plan
from hornbeam_ml.distributed.records import LOCAL, Records
from hornbeam_ml.distributed.sharing import Speed, chunk_size, seconds_to_end
from hornbeam_state import (
    CodecError,
    DeadlineExceeded,
    NodeDown,
    NotExposed,
    Overloaded,
    RemoteError,
    StoreUnavailable,
)

NOBODY = NodeDown("nobody")
LISTING_S = 1.0


def a_plan(total, records=None, **options):
    options = {"most": 256, "timeout_s": 60.0, "has_local": False, "nobody": NOBODY, **options}
    return Plan(total, records or Records(), **options)


@dataclass
class Node:
    """A made-up node: how long it takes, and what happens to it."""

    item_s: float
    call_s: float = 0.0
    joins_at: float = 0.0
    dies_at: float = float("inf")
    errors: list = field(default_factory=list)  # of its first calls; None: none

    def outcome(self, flight, now, timeout_s):
        """Return when a call ends, and how."""
        end = now + self.call_s + self.item_s * len(flight.chunk)
        error = self.errors.pop(0) if self.errors else None
        if self.dies_at < end:
            return max(now, self.dies_at), NodeDown("killed")
        if end - now > timeout_s:
            return now + timeout_s, DeadlineExceeded("late")
        return end, error


class Simulation:
    """Runs a plan over made-up nodes, and checks what holds for every plan on the way."""

    def __init__(self, plan, total, nodes, *, timeout_s=60.0) -> None:
        self.plan, self.nodes, self.timeout_s = plan, nodes, timeout_s
        self.answers = [0] * total
        self.given = {}
        self.now = 0.0
        self.largest = 0
        self._events = []
        self._number = itertools.count()

    def run(self):
        """Return when the batch is done."""
        self._list()
        steps = 0
        while not self.plan.is_done:
            steps += 1
            assert steps < 100_000, "it makes no progress"
            for flight in self.plan.hand_out(self.now):
                self._begin(flight)
            self._step()
        assert set(self.answers) <= {1}
        return self.now

    def _begin(self, flight):
        self.given.setdefault(flight.name, []).append(flight.chunk)
        self.largest = max(self.largest, len(flight.chunk))
        end, error = self.nodes[flight.name].outcome(flight, self.now, self.timeout_s)
        heapq.heappush(self._events, (end, next(self._number), flight, error))

    def _step(self):
        look = self.plan.next_look(self.now)
        next_listing = (self.now // LISTING_S + 1) * LISTING_S
        times = [next_listing, *([look] if look else []), *(e[0] for e in self._events[:1])]
        self.now = max(self.now, min(times))
        if self.now == next_listing:
            self._list()
        while self._events and self._events[0][0] <= self.now:
            self._end(*heapq.heappop(self._events)[2:])

    def _end(self, flight, error):
        if error is not None:
            self.plan.fail(flight, failure_of(error), error, self.now)
            return
        if self.plan.succeed(flight, self.now):
            for place in range(flight.chunk.start, flight.chunk.stop):
                self.answers[place] += 1
        for event in [event for event in self._events if event[2].chunk.done]:
            self._events.remove(event)
            self.plan.overtaken(event[2], self.now)
        heapq.heapify(self._events)

    def _list(self):
        there = [
            name
            for name, node in self.nodes.items()
            if name != LOCAL and node.joins_at <= self.now < node.dies_at
        ]
        self.plan.list_nodes(there, self.now)


def simulate(total, nodes, *, records=None, timeout_s=60.0, **options):
    plan = a_plan(total, records, has_local=LOCAL in nodes, timeout_s=timeout_s, **options)
    return Simulation(plan, total, nodes, timeout_s=timeout_s)


def ideal(total, nodes):
    """Return how long it takes when both end together, and know their speed beforehand."""
    return total / sum(1 / node.item_s for node in nodes.values())


# Sharing


class TestSharing:
    @pytest.mark.parametrize(
        ("items", "nodes", "seconds"),
        [
            pytest.param(10, [(1.0, 0.0)], 10.0, id="one"),
            pytest.param(500, [(100.0, 0.0), (25.0, 0.0)], 4.0, id="two"),
            pytest.param(10, [(1.0, 0.0), (1.0, 4.0)], 7.0, id="one is free later"),
            pytest.param(10, [(1.0, 0.0), (1.0, 40.0)], 10.0, id="one is free too late"),
            pytest.param(10, [(1.0, 10.0), (1.0, 5.0)], 12.5, id="none is free yet"),
        ],
    )
    def test_all_end_together(self, items, nodes, seconds):
        assert seconds_to_end(items, nodes) == pytest.approx(seconds)

    @pytest.mark.parametrize(
        ("speed", "share", "size"),
        [
            pytest.param(Speed(), 1000, 1, id="not measured: one, to measure it"),
            pytest.param(Speed(10, 1, 10), 1000, 40, id="rough: four times as many as before"),
            pytest.param(Speed(100, 1, 100), 100, 50, id="half of its share"),
            pytest.param(Speed(100, 1, 100), 6, 5, id="not less than is worth a call"),
            pytest.param(Speed(100, 1, 100), 4, 4, id="not more than its share"),
            pytest.param(Speed(100, 1, 100), 0.4, 0, id="the others end sooner without it"),
            pytest.param(Speed(100, 1, 100), 0.6, 1, id="rounded"),
            pytest.param(Speed(1000, 1, 1000), 10**6, 256, id="at most that many"),
            pytest.param(Speed(1, 1, 100), 1000, 15, id="a quarter of its timeout"),
            pytest.param(Speed(1, 100, 100), 1000, 1, id="one at least"),
        ],
    )
    def test_the_size_of_a_chunk(self, speed, share, size):
        assert chunk_size(speed, share, most=256, timeout_s=60.0) == size

    def test_later_chunks_count_more(self):
        assert Speed().after(10, 1.0).rate == 10
        assert Speed().after(10, 1.0).after(90, 1.0).rate == pytest.approx(95 / 1.5)

    def test_a_chunk_that_took_no_time_has_a_rate(self):
        assert Speed().after(10, 0.0).rate > 0


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (NodeDown("x"), Failure.GONE),
        (NotExposed("x"), Failure.GONE),
        (StoreUnavailable("x"), Failure.GONE),
        (DeadlineExceeded("x"), Failure.LATE),
        (Overloaded("x"), Failure.BUSY),
        (RemoteError("ValueError", "x"), Failure.WRONG),
        (CodecError("x"), Failure.WRONG),
    ],
)
def test_what_errors_mean(error, failure):
    assert failure_of(error) is failure


# How long a batch takes


class TestTime:
    def test_two_nodes_of_which_one_is_four_times_slower(self):
        nodes = {"a": Node(0.010), "b": Node(0.040)}
        run = simulate(500, nodes)
        assert run.run() <= 1.1 * ideal(500, nodes)
        assert sum(map(len, run.given["a"])) == pytest.approx(400, rel=0.1)

    def test_the_second_batch_profits_from_the_first(self):
        """Of short ones each node gets its share in one call, or two."""
        records, nodes = Records(), {"a": Node(0.001, 0.005), "b": Node(0.004, 0.005)}
        simulate(500, nodes, records=records).run()
        run = simulate(50, nodes, records=records)
        run.run()
        assert sum(map(len, run.given.values())) <= 4

    @settings(max_examples=300, deadline=None)
    @given(
        total=st.integers(1, 5000),
        items=st.lists(st.floats(0.0005, 0.2), min_size=1, max_size=8),
        call_s=st.floats(0, 0.002),
        most=st.sampled_from([16, 256, 10**6]),
    )
    def test_it_is_near_the_ideal_split_whatever_the_nodes(self, total, items, call_s, most):
        """Beside a quarter: what it takes to measure, and the last items on the slowest node."""
        nodes = {f"n{number}": Node(item_s, call_s) for number, item_s in enumerate(items)}
        run = simulate(total, nodes, most=most)
        calls = max(len(given) for given in run.given.values()) if run.run() else 0
        slowest = max(items) + 0.05
        assert run.now <= 1.25 * ideal(total, nodes) + 2 * slowest + calls * call_s
        assert run.largest <= most

    @settings(max_examples=200, deadline=None)
    @given(
        seconds=st.floats(3, 30),
        rates=st.lists(st.floats(10, 2000), min_size=2, max_size=6),
    )
    def test_a_batch_of_some_seconds_is_within_a_tenth_of_the_ideal(self, seconds, rates):
        total = max(1, int(seconds * sum(rates)))
        nodes = {f"n{number}": Node(1 / rate) for number, rate in enumerate(rates)}
        assert simulate(total, nodes).run() <= 1.1 * ideal(total, nodes)

    def test_a_node_that_becomes_slow_gets_less(self):
        records = Records()
        simulate(1000, {"a": Node(0.001), "b": Node(0.001)}, records=records).run()
        nodes = {"a": Node(0.001), "b": Node(0.050)}
        assert simulate(2000, nodes, records=records).run() <= 2.5

    def test_the_last_chunk_of_a_node_that_hangs_is_given_to_another(self):
        """Long before it is late, when the others have nothing else to do."""
        records = Records()
        simulate(1000, {"a": Node(0.01), "b": Node(0.01)}, records=records).run()
        run = simulate(1000, {"a": Node(0.01), "b": Node(1000.0)}, records=records)
        assert run.run() < 15
        stats = records.stats()
        assert stats.nodes["b"].late == 1
        assert stats.items == 2000

    def test_the_same_here_when_no_node_is_left_for_it(self):
        nodes = {"a": Node(0.01), LOCAL: Node(0.1)}
        records = Records()
        simulate(100, nodes, records=records).run()
        nodes["a"] = Node(1000.0)
        assert simulate(20, nodes, records=records).run() < 30
        assert records.stats().local.items > 0

    def test_no_call_gets_a_copy_where_all_goes_well(self):
        records = Records()
        nodes = {"a": Node(0.010), "b": Node(0.040), "c": Node(0.020), LOCAL: Node(0.01)}
        for total in (500, 501, 7, 64, 1000):
            run = simulate(total, nodes, records=records)
            run.run()
            assert LOCAL not in run.given
        assert records.stats().items == 2072
        assert records.stats().late == 0


# What fails


class TestFailures:
    def test_the_chunk_of_a_node_that_dies_goes_to_another(self):
        records = Records()
        simulate(1000, {"a": Node(0.001), "b": Node(0.001, dies_at=0.2)}, records=records).run()
        assert records.stats().nodes["b"].failed == 1
        assert records.stats().items == 1000

    def test_a_node_may_join(self):
        run = simulate(2000, {"a": Node(0.01), "b": Node(0.01, joins_at=5.0)})
        assert run.run() <= 13.5

    def test_a_node_that_failed_is_asked_again_in_a_while(self):
        run = simulate(2000, {"a": Node(0.01), "b": Node(0.01, errors=[NodeDown("away")])})
        assert run.run() <= 13
        assert len(run.given["b"]) > 3

    def test_what_no_node_takes_is_run_here(self):
        run = simulate(100, {"a": Node(0.01, dies_at=0.1), LOCAL: Node(0.05)})
        run.run()
        assert sum(map(len, run.given[LOCAL])) > 80

    def test_nobody_is_there(self):
        run = simulate(100, {LOCAL: Node(0.01)}, most=64)
        assert run.run() == pytest.approx(1.0)
        assert [len(chunk) for chunk in run.given[LOCAL]] == [64, 36]

    def test_nobody_is_there_and_nothing_can_be_run_here(self):
        with pytest.raises(NodeDown, match="nobody"):
            simulate(100, {}).run()

    def test_a_list_that_is_lost_for_a_moment(self):
        """So it is when its server restarts with nothing; the nodes write it anew."""
        plan = a_plan(100)
        plan.list_nodes(["a"], 0.0)
        (flight,) = plan.hand_out(0.0)
        plan.list_nodes([], 1.0)
        assert plan.hand_out(1.0) == []
        plan.succeed(flight, 1.5)
        (flight,) = plan.hand_out(1.5)
        plan.list_nodes(["a"], 2.0)
        plan.succeed(flight, 2.5)
        assert [flight.name for flight in plan.hand_out(2.5)] == ["a"]

    def test_all_nodes_leave(self):
        plan = a_plan(100)
        plan.list_nodes(["a"], 0.0)
        (flight,) = plan.hand_out(0.0)
        plan.list_nodes([], 1.0)
        plan.succeed(flight, 1.5)
        (flight,) = plan.hand_out(1.5)
        plan.fail(flight, Failure.GONE, NodeDown("it has left"), 1.5)
        with pytest.raises(NodeDown, match="it has left"):
            plan.hand_out(1.5)

    def test_all_nodes_die(self):
        with pytest.raises(NodeDown, match="killed"):
            simulate(100, {"a": Node(0.1, dies_at=0.5), "b": Node(0.1, dies_at=0.7)}).run()

    def test_a_function_that_fails_is_tried_once_elsewhere(self):
        """And no more: the items may be to blame."""
        nodes = {name: Node(0.01, errors=[RemoteError("ValueError", "x")] * 99) for name in "abc"}
        with pytest.raises(RemoteError):
            simulate(1, nodes).run()
        assert sorted(99 - len(node.errors) for node in nodes.values()) == [0, 1, 1]

    def test_then_here(self):
        error = RemoteError("ValueError", "x")
        nodes = {name: Node(0.01, errors=[error] * 99) for name in "abc"}
        run = simulate(1, {**nodes, LOCAL: Node(0.01)})
        run.run()
        assert len(run.given[LOCAL]) == 1

    def test_items_that_end_processes_do_not_end_them_all(self):
        nodes = {name: Node(0.01, errors=[NodeDown("died of it")]) for name in "abcdefg"}
        with pytest.raises(NodeDown):
            simulate(1, nodes).run()
        assert sum(not node.errors for node in nodes.values()) == 3

    def test_a_late_chunk_goes_elsewhere(self):
        nodes = {"a": Node(0.01, 100.0), "b": Node(0.01)}
        records = Records()
        simulate(10, nodes, records=records, timeout_s=1.0).run()
        assert records.stats().nodes["a"].late == 1
        assert records.stats().nodes["b"].items == 10

    def test_a_late_chunk_has_nowhere_to_go(self):
        with pytest.raises(DeadlineExceeded):
            simulate(10, {"a": Node(0.01, 100.0)}, timeout_s=1.0).run()

    def test_a_node_without_room_is_asked_again(self):
        error = Overloaded("full")
        error.retry_after_s = 0.5
        run = simulate(10, {"a": Node(0.01, errors=[error] * 3)})
        assert run.run() == pytest.approx(1.6, abs=0.1)

    def test_but_not_for_ever(self):
        run = simulate(10, {"a": Node(0.01, errors=[Overloaded("full")] * 99)}, timeout_s=5.0)
        with pytest.raises(Overloaded):
            run.run()
        assert run.now == pytest.approx(5.0, abs=0.1)

    def test_meanwhile_this_process_does_it(self):
        run = simulate(10, {"a": Node(0.01, errors=[Overloaded("full")] * 99), LOCAL: Node(0.01)})
        assert run.run() < 1.0

    def test_an_error_here_is_raised(self):
        error = RemoteError("Wrong", "here")
        with pytest.raises(RemoteError, match="here"):
            simulate(10, {LOCAL: Node(0.01, errors=[error])}).run()

    def test_a_call_ends_once(self):
        plan = a_plan(10)
        plan.list_nodes(["a"], 0.0)
        (flight,) = plan.hand_out(0.0)
        assert plan.succeed(flight, 1.0)
        with pytest.raises(ValueError, match="before"):
            plan.succeed(flight, 2.0)

    def test_a_part_of_a_chunk_keeps_its_history(self):
        chunk = Chunk(10, 20, tried={"a"}, errors=1)
        rest = chunk.split(4)
        assert (chunk.start, chunk.stop, rest.start, rest.stop) == (10, 14, 14, 20)
        assert (rest.tried, rest.errors) == ({"a"}, 1)
        rest.tried.add("b")
        assert chunk.tried == {"a"}

    @settings(max_examples=300, deadline=None)
    @given(data=st.data(), total=st.integers(1, 400), has_local=st.booleans())
    def test_each_item_has_one_result_or_the_batch_an_error(self, data, total, has_local):
        """Whatever fails; and it ends."""
        error = st.sampled_from(
            [
                None,
                None,
                NodeDown("x"),
                Overloaded("x"),
                DeadlineExceeded("x"),
                RemoteError("E", "x"),
            ]
        )
        node = st.builds(
            Node,
            st.floats(0.001, 5.0),
            joins_at=st.sampled_from([0.0, 0.0, 3.0]),
            dies_at=st.sampled_from([float("inf"), 2.0, 30.0]),
            errors=st.lists(error, max_size=8),
        )
        made = data.draw(st.lists(node, max_size=5))
        nodes = {f"n{number}": each for number, each in enumerate(made)}
        run = simulate(total, {**nodes, LOCAL: Node(0.01)} if has_local else nodes, timeout_s=20.0)
        if has_local:
            run.run()
            return
        try:
            run.run()
        except (NodeDown, Overloaded, DeadlineExceeded, RemoteError):
            assert max(run.answers) <= 1
