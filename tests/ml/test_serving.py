"""Servings: what callers get, and in which batches. Each test runs with threads and with tasks."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError

import numpy as np
import pytest
from serving_helpers import LIMIT_S, Held, TaskCallers, ThreadCallers, until

from hornbeam_ml import (
    DeadlineExceeded,
    ModelError,
    Overloaded,
    Serving,
    ServingClosed,
    apredict,
    predict,
)
from hornbeam_ml.models import load_all
from hornbeam_state.errors import ConfigError


@pytest.fixture(params=[ThreadCallers, TaskCallers], ids=["threads", "tasks"])
def callers(request):
    """Callers of one kind."""
    made = request.param()
    yield made
    made.close()


@pytest.fixture
def model():
    """A model that is not held."""
    return Held()


@pytest.fixture
def held():
    """A model whose batches wait to be released; in the end all are."""
    made = Held(hold=True)
    yield made
    made.open()


def answers(futures):
    """Return results and errors."""
    return [future.exception(LIMIT_S) or future.result() for future in futures]


def queued(serving, count):
    """Wait until that many items wait."""
    until(lambda: serving.stats().queued == count, f"{count} queued, not {serving.stats()}")


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


# Bounds, deadlines, cancellation


def test_a_full_queue_refuses_at_once_and_serves_again_when_it_has_room(callers, held):
    with Serving(lambda: held, batch_size=2, queue_limit=3) as serving:
        calls = [callers.run(serving, 0)]
        held.started(1)
        calls += [callers.run(serving, item) for item in (1, 2, 3)]
        queued(serving, 3)
        with pytest.raises(Overloaded):
            callers.run(serving, 4).result(LIMIT_S)
        held.open()
        assert answers(calls) == [0, 2, 4, 6]
        assert callers.run(serving, 5).result(LIMIT_S) == 10
        assert serving.stats().refused == 1
    assert 4 not in held.seen


def test_a_call_larger_than_the_queue_feeds_itself_in(callers, held):
    with Serving(lambda: held, batch_size=2, queue_limit=3) as serving:
        call = callers.run_batch(serving, range(11))
        for started in range(1, 7):
            held.started(started)
            assert serving.stats().queued <= 3
            held.release()
        assert call.result(LIMIT_S) == [2 * item for item in range(11)]
    assert held.seen == list(range(11))


def test_a_deadline_that_passes_in_the_queue(callers, held):
    """The item is never run, and its place is free again."""
    with Serving(lambda: held, queue_limit=1) as serving:
        first = callers.run(serving, 0)
        held.started(1)
        with pytest.raises(DeadlineExceeded):
            callers.run(serving, 1, timeout_ms=20).result(LIMIT_S)
        with pytest.raises(DeadlineExceeded):
            callers.run(serving, 2, timeout_ms=0).result(LIMIT_S)
        last = callers.run(serving, 3)
        queued(serving, 1)
        held.open()
        assert answers([first, last]) == [0, 6]
        assert serving.stats().expired == 2
    assert held.seen == [0, 3]


def test_a_deadline_that_passes_while_the_batch_runs(callers, held):
    """The caller does not wait for a model that hangs; a late result is nobody's."""
    with Serving(lambda: held, deadline_ms=20) as serving:
        serving.start()
        with pytest.raises(DeadlineExceeded):
            callers.run(serving, 1).result(LIMIT_S)
        held.open()
        assert callers.run(serving, 2, timeout_ms=10_000).result(LIMIT_S) == 4


def test_a_future_cancelled_before_its_batch_starts_is_never_run(held):
    """It does not keep the batch from forming without it."""
    with Serving(lambda: held, queue_limit=2) as serving:
        first = serving.submit(0)
        held.started(1)
        cancelled, kept = serving.submit(1), serving.submit(2)
        assert cancelled.cancel()
        assert not first.cancel(), "it runs"
        last = serving.submit(3)
        held.open()
        assert answers([first, kept, last]) == [0, 4, 6]
        assert serving.stats().cancelled == 1
    assert held.batches == [[0], [2, 3]]


