"""Servings when something of ours, or of the process, breaks: nobody is left waiting."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest
from serving_helpers import LIMIT_S, Held, in_child, until

from hornbeam_ml import ModelError, Serving, ServingClosed, register_model, streams
from hornbeam_ml.models import get_model
from hornbeam_ml.serving import bisection, calls, queue, runner
from hornbeam_ml.serving.policy import Policy
from hornbeam_ml.serving.queue import BatchQueue


def once(function, fault, *, after=False):
    """Return a stand-in that raises at its first call, instead of the function or after it."""
    armed = [True]

    def broken(*args, **kwargs):
        if armed and not after:
            armed.clear()
            raise fault
        result = function(*args, **kwargs)
        if armed:
            armed.clear()
            raise fault
        return result

    return broken


PLACES = [
    pytest.param((bisection, "_try", False), id="before the model"),
    pytest.param((BatchQueue, "settle", False), id="before finishing"),
    pytest.param((BatchQueue, "settle", True), id="after finishing"),
    pytest.param((queue, "wake", False), id="before waking"),
    pytest.param((Policy, "cut", False), id="before the batch is taken"),
    pytest.param((Policy, "cut", True), id="after the batch was taken"),
    pytest.param((BatchQueue, "_cut", True), id="after the batch was counted"),
]


@pytest.mark.parametrize("fault", [RuntimeError("ours"), MemoryError(), SystemExit()], ids=repr)
@pytest.mark.parametrize("place", PLACES)
def test_a_fault_of_ours_finishes_everybody_and_the_serving_goes_on(
    callers, monkeypatch, place, fault
):
    """Whatever place breaks: each caller gets its result or an error, and the next call works."""
    owner, name, after = place
    with Serving(lambda: Held(), batch_size=2) as serving:
        serving.start()
        monkeypatch.setattr(owner, name, once(getattr(owner, name), fault, after=after))
        made = [callers.run(serving, item) for item in range(6)]
        for item, call in enumerate(made):
            error = call.exception(LIMIT_S)
            assert isinstance(error, ModelError) if error else call.result() == 2 * item
        monkeypatch.undo()
        assert callers.run_batch(serving, range(9)).result(LIMIT_S) == list(range(0, 18, 2))
        until(lambda: serving.ready, "it is ready again")


def test_a_serving_that_keeps_breaking_stops_and_says_why(callers, monkeypatch):
    """It is not ready then, and later calls get the reason."""

    def broken(*args):
        raise RuntimeError("ours")

    with Serving(lambda: list, name="broken") as serving:
        monkeypatch.setattr(runner, "run_batch", broken)
        for _ in range(4):
            assert isinstance(callers.run(serving, 1).exception(LIMIT_S), ModelError)
        until(lambda: not serving.ready, "it stops")

        def closed():
            return isinstance(callers.run(serving, 1).exception(LIMIT_S), ServingClosed)

        until(closed)
        with pytest.raises(ServingClosed, match=r"'broken' stopped .*RuntimeError\('ours'\)"):
            callers.run(serving, 1).result(LIMIT_S)


def test_a_fault_while_a_stream_is_replaced_leaves_nobody_waiting(callers, monkeypatch):
    """No thread can be started any more."""
    with Serving(lambda: Held(), batch_size=1) as serving:
        serving.start()
        monkeypatch.setattr(bisection, "_try", once(bisection._try, RuntimeError("ours")))
        monkeypatch.setattr(runner, "Stream", once(runner.Stream, RuntimeError("no more threads")))
        made = [callers.run(serving, item) for item in range(4)]
        for call in made:
            assert isinstance(call.exception(LIMIT_S), ModelError | ServingClosed)
        assert not serving.ready
        with pytest.raises(ServingClosed, match="no more threads"):
            callers.run(serving, 1).result(LIMIT_S)


def test_a_stream_that_cannot_be_started_fails_the_load_and_leaves_nothing(callers, monkeypatch):
    """The second of three: no thread of the first is left, and the next try works."""
    made = []

    def scarce(*args, **kwargs):
        made.append(1)
        if len(made) == 3:
            raise RuntimeError("can't start new thread")
        return streams.Stream(*args, **kwargs)

    def threads():
        return [thread for thread in threading.enumerate() if "scarce" in thread.name]

    monkeypatch.setattr(runner, "Stream", scarce)
    with Serving(lambda: list, streams=3, name="scarce") as serving:
        assert "can't start new thread" in str(callers.run(serving, 1).exception(LIMIT_S))
        until(lambda: not threads(), "its threads end")
        assert callers.run(serving, 1).result(LIMIT_S) == 1
        until(lambda: serving.ready)
        assert len(threads()) == 3


def test_a_callback_that_ends_its_thread_stops_nobody_else(monkeypatch, held):
    """SystemExit from a future's callback comes up in the stream's thread."""

    def leave(future):
        raise SystemExit

    with Serving(lambda: held) as serving:
        first = serving.submit(0)
        held.started(1)
        made = [serving.submit(item) for item in range(1, 4)]
        made[0].add_done_callback(leave)
        held.open()
        assert [call.result(LIMIT_S) for call in [first, *made]] == [0, 2, 4, 6]
        assert serving.run(5) == 10


async def test_a_loop_that_was_closed_stops_nobody_else(held):
    """Its tasks are gone; the others of their batch get their results."""
    async with Serving(lambda: held) as serving:
        first = serving.submit(0)
        await asyncio.to_thread(held.started, 1)
        loop = asyncio.new_event_loop()
        gone = loop.create_task(serving.arun(1))
        await asyncio.to_thread(loop.run_until_complete, asyncio.sleep(0))
        mine = asyncio.create_task(serving.arun(2))
        await asyncio.to_thread(until, lambda: serving.stats().queued == 2)
        gone._log_destroy_pending = False
        loop.close()
        held.open()
        assert await mine == 4
        assert await asyncio.wrap_future(first) == 0
    gone.get_coro().close()


def test_a_dropped_serving_serves_what_it_was_given_and_ends(held):
    serving = Serving(lambda: held)
    first = serving.submit(0)
    held.started(1)
    second = serving.submit(1)
    gone = weakref.ref(serving)
    del serving
    gc.collect()
    assert gone() is None
    held.open()
    assert [first.result(LIMIT_S), second.result(LIMIT_S)] == [0, 2]

    def threads():
        return [thread for thread in threading.enumerate() if "serving-" in thread.name]

    until(lambda: not threads(), "its threads end")


def test_a_dropped_serving_that_is_idle_ends():
    def threads():
        return [thread for thread in threading.enumerate() if "dropme" in thread.name]

    with Serving(lambda: list, name="dropme") as named:
        named.start()
        assert threads()
    until(lambda: not threads())
    unnamed = Serving(lambda: list, streams=3)
    unnamed.start()
    collected = weakref.ref(unnamed._local._runner)
    del unnamed
    gc.collect()
    until(lambda: collected() is None, "runner and threads are gone")


def test_calls_leave_nothing_for_the_collector(callers):
    """Items and results may be large: they go when the call is over."""

    class Item:
        def __mul__(self, other):
            return other

        __rmul__ = __mul__

    with Serving(lambda: lambda batch: [item * 2 for item in batch], batch_size=2) as serving:
        serving.run(1)
        gc.collect()
        gc.disable()
        try:
            items = [Item() for _ in range(5)]
            alive = weakref.WeakSet(items)
            serving.run_batch(items)
            future = serving.submit(items[0])
            future.result(LIMIT_S)
            del items, future
            until(lambda: not alive, "the items are gone")
        finally:
            gc.enable()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_loads_its_own_and_nobody_waits_for_the_parents(held):
    loads = []

    def load():
        loads.append(1)
        return held if len(loads) == 1 else list

    with Serving(load) as serving:
        running = serving.submit(1)
        held.started(1)
        waiting = serving.submit(2)

        def uses():
            told = [type(future.exception(LIMIT_S)).__name__ for future in (running, waiting)]
            return [*told, serving.run(7), len(loads)]

        assert in_child(uses) == str(["ServingClosed", "ServingClosed", 7, 2])
        held.open()
        assert [running.result(LIMIT_S), waiting.result(LIMIT_S)] == [2, 4]
    assert loads == [1]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_while_every_lock_is_held_does_not_hang_the_child(held):
    """Another thread of the parent may have held any of them."""
    with Serving(lambda: held) as serving:
        running = serving.submit(1)
        held.started(1)
        inner = serving._local._runner
        locks = [inner.queue._lock, inner._lock, serving._local._lock, running._condition._lock]
        for lock in locks:
            another = threading.Thread(target=lock.acquire)
            another.start()
            another.join(LIMIT_S)

        def uses():
            serving.close()
            return type(running.exception(LIMIT_S)).__name__

        child = in_child(uses)
        for lock in locks[:-1]:
            lock.release()
        running._condition = threading.Condition()
        held.open()
        assert child == "ServingClosed"


def test_closing_while_it_loads_finishes_who_waits_for_it(callers):
    gate = threading.Event()
    serving = Serving(lambda: gate.wait(LIMIT_S) and list)
    call = callers.run(serving, 1)
    until(lambda: serving.stats().queued == 1)
    told = []

    def start():
        try:
            serving.start()
        except ServingClosed as error:
            told.append(error)

    starting = threading.Thread(target=start)
    starting.start()
    serving.close(timeout=0.05)
    assert isinstance(call.exception(LIMIT_S), ServingClosed)
    starting.join(LIMIT_S)
    assert len(told) == 1
    gate.set()


def test_a_load_that_asks_for_a_model_or_another_serving(callers):
    register_model("inner", lambda: 2)
    with Serving(lambda: lambda batch: [item + 1 for item in batch]) as inner:

        def load():
            factor = get_model("inner")
            inner.start()
            return lambda batch: [factor * item for item in inner.run_batch(batch)]

        with Serving(load) as outer:
            assert callers.run(outer, 1).result(LIMIT_S) == 4


def test_one_instance_that_fails_to_load_fails_the_serving(callers):
    loads = []

    def load():
        loads.append(1)
        if len(loads) == 2:
            raise ValueError("the second")
        return list

    with Serving(load, instances=2) as serving:
        with pytest.raises(ModelError, match="the second"):
            serving.start()
        assert not serving.ready
        serving.start()
        assert callers.run(serving, 1).result(LIMIT_S) == 1
    assert len(loads) == 4


def test_a_listener_that_is_too_far_behind_is_told(monkeypatch):
    monkeypatch.setattr(calls, "MOST_CHUNKS", 3)
    done = threading.Event()

    def count(batch):
        for number in range(9):
            yield [number] * len(batch)
        done.set()

    with Serving(lambda: count) as serving:
        chunks, other = serving.stream("slow"), serving.stream("slow too")
        until(lambda: serving.stats().running == 0 and serving.stats().batches)
        assert [next(chunks) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(Exception, match="3 chunks behind"):
            next(chunks)
        other.close()
