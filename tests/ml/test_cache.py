"""Cached inference: one computation per cold key, exact counts, the same answer every time."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from hornbeam_ml import (
    acached_inference,
    cache_clear,
    cache_scope,
    cache_stats,
    cached_inference,
)
from hornbeam_state import CodecError, open_store, set_default_store


def counts(prefix=None):
    stats = cache_stats(prefix)
    return {name: stats[name] for name in ("hits", "misses", "coalesced", "errors")}


def ways(fn):
    """Call through the function and through its twin."""

    async def twin(*arguments, **options):
        return await acached_inference(*arguments, **options)

    return pytest.mark.parametrize(
        "infer",
        [
            pytest.param(cached_inference, id="sync"),
            pytest.param(lambda *a, **o: asyncio.run(twin(*a, **o)), id="async"),
        ],
    )(fn)


RESULTS = [
    pytest.param(np.arange(384, dtype=np.float32), id="float32"),
    pytest.param(np.asfortranarray(np.ones((3, 4), np.float16)), id="fortran order"),
    pytest.param(np.float32(1.5), id="numpy scalar"),
    pytest.param(np.array(5), id="0-d"),
    pytest.param(np.zeros((0, 3)), id="empty array"),
    pytest.param(None, id="None"),
    pytest.param(0, id="zero"),
    pytest.param([], id="empty list"),
    pytest.param((1, "a", b"b", {2}), id="tuple"),
    pytest.param({"scores": [0.1, 0.2], 3: None}, id="dict"),
]


@ways
@pytest.mark.parametrize("result", RESULTS)
def test_a_hit_returns_what_the_miss_returned(infer, result):
    """Type, dtype, shape and values are the same, and falsy results are cached too."""
    calls = []

    def fn(x):
        calls.append(x)
        return result

    miss, hit = infer(fn, 1), infer(fn, 1)
    assert calls == [1]
    assert type(miss) is type(hit) is type(result)
    np.testing.assert_array_equal(miss, hit)
    if isinstance(result, np.ndarray):
        assert (hit.dtype, hit.shape) == (result.dtype, result.shape)
        assert hit.flags.writeable
    assert counts() == {"hits": 1, "misses": 1, "coalesced": 0, "errors": 0}


def test_changing_a_result_in_place_changes_nobody_elses():
    """Every caller owns what it gets."""

    def fn(x):
        return np.zeros(3)

    first = cached_inference(fn, 1)
    first += 1
    second = cached_inference(fn, 1)
    second += 5
    np.testing.assert_array_equal(cached_inference(fn, 1), np.zeros(3))


@ways
def test_exceptions_are_raised_and_not_cached(infer):
    """A failed computation is tried again, and counted as an error."""
    attempts = []

    def fn(x):
        attempts.append(x)
        raise ZeroDivisionError("first")

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            infer(fn, 1)
    assert len(attempts) == 2
    assert counts() == {"hits": 0, "misses": 0, "coalesced": 0, "errors": 2}


@ways
def test_a_result_that_cannot_be_stored_is_returned_and_warned_about_once(infer):
    """Caching never stands in the way of an answer."""
    with pytest.warns(RuntimeWarning, match="cannot be cached") as caught:
        results = [infer(lambda x: object(), n) for n in range(3)]
    assert len(caught) == 1
    assert len(set(map(id, results))) == 3
    assert counts() == {"hits": 0, "misses": 0, "coalesced": 0, "errors": 3}


@ways
def test_an_input_that_cannot_be_keyed_is_an_error(infer):
    """Never a guess from its repr."""
    with pytest.raises(CodecError):
        infer(lambda x: x, object())


def test_a_result_expires(store):
    """A ttl in seconds bounds how long a result is remembered."""
    calls = []

    def fn(x):
        calls.append(x)
        return x

    cached_inference(fn, 1, ttl=0.05)
    deadline = time.monotonic() + 5
    while len(calls) < 2 and time.monotonic() < deadline:
        cached_inference(fn, 1, ttl=0.05)
    assert len(calls) == 2


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf")])
def test_a_ttl_that_makes_no_sense_is_refused(ttl):
    """Before anything is computed."""
    with pytest.raises(ValueError, match="ttl"):
        cached_inference(lambda x: pytest.fail("computed"), 1, ttl=ttl)


def test_threads_that_ask_for_one_cold_key_compute_once():
    """One leads, the others wait for it and are counted as coalesced."""
    calls, gate = [], threading.Event()

    def fn(x):
        calls.append(x)
        gate.wait(10)
        return [x]

    results = []
    threads = [
        threading.Thread(target=lambda: results.append(cached_inference(fn, 1))) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join()
    assert calls == [1]
    assert results == [[1]] * 16
    assert len(set(map(id, results))) == 16
    seen = counts()
    assert seen["misses"] == 1
    assert seen["hits"] + seen["coalesced"] == 15
    assert seen["errors"] == 0


async def test_tasks_that_ask_for_one_cold_key_compute_once():
    """Coroutine functions too, and each task is counted once."""
    calls = []

    async def fn(x):
        calls.append(x)
        await asyncio.sleep(0.01)
        return [x]

    cache_stats()  # opens the store: all look there before the first has computed
    results = await asyncio.gather(*(acached_inference(fn, 1) for _ in range(50)))
    assert calls == [1]
    assert results == [[1]] * 50
    assert counts() == {"hits": 0, "misses": 1, "coalesced": 49, "errors": 0}


async def test_a_plain_function_runs_in_a_thread_and_the_loop_goes_on():
    """A slow model does not hold up the event loop."""
    gate = threading.Event()
    asking = asyncio.gather(*(acached_inference(lambda x: gate.wait(10), 1) for _ in range(40)))
    await asyncio.sleep(0)
    gate.set()
    assert await asking == [True] * 40
    assert counts()["misses"] == 1


async def test_waiters_get_the_exception_the_leader_met():
    """In one process an exception is shared, not repeated."""
    calls = []

    async def fn(x):
        calls.append(x)
        await asyncio.sleep(0.01)
        raise ValueError("bad")

    cache_stats()  # opens the store: all look there before the first has failed
    results = await asyncio.gather(
        *(acached_inference(fn, 1) for _ in range(5)), return_exceptions=True
    )
    assert calls == [1]
    assert all(isinstance(one, ValueError) for one in results)
    assert counts()["errors"] == 5


async def test_a_cancelled_leader_leaves_nobody_hanging():
    """When the task that computes is cancelled, another takes over."""
    calls, started = [], asyncio.Event()

    async def fn(x):
        calls.append(x)
        started.set()
        await asyncio.sleep(30 if len(calls) == 1 else 0)
        return x

    leader = asyncio.create_task(acached_inference(fn, 1))
    await started.wait()
    waiters = [asyncio.create_task(acached_inference(fn, 1)) for _ in range(5)]
    await asyncio.sleep(0)
    leader.cancel()
    assert await asyncio.wait_for(asyncio.gather(*waiters), 5) == [1] * 5
    assert len(calls) == 2
    with pytest.raises(asyncio.CancelledError):
        await leader


async def test_a_cancelled_waiter_harms_nobody():
    """Cancelling one of those who wait ends neither the leader nor the others."""
    started = asyncio.Event()
    end = asyncio.Event()

    async def fn(x):
        started.set()
        await end.wait()
        return x

    leader = asyncio.create_task(acached_inference(fn, 1))
    await started.wait()
    first, second = (asyncio.create_task(acached_inference(fn, 1)) for _ in range(2))
    await asyncio.sleep(0.01)
    first.cancel()
    await asyncio.sleep(0.01)
    end.set()
    assert await asyncio.wait_for(asyncio.gather(leader, second), 5) == [1, 1]


async def test_a_cancelled_call_of_a_plain_function_still_keeps_its_result():
    """The thread goes on, its result is stored, waiters get it."""
    gate, started, calls = threading.Event(), threading.Event(), []

    def fn(x):
        calls.append(x)
        started.set()
        gate.wait(10)
        return x

    leader = asyncio.create_task(acached_inference(fn, 1))
    await asyncio.to_thread(started.wait, 10)
    waiter = asyncio.create_task(acached_inference(fn, 1))
    await asyncio.sleep(0.01)
    leader.cancel()
    await asyncio.sleep(0)
    gate.set()
    assert await asyncio.wait_for(waiter, 5) == 1
    assert calls == [1]


async def test_cancelling_before_a_thread_is_free_leaves_nobody_hanging():
    """Work that waits for a thread is done even when its caller is gone."""
    gate = threading.Event()
    blockers = [
        asyncio.create_task(acached_inference(lambda x: gate.wait(10), n)) for n in range(40)
    ]
    leader = asyncio.create_task(acached_inference(lambda x: x, "queued"))
    await asyncio.sleep(0.05)
    waiter = asyncio.create_task(acached_inference(lambda x: x, "queued"))
    await asyncio.sleep(0.05)
    leader.cancel()
    await asyncio.sleep(0)
    gate.set()
    assert await asyncio.wait_for(waiter, 5) == "queued"
    await asyncio.gather(*blockers)


@ways
def test_a_computation_that_asks_for_its_own_key_does_not_wait_for_itself(infer):
    """Recursion computes; it neither deadlocks nor is served stale."""
    depth = []

    def fn(x):
        depth.append(x)
        return cached_inference(fn, x) + 1 if len(depth) < 3 else 0

    assert infer(fn, 1) == 2


async def test_a_task_that_asks_for_its_own_key_does_not_wait_for_itself():
    """The same for coroutine functions."""
    depth = []

    async def fn(x):
        depth.append(x)
        return await acached_inference(fn, x) + 1 if len(depth) < 3 else 0

    assert await asyncio.wait_for(acached_inference(fn, 1), 5) == 2


async def test_a_blocking_call_on_the_loop_of_the_leader_does_not_deadlock():
    """A sync call on an event loop's thread works, and blocks."""

    async def fn(x):
        await asyncio.sleep(0.01)
        return x

    def plain(x):
        return x

    leader = asyncio.create_task(acached_inference(fn, 1, cache_key="same"))
    await asyncio.sleep(0)
    assert cached_inference(plain, 1, cache_key="same") == 1
    assert await leader == 1


