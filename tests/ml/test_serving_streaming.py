"""Streaming models: each caller gets its own chunks, of its own length, in order."""

from __future__ import annotations

import asyncio
import gc
import threading

import numpy as np
import pytest
from serving_helpers import LIMIT_S, until

from hornbeam_ml import DONE, DeadlineExceeded, ModelError, Overloaded, Serving, ServingClosed


class Counting:
    """A streaming model: an item n gets n chunks (n, 0), (n, 1) and so on. Its steps can be held.

    Args:
        hold: Let every step wait for a `release`.
    """

    def __init__(self, *, hold=False):
        self.batches = []
        self.steps = 0
        self.closed = threading.Event()
        self._hold = hold
        self._permits = threading.Semaphore(0)

    def __call__(self, batch):
        return self._count(batch)

    def _count(self, batch):
        self.batches.append(list(batch))
        try:
            for step in range(max(batch)):
                if self._hold:
                    assert self._permits.acquire(timeout=LIMIT_S)
                self.steps += 1
                yield [(item, step) if step < item else DONE for item in batch]
        finally:
            self.closed.set()

    def release(self, steps=1):
        self._permits.release(steps)


class AsyncCounting(Counting):
    """The same as an async generator."""

    async def _count(self, batch):
        for step in super()._count(batch):
            await asyncio.sleep(0)
            yield step


def chunks(item):
    return [(item, step) for step in range(item)]


@pytest.mark.parametrize("kind", [Counting, AsyncCounting])
def test_a_caller_gets_its_chunks_and_then_the_end(callers, kind):
    with Serving(kind) as serving:
        assert callers.stream(serving, 5).result(LIMIT_S) == chunks(5)
        assert callers.stream(serving, 1).result(LIMIT_S) == chunks(1)


@pytest.mark.parametrize("kind", [Counting, AsyncCounting])
def test_callers_merged_in_one_batch_get_their_own_chunks(callers, kind):
    model = kind(hold=True)
    with Serving(lambda: model) as serving:
        first = callers.stream(serving, 1)
        until(lambda: model.batches)
        merged = [callers.stream(serving, item) for item in (3, 7, 5)]
        until(lambda: serving.stats().queued == 3)
        model.release(100)
        assert first.result(LIMIT_S) == chunks(1)
        assert [call.result(LIMIT_S) for call in merged] == [chunks(3), chunks(7), chunks(5)]
    assert sorted(model.batches[1]) == [3, 5, 7]


def test_chunks_come_as_they_are_made(callers):
    model = Counting(hold=True)
    with Serving(lambda: model) as serving:
        some = callers.stream_some(serving, 9, 2)
        model.release(2)
        assert some.result(LIMIT_S) == chunks(9)[:2]
        model.release(100)


def test_one_that_stops_listening_does_not_stop_the_other(callers):
    model = Counting(hold=True)
    with Serving(lambda: model) as serving:
        first = callers.stream(serving, 1)
        until(lambda: model.batches)
        leaves, stays = callers.stream_some(serving, 9, 1), callers.stream(serving, 4)
        until(lambda: serving.stats().queued == 2)
        model.release(2)
        assert leaves.result(LIMIT_S) == [(9, 0)]
        model.release(100)
        assert [first.result(LIMIT_S), stays.result(LIMIT_S)] == [chunks(1), chunks(4)]


@pytest.mark.parametrize("kind", [Counting, AsyncCounting])
def test_when_nobody_listens_any_more_the_generator_is_closed(callers, kind):
    """Its stream is free for others, long before the last step."""
    model = kind(hold=True)
    with Serving(lambda: model) as serving:
        some = callers.stream_some(serving, 10_000, 1)
        model.release()
        some.result(LIMIT_S)
        model.release()
        assert model.closed.wait(LIMIT_S)
        assert model.steps <= 3
        model.release(100)
        assert callers.stream(serving, 2).result(LIMIT_S) == chunks(2)


def test_a_dropped_iterator_stops_listening():
    model = Counting(hold=True)
    with Serving(lambda: model) as serving:
        listening = serving.stream(10_000)
        model.release()
        assert next(listening) == (10_000, 0)
        waiting = serving.stream(3)
        del listening, waiting
        gc.collect()
        model.release(2)
        assert model.closed.wait(LIMIT_S)
    assert model.batches == [[10_000]]


async def test_a_cancelled_listener_stops_listening():
    model = Counting(hold=True)

    async def listen():
        async for _ in serving.astream(10_000):
            pass

    async with Serving(lambda: model) as serving:
        task = asyncio.create_task(listen())
        await asyncio.to_thread(until, lambda: model.batches)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        model.release(2)
        assert await asyncio.to_thread(model.closed.wait, LIMIT_S)
        assert serving.stats().cancelled == 1


