"""Many processes on one embedded store: started at once, killed at random, one after another."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from child_processes import PATIENCE, Child

import hornbeam_state
from hornbeam_state import StoreConfig, StoreUnavailable, open_store
from hornbeam_state.backends import directory


@pytest.fixture
def url(tmp_path):
    # Those who come may be many, and any of them be kept waiting by a busy machine.
    return f"lmdb://{tmp_path}/store?timeout=20"


@pytest.fixture
def store(url):
    """A store that is there already when others come."""
    store = open_store(url)
    store.check()
    yield store
    store.close()


def sealed(numbers: random.Random, size: int) -> bytes:
    """Return random bytes that begin with their own checksum."""
    content = numbers.randbytes(size)
    return hashlib.blake2b(content, digest_size=16).digest() + content


def is_whole(value: bytes) -> bool:
    return hashlib.blake2b(value[16:], digest_size=16).digest() == value[:16]


def test_increments_of_processes_all_count(store, url):
    """Four forked processes and one that forked them: each number is handed out once."""
    store.incr("n", 0)

    def count() -> list[int]:
        mine = open_store(url)
        return [mine.incr("n") for _ in range(2000)]

    children = [Child(count) for _ in range(4)]
    own = [store.incr("n") for _ in range(2000)]
    handed_out = own + [number for child in children for number in child.value()]
    assert sorted(handed_out) == list(range(1, 10_001))
    assert store.get("n") == 10_000


def test_increments_of_separate_programs_all_count(url):
    """Four interpreters that share nothing but the directory, one of them asynchronous."""
    script = (
        "import asyncio, sys, hornbeam_state as state\n"
        "async def count():\n"
        "    for _ in range(1000): await state.astate_incr('n')\n"
        "if sys.argv[1] == '0': asyncio.run(count())\n"
        "else:\n"
        "    for _ in range(1000): state.state_incr('n')\n"
    )
    place = str(Path(hornbeam_state.__file__).parent.parent)
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(number)],
            env={**os.environ, "HORNBEAM_STORE": url, "PYTHONPATH": place},
        )
        for number in range(4)
    ]
    assert [program.wait(PATIENCE) for program in programs] == [0] * 4
    store = open_store(url)
    assert store.get("n") == 4000
    store.close()


@pytest.mark.slow
def test_killed_writers_tear_nothing(store, url):
    """`kill -9` in the middle of writes, 15 rounds: whole values, exact counts, nobody waits."""
    numbers = random.Random(1)
    survivor = Child(outlive_killings, url)
    attempted = acknowledged = 0
    for turn in range(15):
        log_reader, log_writer = os.pipe()
        writers = [Child(write_until_killed, url, turn * 10 + i, log_writer) for i in range(3)]
        os.close(log_writer)
        before = store.get("n", 0)
        wait_for(lambda before=before: store.get("n", 0) > before + 2)  # they are at work
        time.sleep(numbers.uniform(0.0, 0.05))
        for writer in writers:
            writer.kill()
        with os.fdopen(log_reader, "rb") as file:
            log = file.read()
        attempted += log.count(b"?")
        acknowledged += log.count(b"!")
        start = time.monotonic()
        fresh = open_store(url, timeout=30)
        assert fresh.incr("after") == turn + 1
        assert time.monotonic() - start < 2, "a killed writer made another one wait"
        assert acknowledged <= fresh.get("n") <= attempted
        for space in (fresh, fresh.space("cache")):
            found = space.get_multi(space.keys("value/"))
            assert found
            assert all(is_whole(value) for value in found.values())
        pair = fresh.get_multi(["pair/a", "pair/b"])
        assert pair["pair/a"] == pair["pair/b"], "half of a set_multi is there"
    store.set("stop", True)
    done = survivor.value()
    assert done["count"] == store.get("survivor")
    assert done["longest_wait"] < 2, "a hang would be 30; a busy machine may take its time"


def write_until_killed(url: str, seed: int, log: int) -> None:
    """Write all kinds of things, noting each increment before and after."""
    numbers = random.Random(seed)
    mine = open_store(url, timeout=30)
    cache = mine.space("cache")
    while True:
        os.write(log, b"?")
        mine.incr("n")
        os.write(log, b"!")
        mine.set(f"value/{numbers.randrange(50)}", sealed(numbers, numbers.randrange(1, 9000)))
        number = numbers.random()
        mine.set_multi({"pair/a": number, "other": b"x" * 3000, "pair/b": number})
        cache.set(f"value/{numbers.randrange(2000)}", sealed(numbers, 500))
        mine.delete(f"value/{numbers.randrange(50)}")


def outlive_killings(url: str) -> dict[str, float]:
    """Go on counting until told to stop; tell how long the longest increment took."""
    mine = open_store(url, timeout=30)
    longest, count = 0.0, 0
    while not mine.get("stop"):
        start = time.monotonic()
        count = mine.incr("survivor")
        longest = max(longest, time.monotonic() - start)
    return {"longest_wait": longest, "count": count}


def test_a_reader_sees_whole_values_of_another_process(store, url, tmp_path):
    """However often 1.5 KB are replaced meanwhile."""
    store.set("value", sealed(random.Random(0), 1500))
    seen_many = tmp_path / "seen-many"

    def read() -> dict[str, int]:
        mine = open_store(url)
        seen, torn = set(), 0
        while not mine.get("stop"):
            value = mine.get("value")
            torn += not is_whole(value)
            seen.add(value[:16])
            if len(seen) == 21:
                seen_many.touch()
        return {"torn": torn, "seen": len(seen)}

    reader = Child(read)
    numbers = random.Random(1)
    start = time.monotonic()
    while (ran := time.monotonic() - start) < 1 or (ran < 20 and not seen_many.exists()):
        store.set("value", sealed(numbers, 1500))
    store.set("stop", True)
    result = reader.value()
    assert result["torn"] == 0
    assert result["seen"] > 20


@pytest.mark.slow
def test_short_lived_processes_leave_no_reader_slots(store, url):
    """A hundred in a row, ended in every way, half of them killed in the middle of a read."""

    def live_shortly(number: int) -> None:
        mine = open_store(url)
        mine.incr("n")
        if number % 4 == 0:
            mine.close()
        if number % 2:
            keyspace = mine.backend.keyspace("app")
            reading = keyspace._begin(keyspace._db)
            os.kill(os.getpid(), signal.SIGKILL)
            reading.abort()

    for number in range(100):
        Child(live_shortly, number).outcome(code=-signal.SIGKILL if number % 2 else 0)
    assert store.get("n") == 100
    assert Child(slots_in_use, url).value() < 10


def slots_in_use(url: str) -> int:
    mine = open_store(url)
    environment = mine.backend.opened().state.environment
    return len([line for line in environment.readers().splitlines() if line.split()[0].isdigit()])


def test_a_killed_reader_does_not_make_the_file_grow(store, url):
    """What it held back is given free again by some of the next 4,000 writes."""

    def die_reading() -> None:
        mine = open_store(url)
        mine.get("value")
        keyspace = mine.backend.keyspace("app")
        reading = keyspace._begin(keyspace._db)
        os.kill(os.getpid(), signal.SIGKILL)
        reading.abort()

    store.set("value", b"x" * 1500)
    Child(die_reading).outcome(code=-signal.SIGKILL)
    for number in range(5000):
        store.set("value", b"%d" % number * 300)
    size = (store.backend.directory / "state.lmdb").stat().st_size
    assert size < 64 * 1024 * 1024, f"one value of 1.5 KB takes {size:,} bytes"


@pytest.mark.parametrize("turn", range(3))
def test_processes_may_create_a_store_together(url, turn):
    """Thirty-two that are first at once all get it."""
    gate, open_gate = os.pipe()

    def come_first() -> int:
        os.read(gate, 1)
        mine = open_store(url)
        number = mine.incr("n")
        mine.space("cache").set(str(number), number)
        return number

    children = [Child(come_first) for _ in range(32)]
    os.write(open_gate, b"." * 32)
    outcomes = [child.outcome() for child in children]
    os.close(gate)
    os.close(open_gate)
    assert {outcome.error for outcome in outcomes} == {None}
    assert sorted(outcome.value for outcome in outcomes) == list(range(1, 33))
    store = open_store(url)
    assert store.get("n") == 32
    assert len(store.space("cache").keys()) == 32
    store.close()


def test_a_directory_may_be_created_under_anothers_hands(url, monkeypatch):
    """The other creator is done between the look for its marker and the look for strange files."""
    config = StoreConfig.from_url(url)
    exists = Path.exists
    others = []

    def exists_a_moment_ago(path: Path) -> bool:
        found = exists(path)
        if path.name == directory.FORMAT_FILE and not found and not others:
            others.append(path)
            Child(open_and_set, url).value()
        return found

    monkeypatch.setattr(Path, "exists", exists_a_moment_ago)
    assert directory.prepare_directory(config) == config.path
    assert others


def open_and_set(url: str) -> None:
    open_store(url).set("k", 1)


def test_processes_share_a_store_of_different_sizes(store, url):
    """A deploy that raises `state_size` does not break the workers that still run."""
    small = open_store(url, state_size=2 * 1024 * 1024)
    store.close()
    small.set("k", "old")

    def fill() -> None:
        large = open_store(url, state_size=64 * 1024 * 1024)
        large.set_multi({f"large/{number}": b"x" * 3000 for number in range(2000)})

    Child(fill).value()
    assert small.get("k") == "old"
    assert len(small.keys("large/")) == 2000
    small.set("k", "new")
    assert small.get("k") == "new"
    small.close()


def test_children_of_children_use_the_store(store):
    """Each generation opens its own."""

    def descend(depth: int) -> int:
        store.incr("n")
        below = Child(descend, depth - 1).value() if depth else 0
        return below + store.incr("n")

    assert store.get("n") is None
    assert Child(descend, 3).value() == 5 + 6 + 7 + 8
    assert store.incr("n") == 9


def test_a_stopped_reader_stops_nobody(store, url):
    """A process that stands still in the middle of a read holds up no writer."""
    store.set("value", b"x" * 1500)
    gate, ready = os.pipe()

    def stand_still() -> None:
        mine = open_store(url)
        mine.get("value")
        keyspace = mine.backend.keyspace("app")
        reading = keyspace._begin(keyspace._db)
        os.write(ready, b".")
        signal.pause()
        reading.abort()

    child = Child(stand_still)
    os.read(gate, 1)
    os.kill(child.pid, signal.SIGSTOP)
    start = time.monotonic()
    for number in range(200):
        store.set("value", number)
    assert time.monotonic() - start < 5
    child.kill()
    os.close(gate)
    os.close(ready)


@contextlib.contextmanager
def busy_writer(url: str):
    """Run a process that is nearly always within a write; it goes on whatever was done to it."""
    store = open_store(url, timeout=30)
    store.check()
    child = Child(write_until_told, url)
    wait_for(lambda: store.get("writes", 0) > 0)
    try:
        yield child
    finally:
        os.kill(child.pid, signal.SIGCONT)
        store.set("stop", True)
        writes = child.value()
        assert writes == store.get("writes")
        store.close()


def write_until_told(url: str) -> int:
    mine = open_store(url, timeout=30)
    many = {f"large/{number}": b"x" * 3000 for number in range(1000)}
    while not mine.get("stop"):
        mine.set_multi({**many, "writes": mine.get("writes", 0) + 1})
    return mine.get("writes")


def test_a_stopped_writer_makes_others_fail_in_time(url):
    """`StoreUnavailable` within the timeout, not a hang; when it goes on, so do they."""

    def stop_it_and_write(pid: int) -> dict[str, float]:
        limit_to(40)
        mine = open_store(url, timeout=0.2)
        mine.check()
        succeeded, failed, longest = 0, 0, 0.0
        while not failed:  # until it was stopped in the middle of a write
            os.kill(pid, signal.SIGSTOP)
            start = time.monotonic()
            try:
                mine.incr("others")
                succeeded += 1
            except StoreUnavailable:
                failed += 1
            longest = max(longest, time.monotonic() - start)
            assert mine.get("writes") > 0, "reading needs no writer"
            os.kill(pid, signal.SIGCONT)
        patient = open_store(url, timeout=20)
        patient.incr("others")
        return {"unexplained": patient.get("others") - succeeded - 1, "longest": longest}

    with busy_writer(url) as writer:
        found = Child(stop_it_and_write, writer.pid).value()
    assert found["unexplained"] == 0, "the write that failed was done after all"
    assert found["longest"] < 10


def test_a_store_opens_while_a_writer_is_stopped(url):
    """A new worker that waited for it without bound would never start."""

    def stop_it_and_open(pid: int) -> float:
        limit_to(40)
        longest = 0.0
        for _ in range(5):
            os.kill(pid, signal.SIGSTOP)
            start = time.monotonic()
            mine = open_store(url, timeout=0.2)
            with contextlib.suppress(StoreUnavailable):
                mine.check()
            longest = max(longest, time.monotonic() - start)
            os.kill(pid, signal.SIGCONT)
            writes = mine.get("writes")
            wait_for(lambda mine=mine, writes=writes: mine.get("writes") > writes)
            mine.close()
        return longest

    with busy_writer(url) as writer:
        assert Child(stop_it_and_open, writer.pid).value() < 10


def limit_to(seconds: float) -> None:
    """End this process, as one that hangs, after that time."""
    signal.setitimer(signal.ITIMER_REAL, seconds)


def test_a_stopped_writer_does_not_stop_an_event_loop(url):
    """A write that has to wait does so elsewhere; other tasks go on."""

    def stop_it_and_write(pid: int) -> float:
        limit_to(40)
        return asyncio.run(write_beside_ticks(url, pid))

    with busy_writer(url) as writer:
        longest = Child(stop_it_and_write, writer.pid).value()
    assert longest < 10, f"the loop stood still for {longest:.3f} s"


async def write_beside_ticks(url: str, pid: int) -> float:
    """Stop the writer until a write has to wait; return how long the loop stood still at most."""
    mine = open_store(url, timeout=20)
    mine.check()
    longest, waited = 0.0, False

    async def tick() -> None:
        nonlocal longest
        while not waited:
            before = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - before)

    ticks = asyncio.create_task(tick())
    while not waited:
        os.kill(pid, signal.SIGSTOP)
        writing = asyncio.create_task(mine.aincr("others"))
        await asyncio.wait([writing], timeout=0.3)
        waited = not writing.done()
        os.kill(pid, signal.SIGCONT)
        await writing
    await ticks
    return longest


def wait_for(condition) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