def test_a_scope_counts_what_happens_inside_it():
    """This thread's calls, nested scopes included, others' not."""
    cached_inference(abs, -1)
    with cache_scope() as outer:
        cached_inference(abs, -1)
        with cache_scope() as inner:
            cached_inference(abs, -2)
        other = threading.Thread(target=lambda: cached_inference(abs, -3))
        other.start()
        other.join()
    cached_inference(abs, -1)
    assert (outer.hits, outer.misses, outer.coalesced, outer.errors) == (1, 1, 0, 0)
    assert (inner.hits, inner.misses) == (0, 1)


async def test_scopes_of_tasks_do_not_mix():
    """Two requests at once each see their own figures."""

    async def request(n):
        with cache_scope() as scope:
            for value in range(n):
                await acached_inference(abs, (-value - 1) * 1000 - n)
        return scope.misses + scope.hits + scope.coalesced

    assert await asyncio.gather(*(request(n) for n in (1, 5, 3))) == [1, 5, 3]


def test_figures_by_prefix_and_clearing_by_prefix():
    """A prefix has its own figures and is cleared alone; a longer one is not its part."""
    for prefix in ("a", "ab"):
        for value in (1, 2):
            cached_inference(abs, value, cache_prefix=prefix)
    cached_inference(abs, 1, cache_prefix="a")
    assert counts("a") == {"hits": 1, "misses": 2, "coalesced": 0, "errors": 0}
    assert cache_stats("a")["entries"] == 2
    assert cache_stats("a")["hit_rate"] == pytest.approx(1 / 3)
    assert cache_stats()["entries"] == 4
    assert cache_stats("none")["hit_rate"] == 0.0
    assert cache_clear("a") == 2
    assert cache_stats()["entries"] == 2
    assert cache_clear() == 2
    assert cache_stats()["misses"] == 4