def test_an_error_in_the_middle_comes_after_the_chunks_before_it(callers):
    """What was handed out is not tried again."""
    tries = []

    def model(batch):
        tries.append(len(batch))
        yield [0] * len(batch)
        raise ValueError("in the middle")

    def listen(serving):
        found = []
        with pytest.raises(ValueError, match="in the middle"):
            found.extend(serving.stream(1))
        return found

    with Serving(lambda: model) as serving:
        assert isinstance(callers.stream(serving, 1).exception(LIMIT_S), ValueError)
        assert listen(serving) == [0]
    assert tries == [1, 1]


def test_an_error_before_the_first_chunk_fails_only_the_item_at_fault(callers):
    gate = threading.Event()

    def model(batch):
        if batch == [0]:
            gate.wait(LIMIT_S)
        if 3 in batch:
            raise ValueError("three")
        yield [[item] for item in batch]

    with Serving(lambda: model) as serving:
        first = callers.stream(serving, 0)
        until(lambda: serving.stats().running)
        calls = [callers.stream(serving, item) for item in range(1, 6)]
        until(lambda: serving.stats().queued == 5)
        gate.set()
        results = [call.exception(LIMIT_S) or call.result() for call in calls]
        assert first.result(LIMIT_S) == [[0]]
    assert str(results.pop(2)) == "three"
    assert results == [[[1]], [[2]], [[4]], [[5]]]


def test_a_step_with_the_wrong_number_of_chunks_is_an_error(callers):
    def model(batch):
        yield [1] * len(batch)
        yield [1] * (len(batch) + 1)

    with Serving(lambda: model) as serving:
        error = callers.stream(serving, 1).exception(LIMIT_S)
        assert isinstance(error, ModelError)
        assert "2 results for 1 items" in str(error)


def test_a_model_without_a_step_ends_at_once(callers):
    def model(batch):
        yield from ()

    with Serving(lambda: model) as serving:
        assert callers.stream(serving, 1).result(LIMIT_S) == []


def test_the_kind_of_call_has_to_fit_the_model(callers):
    with Serving(Counting) as serving:
        assert "stream()" in str(callers.run(serving, 1).exception(LIMIT_S))
        with pytest.raises(ModelError, match="generator"):
            serving.run_inline([1])
        assert callers.stream(serving, 2).result(LIMIT_S) == chunks(2)
    with Serving(lambda: list) as serving:
        assert "run()" in str(callers.stream(serving, 1).exception(LIMIT_S))
        assert callers.run(serving, 2).result(LIMIT_S) == 2


def test_a_deadline_ends_a_stream_after_the_chunks_that_came(callers):
    model = Counting(hold=True)
    with Serving(lambda: model) as serving:
        serving.start()
        assert isinstance(
            callers.stream(serving, 5, timeout_ms=30).exception(LIMIT_S), DeadlineExceeded
        )
        model.release(100)
        assert callers.stream(serving, 5, timeout_ms=10_000).result(LIMIT_S) == chunks(5)


def test_a_full_queue_refuses_at_the_call(callers):
    model = Counting(hold=True)
    with Serving(lambda: model, queue_limit=1) as serving:
        first = callers.stream(serving, 1)
        until(lambda: serving.stats().running)
        second = callers.stream(serving, 2)
        until(lambda: serving.stats().queued)
        with pytest.raises(Overloaded):
            serving.stream(3)
        model.release(100)
        assert [first.result(LIMIT_S), second.result(LIMIT_S)] == [chunks(1), chunks(2)]


def test_closing_ends_a_stream_that_does_not_end_with_an_error(callers):
    model = Counting(hold=True)
    serving = Serving(lambda: model)
    call = callers.stream(serving, 5)
    model.release(2)
    until(lambda: model.steps == 2)
    serving.close(timeout=0.05)
    assert isinstance(call.exception(LIMIT_S), ServingClosed)
    model.release(100)


def test_stacked_batches_stream_rows_of_arrays(callers):
    def model(batch):
        for step in range(2):
            yield batch + step

    options = {"collate": "stack", "batch_size": 4, "buckets": (4,), "warmup": np.zeros(2)}
    with Serving(lambda: model, **options) as serving:
        found = callers.stream(serving, np.ones(2)).result(LIMIT_S)
    assert [row.tolist() for row in found] == [[1, 1], [2, 2]]


def test_work_after_runs_on_each_chunk(callers):
    with Serving(Counting, postprocess=lambda chunk: chunk[1]) as serving:
        assert callers.stream(serving, 3).result(LIMIT_S) == [0, 1, 2]
