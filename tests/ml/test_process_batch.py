"""Batches in threads of this process."""

from __future__ import annotations

import asyncio
import threading
from contextvars import ContextVar

import numpy as np
import pytest

from hornbeam_ml import ModelError, aprocess_batch, process_batch
from hornbeam_state import ConfigError

ITEMS = list(range(1000))
PATIENCE = 30


@pytest.fixture(params=["blocking", "awaited"])
def process(request):
    """Return both twins, to be called alike."""
    if request.param == "blocking":
        return process_batch
    return lambda *given, **options: asyncio.run(aprocess_batch(*given, **options))


def doubled(items):
    return [item * 2 for item in items]


@pytest.mark.parametrize(("size", "workers"), [(1, 4), (7, 1), (100, 4), (1000, 16), (5000, 2)])
def test_results_are_in_the_order_of_the_items(process, size, workers):
    assert process(ITEMS, doubled, batch_size=size, max_workers=workers) == doubled(ITEMS)


@pytest.mark.parametrize("items", [[], (), iter([]), np.zeros((0, 2))])
def test_nothing_in_nothing_out(process, items):
    assert process(items, doubled) == []


def test_batches_have_the_size_that_was_asked_for(process):
    sizes = []
    process(ITEMS, lambda batch: sizes.append(len(batch)) or batch, batch_size=300)
    assert sorted(sizes) == [100, 300, 300, 300]


def test_a_function_gets_a_list_and_of_an_array_a_part(process):
    kinds = set()
    note = lambda batch: kinds.add(type(batch)) or batch  # noqa: E731
    process((item for item in ITEMS), note)
    assert kinds == {list}
    rows = np.arange(12).reshape(6, 2)
    results = process(rows, lambda batch: batch * 2, batch_size=4)
    assert np.array_equal(np.stack(results), rows * 2)


def test_batches_run_at_the_same_time_and_no_more_than_asked_for(process):
    """Four meet; a fifth never is there."""
    meeting, lock, running, most = threading.Barrier(4), threading.Lock(), [0], [0]

    def meet(batch):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        meeting.wait(PATIENCE)
        with lock:
            running[0] -= 1
        return batch

    assert process(ITEMS[:80], meet, batch_size=10, max_workers=4) == ITEMS[:80]
    assert most[0] == 4


def test_an_exception_of_the_function_is_raised_and_nothing_more_begins(process):
    ran = []

    def fail(batch):
        ran.append(batch)
        raise KeyError(batch[0])

    with pytest.raises(KeyError):
        process(ITEMS, fail, batch_size=1, max_workers=1)
    assert ran == [[0]]


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        pytest.param(lambda batch: batch[1:], "99 results came back for 100 items", id="too few"),
        pytest.param(lambda batch: [*batch, 1], "101 results", id="too many"),
        pytest.param(lambda batch: "x" * len(batch), "not a str", id="text"),
        pytest.param(lambda batch: None, "not a NoneType", id="nothing"),
    ],
)
def test_another_number_of_results_is_an_error(process, fn, message):
    with pytest.raises(ModelError, match=message):
        process(ITEMS, fn)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"max_workers": 0}, {"batch_size": 1.5}])
def test_what_makes_no_sense_is_refused(process, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        process(ITEMS, doubled, **wrong)


def test_a_text_is_no_list_of_items(process):
    with pytest.raises(TypeError, match="list of items"):
        process("a text", doubled)


def test_the_caller_s_context_is_that_of_the_function(process):
    label = ContextVar("label", default="none")
    token = label.set("ours")
    try:
        assert set(process(ITEMS, lambda batch: [label.get()] * len(batch))) == {"ours"}
    finally:
        label.reset(token)


def test_no_thread_is_left(process):
    before = threading.active_count()
    process(ITEMS, doubled)
    for thread in threading.enumerate():
        if thread.name.startswith("hornbeam-process-batch"):
            thread.join(PATIENCE)
    assert threading.active_count() <= before


async def test_cancelled_it_lets_nothing_more_begin():
    began, gate, ran = threading.Event(), threading.Event(), []

    def wait(batch):
        ran.append(batch)
        began.set()
        gate.wait(PATIENCE)
        return batch

    task = asyncio.create_task(aprocess_batch(ITEMS, wait, batch_size=1, max_workers=1))
    await asyncio.to_thread(began.wait, PATIENCE)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.set()
    for thread in threading.enumerate():
        if thread.name.startswith("hornbeam-process-batch"):
            await asyncio.to_thread(thread.join, PATIENCE)
    assert ran == [[0]]