def test_keys_of_the_app_and_of_the_cache_never_meet(store):
    """Clearing the cache leaves the app's keys alone and the other way round."""
    store.set("ml", 1)
    cached_inference(abs, -1)
    cache_clear()
    assert store.get("ml") == 1
    cached_inference(abs, -1)
    store.clear()
    assert cache_stats()["entries"] == 1


def test_without_a_store_calls_compute_and_are_counted_as_errors(tmp_path):
    """A store that cannot be opened costs the cache, not the answer."""
    (tmp_path / "file").write_text("")
    previous = set_default_store(open_store(f"lmdb://{tmp_path}/file/store"))
    try:
        assert cached_inference(abs, -1) == 1
        assert cached_inference(abs, -1) == 1
        with cache_scope() as scope:
            assert asyncio.run(acached_inference(abs, -1)) == 1
        assert scope.errors == 1
    finally:
        set_default_store(previous)


def test_a_damaged_entry_is_computed_anew(store):
    """Bytes that cannot be decoded are a miss."""
    cached_inference(abs, -1)
    results = store.backend.keyspace("cache")
    (name,) = results.keys()
    results.put(name, b"\xff\xff rubbish")
    assert cached_inference(abs, -1) == 1
    assert counts() == {"hits": 0, "misses": 2, "coalesced": 0, "errors": 0}
    assert cached_inference(abs, -1) == 1
    assert counts()["hits"] == 1


