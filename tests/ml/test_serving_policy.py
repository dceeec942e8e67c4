"""When a batch closes and what goes into it: tables, and a clock that is set by hand."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hornbeam_ml.serving.policy import Policy


@dataclass(eq=False)
class Item:
    """A waiting item."""

    name: str
    lane: str = "a"
    arrived: float = 0.0
    deadline: float = inf
    heads_batch: bool = False
    length: int = 1

    def __repr__(self):
        return self.name


def filled(policy, *calls):
    """Let calls arrive: (time, lane, names) each."""
    for now, lane, names in calls:
        items = [Item(name, lane, now) for name in names]
        policy.arrange(items)
        for item in items:
            policy.add(item, now)
    return policy


def batches(policy, now):
    """Take all batches that are ready."""
    taken = []
    while batch := policy.cut(now).batch:
        taken.append("".join(item.name for item in batch))
    return taken


@pytest.mark.parametrize(
    ("timer", "calls", "now", "expected", "ready_at"),
    [
        pytest.param(0, [], 0, [], inf, id="nothing waits"),
        pytest.param(0, [(0, "a", "x")], 0, ["x"], inf, id="no timer: at once"),
        pytest.param(0, [(0, "a", "xy"), (1, "a", "z")], 1, ["xyz"], inf, id="what came together"),
        pytest.param(0, [(0, "a", "pqrstuv")], 0, ["pqr", "stu", "v"], inf, id="a large call is split"),
        pytest.param(0, [(0, "a", "x"), (0, "a", "pqr")], 0, ["xpq", "r"], inf, id="no timer: filled up"),
        pytest.param(0, [(0, "a", "x"), (1, "b", "y"), (2, "a", "z")], 2, ["xz", "y"], inf, id="lanes in order of arrival"),
        pytest.param(0, [(0, "a", "pqrs"), (1, "b", "y")], 1, ["pqr", "s", "y"], inf, id="the oldest item goes first"),
        pytest.param(5, [(0, "a", "x")], 4, [], 5, id="timer: not yet"),
        pytest.param(5, [(0, "a", "x")], 5, ["x"], inf, id="timer: now"),
        pytest.param(5, [(0, "a", "x"), (4, "a", "y")], 5, ["xy"], inf, id="from the first of the lane"),
        pytest.param(5, [(0, "a", "xy"), (1, "a", "z")], 1, ["xyz"], inf, id="timer: full"),
        pytest.param(5, [(0, "a", "pqrs")], 0, ["pqr"], 5, id="timer: the rest waits for its own"),
        pytest.param(5, [(0, "a", "x"), (1, "a", "pqr")], 1, ["x", "pqr"], inf, id="a full call is not split"),
        pytest.param(5, [(0, "a", "x"), (1, "a", "pqrs")], 1, ["xpq"], 6, id="a larger one is"),
        pytest.param(5, [(0, "a", "x"), (1, "b", "pqr")], 1, ["pqr"], 5, id="only its own lane"),
        pytest.param(5, [(0, "a", "x"), (1, "b", "pqr"), (2, "a", "yz")], 2, ["pqr", "xyz"], inf, id="ready lanes in order"),
        pytest.param(5, [(0, "b", "x"), (1, "a", "y")], 9, ["x", "y"], inf, id="timers in order"),
        pytest.param(5, [(0, "a", "x"), (4, "b", "pqr")], 9, ["pqr", "x"], inf, id="full before its timer"),
        pytest.param(5, [(0, "a", "wx"), (1, "a", "pqr"), (2, "a", "y")], 2, ["wx", "pqr"], 7, id="behind a full call"),
    ],
)  # fmt: skip
def test_which_batches_are_ready(timer, calls, now, expected, ready_at):
    policy = filled(Policy(3, timer), *calls)
    assert batches(policy, now) == expected
    assert policy.ready_at() == ready_at


def test_a_ready_lane_keeps_growing_until_a_stream_is_free():
    policy = filled(Policy(3, 5), (0, "a", "x"))
    assert policy.ready_at() == 5
    filled(policy, (6, "a", "y"))
    assert batches(policy, 7) == ["xy"]


def test_an_item_that_leaves_changes_when_the_rest_is_ready():
    policy = filled(Policy(3, 5), (0, "a", "x"), (1, "a", "yz"))
    first = next(iter(policy))
    assert policy.ready_at() == 1
    assert policy.remove(first)
    assert not policy.remove(first)
    assert (len(policy), policy.ready_at()) == (2, 6)


def test_a_head_that_leaves_joins_what_it_would_have_parted():
    policy = filled(Policy(2, 5), (0, "a", "x"), (1, "a", "pq"))
    assert policy.ready_at() == 1
    policy.remove([*policy][1])
    assert batches(policy, 5) == ["xq"]


def test_items_that_are_too_late_are_set_aside():
    policy = Policy(2, 0)
    for name, deadline in (("x", 3), ("y", 9), ("z", 3), ("w", inf)):
        policy.add(Item(name, deadline=deadline), 0)
    cut = policy.cut(3)
    assert (str(cut.batch), str(cut.late)) == ("[y, w]", "[x, z]")
    assert len(policy) == 0


def test_when_all_are_too_late_the_next_lane_gets_its_turn():
    policy = Policy(2, 0)
    policy.add(Item("x", "a", 0, deadline=1), 0)
    policy.add(Item("y", "b", 1), 1)
    cut = policy.cut(2)
    assert (str(cut.batch), str(cut.late)) == ("[y]", "[x]")


def test_hastened_it_waits_for_no_timer():
    policy = filled(Policy(3, 5), (0, "a", "x"))
    policy.hasten()
    assert batches(policy, 0) == ["x"]


events = st.lists(
    st.tuples(
        st.sampled_from("aaabc"),
        st.integers(1, 5),
        st.floats(0, 3),
        st.sampled_from([inf, inf, 2.0]),
        st.sampled_from(["wait", "wait", "cut", "remove"]),
    ),
    max_size=40,
)


@given(events, st.integers(1, 4), st.sampled_from([0.0, 1.0, 5.0]))
def test_nothing_is_lost_doubled_mixed_or_too_large(arrivals, batch_size, timer):
    """Whatever comes and goes: each item leaves once, with its lane, in order, at a time allowed."""
    policy, now, waiting, left = Policy(batch_size, timer), 0.0, {}, []

    def cut():
        due = policy.ready_at()
        batch, late = policy.cut(now)
        assert not batch or due <= now
        assert len(batch) <= batch_size
        assert len({item.lane for item in batch}) <= 1
        assert all(item.deadline <= now for item in late)
        assert all(item.deadline > now for item in batch)
        for item in [*batch, *late]:
            left.append(item)
            del waiting[item]
        if batch:
            rest = [item for item in waiting if item.lane == batch[0].lane]
            assert all(batch[-1].arrived <= item.arrived for item in rest)
        return batch or late

    for lane, size, pause, allowance, action in arrivals:
        now += pause
        items = [Item("i", lane, now, now + allowance) for _ in range(size)]
        policy.arrange(items)
        for item in items:
            policy.add(item, now)
            waiting[item] = None
        if action == "cut":
            cut()
        elif action == "remove":
            gone = next(iter(waiting))
            assert policy.remove(gone)
            del waiting[gone]
        assert len(policy) == len(waiting)
        assert set(policy) == set(waiting)
        assert (policy.ready_at() == inf) == (not waiting)
    now += timer
    while cut():
        pass
    assert not waiting
    assert policy.ready_at() == inf
