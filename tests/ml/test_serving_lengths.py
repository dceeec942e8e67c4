"""Batches of similar length, without threads: tables, and whatever comes in whatever order."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hornbeam_ml.serving.length_line import best_run, runs
from hornbeam_ml.serving.policy import Policy

numbers = count()


@dataclass(eq=False)
class Item:
    """A waiting item."""

    length: int
    arrived: float = 0.0
    deadline: float = inf
    lane: str = "a"
    heads_batch: bool = False
    number: int = field(default_factory=lambda: next(numbers))


def filled(policy, *arrivals):
    """Let items arrive, one by one: (time, lengths) each."""
    for now, lengths in arrivals:
        items = [Item(length, now) for length in lengths]
        policy.arrange(items)
        for item in items:
            policy.add(item, now)
    return policy


def batches(policy, now, streams=1):
    """Take all batches that are ready; return their lengths."""
    taken = []
    while batch := policy.cut(now, streams).batch:
        taken.append([item.length for item in batch])
    return taken


@pytest.mark.parametrize(
    ("lengths", "position", "size", "max_tokens", "expected"),
    [
        pytest.param([5], 0, 4, inf, [5], id="one"),
        pytest.param([5], 0, 4, 3, [5], id="too long, and alone"),
        pytest.param([5, 9], 1, 4, 8, [9], id="too long with a neighbour"),
        pytest.param([1, 2, 3], 1, 4, inf, [1, 2, 3], id="all"),
        pytest.param([1, 7, 8, 9], 2, 3, inf, [7, 8, 9], id="least padding"),
        pytest.param([7, 8, 9, 30], 1, 3, inf, [7, 8, 9], id="least padding below"),
        pytest.param([1, 2, 3, 4, 9], 4, 3, inf, [3, 4, 9], id="the one asked for is in it"),
        pytest.param([5, 5, 5, 5], 2, 8, 10, [5, 5], id="budget"),
        pytest.param([5, 5, 5, 10], 0, 8, 20, [5, 5, 5], id="more short ones before a long one"),
        pytest.param([1, 1, 1, 60], 3, 8, 64, [60], id="a long one does not drag others along"),
        pytest.param([3, 3, 4, 4], 1, 2, inf, [3, 3], id="equals"),
    ],
)  # fmt: skip
def test_the_best_run_of_lengths(lengths, position, size, max_tokens, expected):
    """It has the most lengths, then the least padding."""
    start, end = best_run(lengths, position, size, max_tokens)
    assert start <= position < end
    assert lengths[start:end] == expected


def padding(run):
    return len(run) * max(run) - sum(run)


budgets = st.one_of(st.just(inf), st.integers(1, 60))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.data(), st.integers(1, 6), budgets)
def test_no_run_is_better(lengths, data, size, max_tokens):
    """Compared with all of them."""
    lengths.sort()
    position = data.draw(st.integers(0, len(lengths) - 1))
    allowed = [lengths[position : position + 1]] + [
        run
        for start in range(position + 1)
        for end in range(position + 1, len(lengths) + 1)
        if len(run := lengths[start:end]) <= size and len(run) * run[-1] <= max_tokens
    ]
    start, end = best_run(lengths, position, size, max_tokens)
    found = lengths[start:end]
    assert start <= position < end
    assert found in allowed
    best = min((-len(run), padding(run)) for run in allowed)
    assert (-len(found), padding(found)) == best


@given(st.lists(st.integers(1, 20), max_size=30), st.integers(1, 6), budgets)
def test_runs_hold_everything_once_and_obey_the_limits(lengths, size, max_tokens):
    """In the order of lengths."""
    found = list(runs(lengths, size, max_tokens))
    assert sorted(index for run in found for index in run) == list(range(len(lengths)))
    assert [lengths[index] for run in found for index in run] == sorted(lengths)
    for run in found:
        longest = max(lengths[index] for index in run)
        assert len(run) == 1 or (len(run) <= size and len(run) * longest <= max_tokens)


@pytest.mark.parametrize(
    ("timer", "arrivals", "now", "expected", "ready_at"),
    [
        pytest.param(0, [(0, [9, 2, 8, 1])], 0, [[1, 2, 8, 9]], inf, id="all that wait, sorted"),
        pytest.param(0, [(0, [9]), (1, [1, 1, 1, 8])], 1, [[1, 1, 8, 9], [1]], inf, id="with the oldest"),
        pytest.param(0, [(0, [5]), (1, [1, 2, 6, 7, 30])], 1, [[2, 5, 6, 7], [1], [30]], inf, id="its nearest"),
        pytest.param(0, [(0, [40, 2, 2])], 0, [[40], [2, 2]], inf, id="within the budget"),
        pytest.param(0, [(0, [2, 99, 2])], 0, [[2, 2], [99]], inf, id="over the budget, alone"),
        pytest.param(5, [(0, [1, 2, 3])], 4, [], 5, id="timer: not yet"),
        pytest.param(5, [(0, [1, 2, 3])], 5, [[1, 2, 3]], inf, id="timer: now"),
        pytest.param(5, [(0, [1, 2]), (1, [3, 4])], 1, [[1, 2, 3, 4]], inf, id="full"),
        pytest.param(5, [(0, [15, 1])], 0, [], 5, id="a further one of these would fit"),
        pytest.param(5, [(0, [20]), (1, [20])], 1, [[20, 20]], inf, id="the budget is used up"),
        pytest.param(5, [(0, [99])], 0, [[99]], inf, id="more than the budget"),
        pytest.param(5, [(0, [1]), (1, [99])], 1, [], 5, id="full is the batch of the oldest"),
        pytest.param(5, [(0, [30]), (1, [1, 1])], 1, [[30]], 6, id="the rest waits for its own timer"),
    ],
)  # fmt: skip
def test_which_batches_are_ready(timer, arrivals, now, expected, ready_at):
    """Of at most 4 items and 48 tokens."""
    policy = filled(Policy(4, timer, 48), *arrivals)
    assert batches(policy, now) == expected
    assert policy.ready_at() == ready_at
    assert len(policy) == sum(len(lengths) for _, lengths in arrivals) - sum(map(len, expected))


@pytest.mark.parametrize(
    ("timer", "lengths", "streams", "expected"),
    [
        pytest.param(0, [1], 2, [[1]], id="one alone"),
        pytest.param(0, [1, 9], 2, [[1], [9]], id="one for each stream"),
        pytest.param(0, [1, 9, 2, 8], 2, [[1, 2], [9], [8]], id="a half each"),
        pytest.param(0, [4, 9, 5, 8], 4, [[4], [9], [5], [8]], id="a quarter each"),
        pytest.param(0, [9] * 12, 2, [[9] * 4, [9] * 4, [9] * 2, [9], [9]], id="at most a full batch"),
        pytest.param(1, [1, 9, 2, 8], 2, [[1, 2, 8, 9]], id="nothing with a timer"),
    ],
)  # fmt: skip
def test_streams_share_what_waits(timer, lengths, streams, expected):
    """Two that run at the same time are sooner done than one that runs everything."""
    policy = filled(Policy(4, timer, inf), (0, lengths))
    assert batches(policy, 1, streams) == expected


def test_calls_of_a_full_batch_are_not_kept_together():
    """Neighbours in length are better company than those of the same call."""
    policy = filled(Policy(2, 5, inf), (0, [1]), (0, [2, 9]))
    assert batches(policy, 5) == [[1, 2], [9]]


def test_items_that_are_too_late_are_set_aside():
    """The oldest that is not makes the batch."""
    policy = Policy(4, 0, inf)
    for length, deadline in ((1, 1), (9, inf), (8, 1), (2, inf)):
        policy.add(Item(length, deadline=deadline), 0)
    cut = policy.cut(1)
    assert [item.length for item in cut.batch] == [2, 9]
    assert [item.length for item in cut.late] == [1, 8]
    assert len(policy) == 0


def test_when_all_are_too_late_there_is_no_batch():
    """Nothing stays behind."""
    policy = Policy(4, 0, inf)
    policy.add(Item(3, deadline=1), 0)
    cut = policy.cut(1)
    assert (cut.batch, len(cut.late), len(policy)) == ([], 1, 0)


def test_an_item_that_leaves_takes_the_full_batch_with_it():
    """What is left waits for its timer again."""
    policy = filled(Policy(2, 5, inf), (0, [1]), (1, [2]))
    first, second = policy
    assert policy.ready_at() == 1
    assert policy.remove(second)
    assert not policy.remove(second)
    assert policy.ready_at() == 5
    assert policy.remove(first)
    assert policy.ready_at() == inf


def test_no_item_is_passed_over_by_more_batches_than_there_were_older_items():
    """A stream of short ones holds a long one up for as many batches as were before it."""
    policy = filled(Policy(8, 0, 64), (0, [3] * 20))
    long = Item(60, 1)
    policy.add(long, 1)
    passed = 0
    while long not in (batch := policy.cut(1).batch):
        assert batch
        passed += 1
        filled(policy, (1, [3] * 8))
    assert passed <= 20
    assert batch == [long]


arrivals = st.lists(
    st.tuples(st.lists(st.integers(1, 40), max_size=6), st.sampled_from("aab"), st.booleans()),
    max_size=30,
)


@given(arrivals, st.integers(1, 5), budgets, st.integers(1, 3), st.sampled_from([0.0, 2.0]))
def test_limits_hold_and_the_oldest_is_always_taken(plan, size, max_tokens, streams, timer):
    """Whatever comes, and however many leave."""
    policy, waiting = Policy(size, timer, max_tokens), []
    for now, (lengths, lane, cuts) in enumerate(plan):
        for length in lengths:
            waiting.append(Item(length, now, lane=lane))
            policy.add(waiting[-1], now)
        if not cuts and waiting:
            assert policy.remove(waiting.pop(len(waiting) // 2))
        due = policy.ready_at()
        batch, late = policy.cut(now, streams) if cuts else ([], [])
        assert not late
        if batch:
            assert due <= now
            lane_waiting = [item for item in waiting if item.lane == batch[0].lane]
            assert lane_waiting[0] in batch
            assert {item.lane for item in batch} == {batch[0].lane}
            longest = max(item.length for item in batch)
            assert len(batch) == 1 or (len(batch) <= size and len(batch) * longest <= max_tokens)
            assert timer or len(batch) <= -(-len(lane_waiting) // streams)
        waiting = [item for item in waiting if item not in batch]
        assert set(policy) == set(waiting)
        assert len(policy) == len(waiting)
    policy.hasten()
    assert sum(map(len, batches(policy, len(plan), streams))) == len(waiting)
