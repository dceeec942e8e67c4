"""Servings: full queues, deadlines, cancellation, closing. With threads and with tasks."""

from __future__ import annotations

import asyncio
import threading

import pytest
from serving_helpers import LIMIT_S, answers, queued, until

from hornbeam_ml import (
    DeadlineExceeded,
    Overloaded,
    Serving,
    ServingClosed,
)

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


def submitted(serving, item, timeout_ms=20):
    """Submit with a deadline that does not pass before the item waits."""
    try:
        return serving.submit(item, timeout_ms=timeout_ms)
    except DeadlineExceeded:
        return submitted(serving, item, 2 * timeout_ms)


def test_a_future_with_a_deadline_is_finished_by_it(held):
    """Also when nobody looks, in the queue and while its batch runs."""
    with Serving(lambda: held, batch_size=1) as serving:
        serving.start()
        over, told = threading.Event(), []
        running = submitted(serving, 0)
        assert isinstance(running.exception(LIMIT_S), DeadlineExceeded)
        if not held.batches:  # it was too late to run
            serving.submit(0)
            held.started(1)
        waiting = submitted(serving, 1)
        waiting.add_done_callback(lambda future: (told.append(future.exception()), over.set()))
        assert over.wait(LIMIT_S)
        assert isinstance(told[0], DeadlineExceeded)
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
