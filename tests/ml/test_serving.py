"""Servings: what callers get, and in which batches. Each test runs with threads and with tasks."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError

import numpy as np
import pytest
from serving_helpers import LIMIT_S, Held, answers, queued

from hornbeam_ml import (
    ModelError,
    Serving,
    apredict,
    predict,
)

# Batches


def test_one_item_of_one_caller_is_one_batch(callers, model):
    with Serving(lambda: model) as serving:
        assert callers.run(serving, 21).result(LIMIT_S) == 42
    assert model.batches == [[21]]


def test_a_full_batch_does_not_wait_for_the_timer(callers, model):
    """Two callers with two items each share a batch of four."""
    with Serving(lambda: model, batch_size=4, batch_timeout_ms=10_000) as serving:
        calls = [callers.run_batch(serving, [1, 2]), callers.run_batch(serving, [3, 4])]
        assert answers(calls) == [[2, 4], [6, 8]]
    assert model.sizes == [4]


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        pytest.param(6, [3, 3], id="two full batches"),
        pytest.param(5, [3, 2], id="a full one and the rest"),
    ],
)
@pytest.mark.parametrize("timer", [0, 20], ids=["no timer", "timer"])
def test_a_call_larger_than_a_batch_is_split_and_comes_back_in_order(
    callers, model, rows, sizes, timer
):
    with Serving(lambda: model, batch_size=3, batch_timeout_ms=timer) as serving:
        result = callers.run_batch(serving, range(rows)).result(LIMIT_S)
    assert result == [2 * row for row in range(rows)]
    assert model.sizes == sizes


def test_five_items_of_three_callers_are_three_batches_of_two(callers, held):
    with Serving(lambda: held, batch_size=2) as serving:
        calls = [callers.run_batch(serving, [0, 1])]
        held.started(1)
        for waiting, items in ((2, [2, 3]), (3, [4])):
            calls.append(callers.run_batch(serving, items))
            queued(serving, waiting)
        held.open()
        assert answers(calls) == [[0, 2], [4, 6], [8]]
    assert held.batches == [[0, 1], [2, 3], [4]]


def test_a_batch_is_what_came_together_while_the_one_before_ran(callers, held):
    """Without a timer nothing waits for company, and nobody who is there is left out."""
    with Serving(lambda: held) as serving:
        calls = [callers.run(serving, 0)]
        held.started(1)
        calls += [callers.run(serving, item) for item in range(1, 6)]
        queued(serving, 5)
        held.open()
        assert answers(calls) == [0, 2, 4, 6, 8, 10]
    assert held.sizes == [1, 5]


def test_a_call_of_a_full_batch_sends_those_before_it_first(callers, model):
    """With a timer the partial batch goes at once, and the call is not split."""
    with Serving(lambda: model, batch_size=3, batch_timeout_ms=60_000) as serving:
        first = callers.run(serving, 1)
        queued(serving, 1)
        second = callers.run_batch(serving, [7, 8, 9])
        assert answers([first, second]) == [2, [14, 16, 18]]
    assert model.batches == [[1], [7, 8, 9]]


def test_keys_have_batches_and_timers_of_their_own(callers):
    def double_or_half(batch, key):
        seen.append((key, list(batch)))
        return [item * 2 if key == "double" else item / 2 for item in batch]

    seen = []
    options = {"batch_keys": ["double", "half"], "batch_size": 3, "batch_timeout_ms": 60_000}
    with Serving(lambda: double_or_half, **options) as serving:
        with pytest.raises(ValueError, match=r"'triple'.*'double', 'half'"):
            callers.run(serving, 1, key="triple").result(LIMIT_S)
        waiting = callers.run_batch(serving, [1, 2], key="double")
        queued(serving, 2)
        assert callers.run_batch(serving, [2, 4, 6], key="half").result(LIMIT_S) == [1, 2, 3]
        assert not waiting.done()
        assert callers.run(serving, 3, key="double").result(LIMIT_S) == 6
        assert waiting.result(LIMIT_S) == [2, 4]
        assert serving.stats().keys["double"].items == 3
    assert seen == [("half", [2, 4, 6]), ("double", [1, 2, 3])]


def test_a_key_is_needed_where_there_are_keys_and_refused_where_there_are_none(callers, model):
    with (
        Serving(lambda: model, batch_keys=["a"]) as serving,
        pytest.raises(ValueError, match="'a'"),
    ):
        callers.run(serving, 1).result(LIMIT_S)
    with Serving(lambda: model) as serving, pytest.raises(ValueError, match="no batch_keys"):
        callers.run(serving, 1, key="a").result(LIMIT_S)
    assert model.batches == []


def test_batches_are_padded_to_buckets_and_trimmed(callers):
    seen = []

    def double(batch):
        seen.append(batch.shape)
        return batch * 2

    with Serving(lambda: double, collate="stack", batch_size=4, buckets=(4,)) as serving:
        rows = [np.full(3, number, np.float32) for number in range(6)]
        calls = [
            callers.run(serving, rows[0]),
            callers.run(serving, rows[1]),
            callers.run_batch(serving, rows[2:]),
        ]
        results = [*answers(calls[:2]), *calls[2].result(LIMIT_S)]
        assert serving.stats().padding > 0
    for number, result in enumerate(results):
        assert result.dtype == np.float32
        assert result.tolist() == [2.0 * number] * 3
    assert set(seen) == {(4, 3)}


def test_two_streams_run_two_batches_at_the_same_time(callers):
    both = threading.Barrier(2)

    def meet(batch):
        both.wait(LIMIT_S)
        return batch

    with Serving(lambda: meet, streams=2, batch_size=1) as serving:
        assert answers([callers.run(serving, item) for item in "ab"]) == ["a", "b"]


def test_instances_are_loaded_once_each_one_after_the_other(callers):
    loads, both = [], threading.Barrier(2)

    def load():
        number = len(loads)
        loads.append(threading.current_thread().name)

        def model(batch):
            both.wait(LIMIT_S)
            return [(item, number) for item in batch]

        return model

    with Serving(load, instances=2, device=["cpu", "cpu"], batch_size=1) as serving:
        serving.start()
        assert sorted(answers([callers.run(serving, item) for item in "ab"])) in (
            [("a", 0), ("b", 1)],
            [("a", 1), ("b", 0)],
        )
    assert len(set(loads)) == 2


# Errors


def test_only_the_item_at_fault_fails_and_nothing_that_succeeded_runs_again(callers, held):
    """The caller gets the original exception; its neighbours, and the next call, their results."""
    error, succeeded = ValueError("not five"), []

    def picky(batch):
        if batch == ["first"]:
            return held(batch)
        if 5 in batch:
            raise error
        succeeded.extend(batch)
        return [2 * item for item in batch]

    with Serving(lambda: picky) as serving:
        first = callers.run(serving, "first")
        held.started(1)
        calls = [callers.run(serving, item) for item in range(8)]
        queued(serving, 8)
        held.open()
        results = answers(calls)
        assert results.pop(5) is error
        assert results == [0, 2, 4, 6, 8, 12, 14]
        assert callers.run(serving, 9).result(LIMIT_S) == 18
        assert first.result(LIMIT_S) == "firstfirst"
        assert serving.stats().failed == 1
    assert sorted(succeeded) == [0, 1, 2, 3, 4, 6, 7, 9]


def test_an_error_of_the_backend_fails_the_batch_without_more_tries(callers, held):
    tries = []

    def lost(batch):
        if batch == [0]:
            return held(batch)
        tries.append(len(batch))
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with Serving(lambda: lost) as serving:
        calls = [callers.run(serving, 0)]
        held.started(1)
        calls += [callers.run(serving, item) for item in range(1, 9)]
        queued(serving, 8)
        held.open()
        first, *errors = answers(calls)
        assert first == 0
        assert {type(error) for error in errors} == {RuntimeError}
        assert len(set(map(id, errors))) == 8, "each caller has a traceback of its own"
    assert tries == [8]


def test_a_call_of_many_items_fails_with_the_first_and_drops_the_rest(callers):
    seen = []

    def picky(batch):
        seen.extend(batch)
        if 1 in batch:
            raise ValueError("one")
        return batch

    with Serving(lambda: picky, batch_size=2) as serving:
        assert str(callers.run_batch(serving, range(50)).exception(LIMIT_S)) == "one"
        assert callers.run(serving, "next").result(LIMIT_S) == "next"
    assert max(item for item in seen if item != "next") <= 3


@pytest.mark.parametrize(
    "returned",
    [
        pytest.param(lambda batch: batch[:-1], id="too few"),
        pytest.param(lambda batch: [*batch, 1], id="too many"),
        pytest.param(lambda batch: None, id="nothing"),
        pytest.param(lambda batch: dict.fromkeys(batch), id="a dict"),
        pytest.param(lambda batch: "ab", id="a str of the right length"),
    ],
)
def test_a_model_that_does_not_return_one_result_for_each_item(callers, returned):
    with Serving(lambda: returned) as serving:
        call = callers.run_batch(serving, [1, 2])
        assert isinstance(call.exception(LIMIT_S), ModelError)
        assert serving.stats().retries == 0


@pytest.mark.parametrize(
    "raised",
    [SystemExit, KeyboardInterrupt, StopIteration, CancelledError, asyncio.CancelledError],
)
def test_an_error_that_would_mean_something_to_the_caller_is_wrapped(callers, raised):
    def model(batch):
        raise raised

    with Serving(lambda: model) as serving:
        error = callers.run(serving, 1).exception(LIMIT_S)
        assert isinstance(error, ModelError)
        assert isinstance(error.__cause__, raised)


def test_a_wrong_shape_is_refused_to_that_caller_alone(callers, held):
    """Neighbours in the queue are not touched."""

    def add(batch):
        held(range(1))
        return batch + 1

    with Serving(lambda: add, collate="stack", warmup=np.zeros(2)) as serving:
        held.release()
        serving.start()
        good = callers.run(serving, np.ones(2))
        held.started(2)
        with pytest.raises(ValueError, match=r"shape \(3,\), expected .*shape \(2,\)"):
            callers.run(serving, np.ones(3)).result(LIMIT_S)
        with pytest.raises(ValueError, match="<f4"):
            callers.run(serving, np.ones(2, np.float32)).result(LIMIT_S)
        with pytest.raises(ValueError, match="found str"):
            callers.run(serving, "text").result(LIMIT_S)
        held.open()
        assert good.result(LIMIT_S).tolist() == [2, 2]


def test_without_a_warmup_the_first_success_is_the_template(callers, held):
    """Until then other shapes are batched apart, and afterwards they are refused."""
    shapes = []

    def add(batch):
        shapes.append(batch.shape)
        held(range(1))
        if batch.shape[1] == 1:
            raise ValueError("one is too short")
        return batch + 1

    with Serving(lambda: add, collate="stack") as serving:
        calls = []
        for waiting, size in enumerate((1, 2, 3, 2)):
            calls.append(callers.run(serving, np.zeros(size)))
            held.started(1)
            queued(serving, waiting)
        held.open()
        failed, first, other, second = answers(calls)
        assert isinstance(failed, ValueError)
        assert [first.tolist(), second.tolist()] == [[1, 1], [1, 1]]
        assert "expected array" in str(other)
        with pytest.raises(ValueError, match="expected"):
            callers.run(serving, np.zeros(3)).result(LIMIT_S)
    assert shapes == [(1, 1), (2, 2)]


# Kinds of models and calls


def test_coroutine_functions_run_on_the_stream(callers):
    """One event loop for all batches of a stream."""
    loops = []

    async def model(batch):
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return [2 * item for item in batch]

    async def load():
        await asyncio.sleep(0)
        return model

    with Serving(load) as serving:
        assert [callers.run(serving, item).result(LIMIT_S) for item in (1, 2)] == [2, 4]
    assert len(set(map(id, loops))) == 1


def test_work_before_and_after_runs_in_the_caller(callers):
    """Coroutine functions are awaited."""
    seen = []

    async def before(item):
        await asyncio.sleep(0)
        seen.append(threading.current_thread())
        return item + 1

    def after(result):
        return f"<{result}>"

    with Serving(lambda: Held(), preprocess=before, postprocess=after) as serving:
        assert callers.run(serving, 1).result(LIMIT_S) == "<4>"
        assert callers.run_batch(serving, [1, 2]).result(LIMIT_S) == ["<4>", "<6>"]
        assert serving.submit(3).result(LIMIT_S) == "<8>"
    assert not any("stream" in thread.name or "serving" in thread.name for thread in seen)


def test_an_error_of_the_work_before_or_after_is_the_callers(callers):
    def fail(item):
        raise LookupError(item)

    with Serving(lambda: list, postprocess=fail) as serving:
        assert isinstance(callers.run(serving, 1).exception(LIMIT_S), LookupError)
        assert isinstance(serving.submit(1).exception(LIMIT_S), LookupError)
    model = Held()
    with Serving(lambda: model, preprocess=fail) as serving:
        assert isinstance(callers.run(serving, 1).exception(LIMIT_S), LookupError)
    assert model.batches == []


async def test_a_blocking_call_on_the_thread_of_an_event_loop_works():
    """It blocks, and does not raise for being there; a coroutine model runs elsewhere."""

    async def model(batch):
        await asyncio.sleep(0)
        return batch

    with Serving(lambda: model) as serving:
        assert serving.run(1) == 1
        assert serving.run_inline([2]) == [2]
        assert list(map(serving.run, [3, 4])) == [3, 4]


def test_no_items_are_no_batch(callers, model):
    with Serving(lambda: model) as serving:
        assert callers.run_batch(serving, []).result(LIMIT_S) == []
    assert model.batches == []


def test_a_model_that_calls_its_own_serving_gets_an_error_and_no_deadlock(callers):
    with Serving(lambda: lambda batch: [serving.run(item) for item in batch]) as serving:
        error = callers.run(serving, 1).exception(LIMIT_S)
        assert "calls itself" in str(error)


def test_predict_finds_a_serving_by_name(callers, model):
    with Serving(lambda: model, name="double"):
        assert predict("double", 21) == 42
        assert predict("double", 21, where="local", inline=True) == 42
        with pytest.raises(ValueError, match="nowhere"):
            predict("double", 21, where="nowhere")
        with pytest.raises(ModelError, match=r"'triple'.*double"):
            predict("triple", 1)
    with pytest.raises(ModelError, match="'double'"):
        predict("double", 1)


async def test_predict_has_a_twin(model):
    async with Serving(lambda: model, name="double"):
        assert await apredict("double", 21) == 42
        assert await apredict("double", 21, inline=True) == 42
        with pytest.raises(ModelError):
            await apredict("triple", 1)


def test_a_name_that_is_taken_goes_to_the_new_serving():
    old = Serving(lambda: lambda batch: ["old"] * len(batch), name="same")
    with Serving(lambda: lambda batch: ["new"] * len(batch), name="same"):
        assert predict("same", 1) == "new"
        assert old.run(1) == "old"
        old.close()
        assert predict("same", 1) == "new"


def test_the_figures(callers, held):
    with Serving(lambda: held, name="figures", batch_size=4) as serving:
        assert serving.stats().batches == 0
        calls = [callers.run(serving, 0)]
        held.started(1)
        calls += [callers.run(serving, item) for item in range(1, 4)]
        queued(serving, 3)
        stats = serving.stats()
        assert (stats.name, stats.queued, stats.running) == ("figures", 3, 1)
        held.open()
        answers(calls)
        stats = serving.stats()
    assert (stats.batches, stats.items, stats.fill) == (2, 4, 0.5)
    assert stats.longest_wait_ms >= stats.wait_ms > 0
    assert stats.keys[None].items == 4