WORKER = """
import sys, time, json
from pathlib import Path
from hornbeam_ml import cached_inference

log = Path(sys.argv[1])

def slow(x):
    with log.open("a") as file:
        file.write(f"{x}\\n")
    time.sleep(0.05)
    return {"x": x}

print(json.dumps([cached_inference(slow, n % 10)["x"] for n in range(100)]))
"""


def test_processes_that_ask_for_one_cold_key_compute_once(tmp_path, store):
    """Six processes ask for ten cold keys at the same time: ten computations, exact counts."""
    log = tmp_path / "log"
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path.cwd()),
        "HORNBEAM_STORE": f"lmdb://{tmp_path}/store",
    }
    script = tmp_path / "app.py"
    script.write_text(WORKER)
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(script), str(log)],
            env={**environment, "PYTHONHASHSEED": str(n)},
            stdout=subprocess.PIPE,
        )
        for n in range(6)
    ]
    outputs = [json.loads(process.communicate()[0]) for process in processes]
    assert outputs == [[n % 10 for n in range(100)]] * 6
    assert sorted(map(int, log.read_text().split())) == list(range(10))
    seen = counts()
    assert seen["misses"] == 10
    assert seen["errors"] == 0
    assert sum(seen.values()) == 600


def test_when_the_computing_process_dies_another_computes(tmp_path, store):
    """A killed process frees its place at once."""
    script = (
        "import sys, time\nfrom hornbeam_ml import cached_inference\n"
        "def slow(x):\n print('computing', flush=True); time.sleep(60)\n"
        "cached_inference(slow, 1, cache_key='k')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env={
            **os.environ,
            "PYTHONPATH": str(Path.cwd()),
            "HORNBEAM_STORE": f"lmdb://{tmp_path}/store",
        },
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"computing\n"
    answer = []
    waiter = threading.Thread(
        target=lambda: answer.append(cached_inference(lambda x: "other", 1, cache_key="k"))
    )
    waiter.start()
    process.kill()
    process.wait()
    waiter.join(10)
    process.stdout.close()
    assert answer == ["other"]


def _child(queue):
    queue.put(cached_inference(abs, -7))


def test_a_fork_while_others_compute_leaves_the_child_free():
    """Flights of the parent's threads do not keep the child waiting."""
    gate, started = threading.Event(), threading.Event()

    def slow(x):
        started.set()
        gate.wait(20)
        return 7

    leader = threading.Thread(target=lambda: cached_inference(slow, -7))
    leader.start()
    started.wait(10)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    assert queue.get(timeout=10) == 7
    child.join()
    gate.set()
    leader.join()


@ways
def test_a_result_is_not_kept_when_what_computes_changes_meanwhile(infer):
    """Nobody knows whether the old one computed it or the new one."""
    box = {"w": 1, "retrain": True}

    def retrain():
        box.update(w=2, retrain=False)

    def fn(x):
        if box["retrain"]:
            retrain()
        return box["w"]

    assert infer(fn, 1) == 2
    box.update(w=1, retrain=False)
    assert infer(fn, 1) == 1
    box.update(w=1, retrain=True)
    assert infer(fn, 1) == 2