async def test_a_task_cancelled_before_its_batch_starts_is_never_run(held):
    async with Serving(lambda: held, queue_limit=1) as serving:
        first = asyncio.create_task(serving.arun(0))
        await asyncio.to_thread(held.started, 1)
        cancelled = asyncio.create_task(serving.arun(1))
        await asyncio.to_thread(queued, serving, 1)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert serving.stats().queued == 0
        last = asyncio.create_task(serving.arun(2))
        await asyncio.to_thread(queued, serving, 1)
        held.open()
        assert [await first, await last] == [0, 4]
    assert held.seen == [0, 2]


def test_a_future_with_a_deadline_is_finished_by_it(held):
    """Also when nobody looks, in the queue and while its batch runs."""
    with Serving(lambda: held, batch_size=1) as serving:
        over, told = threading.Event(), []
        running = serving.submit(0, timeout_ms=30)
        waiting = serving.submit(1, timeout_ms=20)
        waiting.add_done_callback(lambda future: (told.append(future.exception()), over.set()))
        assert over.wait(LIMIT_S)
        assert isinstance(told[0], DeadlineExceeded)
        assert isinstance(running.exception(LIMIT_S), DeadlineExceeded)
        held.open()
        assert serving.run(2) == 4
    assert 1 not in held.seen


# Closing


def test_close_without_draining_fails_those_who_wait_and_finishes_what_runs(callers, held):
    serving = Serving(lambda: held)
    running = callers.run(serving, 0)
    held.started(1)
    waiting = callers.run(serving, 1)
    queued(serving, 1)
    closing = threading.Thread(target=serving.close, kwargs={"drain": False})
    closing.start()
    with pytest.raises(ServingClosed):
        waiting.result(LIMIT_S)
    assert not running.done()
    held.open()
    closing.join(LIMIT_S)
    assert running.result(LIMIT_S) == 0
    with pytest.raises(ServingClosed):
        callers.run(serving, 2).result(LIMIT_S)
    serving.close()
    assert held.seen == [0]


def test_close_serves_those_who_wait_first(callers, held):
    """It does not wait for timers, and lets nobody in any more."""
    serving = Serving(lambda: held, batch_timeout_ms=60_000, batch_size=2)
    calls = [callers.run_batch(serving, [0, 1])]
    held.started(1)
    calls.append(callers.run(serving, 2))
    queued(serving, 1)
    closing = threading.Thread(target=serving.close)
    closing.start()
    until(lambda: serving.closed)
    held.open()
    closing.join(LIMIT_S)
    assert answers(calls) == [[0, 2], 4]


def test_a_batch_that_does_not_end_does_not_hold_up_closing(callers, held):
    """After the timeout everybody is told, those whose batch runs too."""
    serving = Serving(lambda: held)
    calls = [callers.run(serving, 0)]
    held.started(1)
    calls.append(callers.run(serving, 1))
    queued(serving, 1)
    serving.close(timeout=0.05)
    assert {type(error) for error in answers(calls)} == {ServingClosed}


def test_a_model_may_close_its_own_serving(callers):
    def model(batch):
        serving.close()
        return batch

    serving = Serving(lambda: model)
    assert callers.run(serving, 1).result(LIMIT_S) == 1
    with pytest.raises(ServingClosed):
        callers.run(serving, 1).result(LIMIT_S)


async def test_closing_has_a_twin(held):
    serving = Serving(lambda: held)
    held.open()
    assert await serving.arun(1) == 2
    await serving.aclose()
    with pytest.raises(ServingClosed):
        await serving.arun(1)


# Loading


def test_it_is_loaded_at_the_first_call_once(callers):
    loads = []
    with Serving(lambda: loads.append(1) or list) as serving:
        assert not serving.ready
        assert sorted(answers([callers.run(serving, item) for item in range(8)])) == list(range(8))
        assert serving.ready
    assert loads == [1]
    assert not serving.ready


def test_a_load_that_fails_says_why_to_everybody_and_is_tried_again(callers):
    attempts, gate = [], threading.Event()

    def load():
        attempts.append(1)
        assert gate.wait(LIMIT_S)
        if len(attempts) == 1:
            raise OSError("no such weights")
        return list

    with Serving(load, name="flaky") as serving:
        calls = [callers.run(serving, item) for item in range(3)]
        queued(serving, 3)
        gate.set()
        for error in answers(calls):
            assert isinstance(error, ModelError)
            assert "'flaky' failed to load: OSError: no such weights" in str(error)
            assert isinstance(error.__cause__, OSError)
        assert callers.run(serving, 1).result(LIMIT_S) == 1


