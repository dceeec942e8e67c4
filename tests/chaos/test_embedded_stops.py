"""Writers of an embedded store that are stopped, and what others notice of it."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest
from processes import Child, Gate, state_of, wait_until

from hornbeam_state import StoreUnavailable, open_store

pytestmark = pytest.mark.slow

TIMEOUT = 0.5
LONGEST_LAG = 0.05


def stand_still(note, url: str, gate: Gate, where: str) -> int:
    """Stop between two writes or in the middle of one; then go on writing."""
    store = open_store(url)
    store.set("before", True)
    if where == "between":
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


async def lag_during(work) -> tuple[float, list]:
    """Run coroutines together; return how long the loop stood still at most, and what they did."""
    longest, done = 0.0, False

    async def tick() -> None:
        nonlocal longest
        while not done:
            before = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - before - 0.001)

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0.01)
    results = await asyncio.gather(*work, return_exceptions=True)
    done = True
    await ticking
    return longest, results


def write_on_a_loop(note, url: str, ready: Gate, tasks: int, *, opened: bool = True) -> dict:
    """Let many tasks write while another writer stands still; measure the loop and the calls."""

    async def main() -> dict:
        store = open_store(url, timeout=TIMEOUT)
        if opened:
            await store.acheck()
        note("ready")
        ready.wait()
        started = time.monotonic()
        work = [
            call
            for number in range(tasks // 4)
            for call in (
                store.aincr("n"),
                store.aset(f"k/{number}", number),
                store.acas("k", None, number),
                store.aset(f"large/{number}", bytes(70_000)),
            )
        ]
        lag, results = await lag_during(work)
        took = time.monotonic() - started
        closing, _ = await lag_during([store.aclose()])
        return {
            "lag": lag,
            "took": took,
            "closing": closing,
            "results": sorted({type(one).__name__ for one in results}),
        }

    return asyncio.run(main())


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("tasks", [4, 400])
def test_a_loop_runs_on_while_a_writer_is_stopped(url, stopped, tasks, opened, tell):
    ready = Gate()
    child = Child(lambda note: write_on_a_loop(note, url, ready, tasks, opened=opened))
    wait_until(child.notes, "it is ready")
    writer = stopped("within a write")
    ready.open()
    found = child.outcome()
    tell(found)
    ready.close()
    writer.kill()
