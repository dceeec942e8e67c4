"""Writers of an embedded store that are stopped, and what others notice of it."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time

import pytest
from processes import Child, Gate, state_of, wait_until

from hornbeam_state import StoreUnavailable, open_store

pytestmark = pytest.mark.slow

TIMEOUT = 0.5
LONGEST_LAG = 0.05
SLACK = 2.0
"""Seconds beyond the timeout that a busy machine may take."""


def stand_still(note, url: str, gate: Gate, where: str) -> int:
    """Stop between two writes or in the middle of one; then go on writing."""
    store = open_store(url)
    store.set("before", True)
    if where == "between writes":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        keys = store.backend.keyspace("app")
        keys._write(lambda _txn: os.kill(os.getpid(), signal.SIGSTOP))
    note("continued")
    gate.wait()
    return store.incr("n")


@pytest.fixture
def stopped(url):
    """Return what makes a process that stands still, and one that makes it go on."""
    gate = Gate()

    def make(where: str) -> Child:
        child = Child(stand_still, url, gate, where)
        wait_until(lambda: state_of(child.pid) == "T", "the writer stands still")
        return child

    make.gate = gate
    yield make
    gate.close()


async def lag_during(calls) -> tuple[float, list]:
    """Make calls together; return how long the loop stood still at most, and what they did."""
    longest, done = 0.0, False

    async def tick() -> None:
        nonlocal longest
        while not done:
            before = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - before - 0.001)

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0.01)
    results = await asyncio.gather(*calls, return_exceptions=True)
    done = True
    await ticking
    return longest, results


def call_on_a_loop(note, url: str, ready: Gate, tasks: int, *, opened: bool) -> dict:
    """Let many tasks write and read while another writer stands still; measure all of them."""

    async def main() -> dict:
        store = open_store(url, timeout=TIMEOUT)
        if opened:
            await store.acheck()
        note("ready")
        await asyncio.to_thread(ready.wait)
        calls = [
            call
            for number in range(tasks // 4)
            for call in (
                store.aincr("n"),
                store.aset(f"k/{number}", number),
                store.acas("k", None, number),
                store.aset(f"large/{number}", bytes(70_000)),
            )
        ]
        started = time.monotonic()
        lag, results = await lag_during(calls)
        took = time.monotonic() - started
        reading, found = (
            await lag_during([store.aget("before"), store.akeys()]) if opened else (0.0, [])
        )
        closing, _ = await lag_during([store.aclose()])
        return {
            "lag": max(lag, reading, closing),
            "took": took,
            "failed": sum(isinstance(one, StoreUnavailable) for one in results),
            "found": found[:1],
        }

    return asyncio.run(main())


@pytest.mark.parametrize("opened", [True, False], ids=["open", "not-open-yet"])
@pytest.mark.parametrize("tasks", [4, 400])
def test_a_loop_runs_on_while_a_writer_is_stopped(url, stopped, tasks, opened, tell):
    """All of its writes fail in time, and none holds it up, nor do opening and closing."""
    lags = []
    for _ in range(3):  # a machine may stand still by itself, but hardly three times
        ready = Gate()
        child = Child(lambda note: call_on_a_loop(note, url, ready, tasks, opened=opened))  # noqa: B023
        wait_until(child.notes, "it is ready")
        writer = stopped("within a write")
        ready.open()
        found = child.value()
        ready.close()
        writer.kill()
        assert found["failed"] == tasks
        assert found["found"] == ([True] if opened else [])
        assert found["took"] < TIMEOUT + SLACK
        lags.append(found["lag"])
        if min(lags) < LONGEST_LAG:
            break
    tell(
        f"the loop stood still for {min(lags) * 1000:.1f} ms at most; calls took {found['took']:.2f} s"
    )
    assert min(lags) < LONGEST_LAG


def open_with_threads(_note, url: str) -> float:
    """Let many threads use a store that cannot be opened; return how long the last one waited."""
    store = open_store(url, timeout=TIMEOUT)
    failures = []

    def use() -> None:
        try:
            store.incr("n")
        except StoreUnavailable as error:
            failures.append(error)

    threads = [threading.Thread(target=use) for _ in range(32)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == len(threads)
    return time.monotonic() - started


def test_threads_do_not_wait_for_each_others_attempts_to_open(url, stopped):
    """The last of thirty-two fails as soon as the first."""
    writer = stopped("within a write")
    assert Child(open_with_threads, url).value() < TIMEOUT + SLACK
    writer.kill()


@pytest.mark.parametrize("where", ["within a write", "between writes"])
def test_writers_go_on_when_the_stopped_one_does(url, stopped, where):
    """One that stands still between two writes is nobody's concern; both count afterwards."""
    store = open_store(url, timeout=TIMEOUT)
    store.check()
    writer = stopped(where)
    if where == "within a write":
        with pytest.raises(StoreUnavailable, match="Nothing was written"):
            store.incr("n")
    else:
        assert [store.incr("n") for _ in range(100)] == list(range(1, 101))
    before = store.get("n", 0)
    writer.send(signal.SIGCONT)
    wait_until(lambda: writer.notes() == ["continued"], "the writer goes on")
    assert store.incr("n") == before + 1
    stopped.gate.open()
    assert writer.value() == before + 2
    store.close()