@pytest.mark.parametrize("returned", [None, "text"], ids=["nothing", "no function"])
def test_a_load_has_to_return_a_function(callers, returned):
    with Serving(lambda: returned) as serving:
        assert "no function" in str(callers.run(serving, 1).exception(LIMIT_S))


def test_a_worker_loads_servings_too():
    """Registered models come first; a closed serving is left alone."""
    model = Held()
    with Serving(lambda: model, warmup=1, batch_keys="ab" and ["a", "b"]) as serving:
        Serving(lambda: 1 / 0).close()
        load_all()
        assert serving.ready
    assert list(zip(model.batches, model.keys, strict=True)) == [([1], "a"), ([1], "b")]


def test_the_warmup_goes_through_every_bucket_and_key_before_it_is_ready():
    shapes = []

    def model(batch, key):
        shapes.append((key, len(batch)))
        return batch

    options = {"buckets": (1, 2, 4), "batch_size": 4, "batch_keys": ["a", "b"]}
    with Serving(lambda: model, collate="stack", warmup=np.zeros(3), **options) as serving:
        serving.start()
        assert sorted(shapes) == [(key, size) for key in "ab" for size in (1, 2, 4)]
        assert serving.stats().batches == 0


def test_a_load_is_told_its_device():
    with Serving(lambda device: lambda batch: [device] * len(batch), device="cpu") as serving:
        assert serving.run(1) == "cpu"


async def test_starting_has_a_twin_that_does_not_hold_up_the_loop():
    gate = threading.Event()
    async with Serving(lambda: gate.wait(LIMIT_S) and list) as serving:
        with pytest.raises(DeadlineExceeded):
            await serving.astart(timeout=0.01)
        gate.set()
        await serving.astart()
        assert serving.ready


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"batch_size": 0}, "batch_size", id="no batch"),
        pytest.param({"streams": 0}, "streams", id="no stream"),
        pytest.param({"queue_limit": 1.5}, "queue_limit", id="half an item"),
        pytest.param({"batch_timeout_ms": -1}, "batch_timeout_ms", id="negative timer"),
        pytest.param({"deadline_ms": 0}, "deadline_ms", id="no time"),
        pytest.param({"collate": "pile"}, "collate", id="unknown way to collate"),
        pytest.param({"buckets": (32,)}, "collate='stack'", id="buckets for lists"),
        pytest.param({"collate": "stack", "buckets": (4, 2)}, "growing", id="unsorted buckets"),
        pytest.param({"collate": "stack", "buckets": (4,)}, "batch_size=32", id="small buckets"),
        pytest.param({"batch_keys": []}, "batch_keys", id="no keys"),
        pytest.param({"batch_keys": "ab"}, "batch_keys", id="a str for keys"),
        pytest.param({"device": "gpu"}, "cuda:1", id="unknown device"),
        pytest.param({"device": ["cpu"], "instances": 2}, "instances=2", id="too few devices"),
        pytest.param({"compile": "jax"}, "compile", id="unknown compiler"),
        pytest.param({"compile": "torch"}, "warmup", id="nothing to compile with"),
        pytest.param({"name": ""}, "name", id="empty name"),
        pytest.param({"preprocess": 1}, "preprocess", id="no function"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Serving(lambda: list, **options)


def test_something_to_load_is_needed():
    with pytest.raises(ConfigError, match="load"):
        Serving("model")


@pytest.mark.slow
def test_compiling_is_done_while_it_loads():
    """One graph for each bucket; no call pays for it."""
    torch = pytest.importorskip("torch")
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))

    def load():
        return torch.inference_mode()(model.forward)

    options = {"collate": "stack", "batch_size": 4, "buckets": (1, 4), "streams": 2}
    with Serving(load, compile="torch", warmup=torch.zeros(4), **options) as serving:
        serving.start()
        compiled = counters["stats"]["unique_graphs"]
        assert compiled == 2
        rows = torch.randn(7, 4)
        results = torch.stack(serving.run_batch(list(rows)))
        assert torch.allclose(results, model(rows), atol=1e-6)
        assert counters["stats"]["unique_graphs"] == compiled
