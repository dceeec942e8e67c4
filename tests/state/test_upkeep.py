"""What keeps an embedded store in order: sweeping, eviction, snapshots, the check after a reboot."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from hornbeam_state import StoreConfig, StoreFull, StoreUnavailable, WrongType
from hornbeam_state.backends.directory import filesystem_of, prepare_directory
from hornbeam_state.backends.embedded.backend import EmbeddedBackend
from hornbeam_state.backends.embedded.eviction import Sketch
from hornbeam_state.testing import ManualClock


def wait_until(condition, what, timeout=20.0):
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout} s: {what}")
        time.sleep(0.01)


@pytest.fixture
def make(tmp_path):
    """Make backends over one directory; close them all at the end."""
    made = []

    def make(clock=time.time, **options):
        config = StoreConfig.from_url(f"lmdb://{tmp_path}/store", **options)
        made.append(EmbeddedBackend(config, clock=clock))
        return made[-1]

    yield make
    for backend in made:
        backend.close()


def rows(backend, space):
    """Count what the file holds, expired or not, records and entries of the index apart."""
    file = backend.opened().file(space)
    with file.environment.begin() as txn:
        return txn.stat(file.databases[space])["entries"], txn.stat(file.index)["entries"]


@pytest.mark.parametrize("space", ["app", "sys", "cache"])
def test_expired_keys_are_swept_and_others_stay(make, space):
    """A sweep removes records and index entries of what has expired, and nothing else."""
    clock = ManualClock()
    backend = make(clock)
    keys = backend.keyspace(space)
    for n in range(50):
        keys.put(b"short %d" % n, b"v", 1.0)
        keys.put(b"long %d" % n, b"v", 100.0)
        keys.put(b"for ever %d" % n, b"v")
    keys.put(b"x" * 2000, b"v", 1.0)
    clock.advance(2)
    assert backend.sweep(30) == 30
    while backend.sweep(30):
        pass
    assert rows(backend, space) == (100, 50)
    assert keys.get(b"long 1") == b"v"
    assert keys.get(b"for ever 1") == b"v"


def test_the_index_of_expiries_follows_every_change(make):
    """Replaced, cleared, counted and deleted keys leave no entry behind."""
    backend = make(ManualClock())
    keys = backend.keyspace("app")
    for _ in range(5):
        keys.put(b"a", b"v", 10.0)
        keys.cas(b"a", b"v", b"v", 20.0)
    assert rows(backend, "app") == (1, 1)
    keys.put(b"a", b"v")
    assert rows(backend, "app") == (1, 0)
    keys.incr(b"n", 1, 10.0)
    keys.incr(b"n", 1, 99.0)
    assert rows(backend, "app") == (2, 1)
    keys.delete(b"n")
    keys.put(b"b", b"v", 10.0)
    keys.clear(b"")
    assert rows(backend, "app") == (0, 0)


def test_keys_that_nobody_reads_again_go_by_themselves(make):
    """Upkeep sweeps in the background."""
    backend = make()
    keys = backend.keyspace("app")
    for n in range(500):
        keys.put(b"%d" % n, b"v", 0.01)
    wait_until(lambda: rows(backend, "app") == (0, 0), "the keys are swept")


SWEEP_UNTIL_KILLED = """
import sys, time
from hornbeam_state import open_store
store = open_store(sys.argv[1])
store.set("a", 1)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_another_process_takes_over_when_the_elected_one_is_killed(make, tmp_path):
    """The duty does not die with the process that had it."""
    process = subprocess.Popen(
        [sys.executable, "-c", SWEEP_UNTIL_KILLED, f"lmdb://{tmp_path}/store"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )
    assert process.stdout.readline() == b"ready\n"
    time.sleep(4)  # the other process is elected
    backend = make()
    keys = backend.keyspace("app")
    process.kill()
    process.wait()
    process.stdout.close()
    keys.put(b"b", b"v", 0.01)
    wait_until(lambda: rows(backend, "app") == (1, 0), "the survivor sweeps")


def test_the_cache_keeps_what_is_used_and_stays_within_its_file(make, tmp_path):
    """Often-used entries outlive a flood ten times the cache's size."""
    size = 8 * 1024 * 1024
    backend = make(cache_size=size)
    keys = backend.keyspace("cache")
    popular = [b"popular\x1f%064d" % n for n in range(100)]
    for key in popular:
        keys.put(key, b"p" * 1000)
    for n in range(60_000):
        keys.put(b"flood\x1f%064d" % n, b"f" * 1000)
        if n % 20 == 0:
            keys.get(popular[n // 20 % 100])
    kept = sum(keys.get(key) is not None for key in popular)
    assert kept >= 90
    usage = keys.usage()
    assert usage.bytes <= size
    assert usage.evictions + usage.entries == 60_100
    assert (tmp_path / "store" / "cache.lmdb").stat().st_size <= size


def test_values_of_many_sizes_fit_by_evicting(make, tmp_path):
    """A large value takes the place of many small ones."""
    size = 8 * 1024 * 1024
    keys = make(cache_size=size).keyspace("cache")
    for n in range(3000):
        keys.put(b"%d" % n, b"x" * (1_000_000 if n % 100 == 0 else 500))
    assert keys.get(b"2999") == b"x" * 500
    assert (tmp_path / "store" / "cache.lmdb").stat().st_size <= size


def test_old_fame_fades(tmp_path):
    """Estimates never fall short of the uses, and are halved now and then."""
    sketch = Sketch(tmp_path / "sketch")
    for _ in range(100):
        sketch.note(b"a")
    assert 100 <= sketch.estimate(b"a") <= 255
    sketch.age(1 << 30)
    assert sketch.estimate(b"a") == 50


def test_after_a_reboot_a_damaged_file_is_replaced_by_the_snapshot(make, tmp_path):
    """What the snapshot holds is there again, the damaged file is kept, and it is said loudly."""
    backend = make()
    keys = backend.keyspace("app")
    keys.put(b"a", b"in the snapshot")
    backend.opened().take_snapshot_if_changed()
    keys.put(b"b", b"after it")
    backend.close()
    directory = tmp_path / "store"
    (directory / "state.lmdb").write_bytes(b"\0" * 40960)
    (directory / "boot").write_text("another run of the machine")
    with pytest.warns(RuntimeWarning, match="snapshot"):
        assert keys.get(b"a") == b"in the snapshot"
    assert keys.get(b"b") is None
    keys.put(b"c", b"goes on")
    assert [path.stat().st_size for path in directory.glob("state.lmdb.damaged-*")] == [40960]


def test_after_a_reboot_a_sound_file_is_used_as_it_is(make, tmp_path):
    """Nothing is lost that did not have to be."""
    backend = make()
    keys = backend.keyspace("app")
    keys.put(b"a", b"1")
    backend.opened().take_snapshot_if_changed()
    keys.put(b"b", b"2")
    backend.close()
    (tmp_path / "store" / "boot").write_text("another run of the machine")
    assert keys.get_many([b"a", b"b"]) == [b"1", b"2"]


def test_after_a_reboot_without_a_snapshot_the_damage_is_refused(make, tmp_path):
    """There is nothing to fall back to; the file stays as it is."""
    backend = make()
    backend.keyspace("app").put(b"a", b"1")
    backend.close()
    (tmp_path / "store" / "boot").write_text("another run of the machine")
    (tmp_path / "store" / "state.lmdb").write_bytes(b"\0" * 40960)
    with pytest.raises(StoreUnavailable, match="no snapshot"):
        backend.keyspace("app").get(b"a")
    assert (tmp_path / "store" / "state.lmdb").read_bytes() == b"\0" * 40960


def test_a_damaged_cache_is_set_aside(make, tmp_path):
    """Cached results can be computed again; the state is untouched."""
    backend = make()
    backend.keyspace("app").put(b"a", b"1")
    backend.keyspace("cache").put(b"a", b"1")
    backend.close()
    (tmp_path / "store" / "cache.lmdb").write_bytes(b"rubbish" * 5000)
    with pytest.warns(RuntimeWarning, match="starts empty"):
        assert backend.keyspace("cache").get(b"a") is None
    assert backend.keyspace("app").get(b"a") == b"1"


def test_every_commit_can_wait_for_the_disk(make):
    """With durability=commit everything works as before, only slower."""
    backend = make(durability="commit")
    assert backend.keyspace("app").incr(b"n", 1) == 1
    assert backend.opened().state.environment.flags()["sync"]
    assert not backend.opened().cache.environment.flags()["sync"]


def test_a_store_in_use_by_another_container_is_refused(make, tmp_path):
    """Another pid namespace has other process ids for the same processes."""
    make().check()
    (tmp_path / "store" / "pid-namespace").write_text("pid:[1]")
    program = (
        "import sys\nfrom hornbeam_state import open_store, StoreUnavailable\n"
        "try:\n open_store(sys.argv[1]).check()\nexcept StoreUnavailable as e:\n print(e)\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", program, f"lmdb://{tmp_path}/store"],
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "another container" in told


def test_a_network_file_system_is_refused(tmp_path, monkeypatch):
    """The innermost mount decides."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"2 1 0:9 / {tmp_path}/net rw shared:1 - nfs4 server:/export rw\n"
        f"3 2 0:9 / {tmp_path}/net/with\\040space rw - tmpfs tmpfs rw\n"
    )
    assert filesystem_of(tmp_path / "other", mounts) == "ext4"
    assert filesystem_of(tmp_path / "net" / "store", mounts) == "nfs4"
    assert filesystem_of(tmp_path / "net" / "with space" / "a", mounts) == "tmpfs"
    monkeypatch.setattr("hornbeam_state.backends.directory.filesystem_of", lambda path: "nfs4")
    with pytest.raises(StoreUnavailable, match="network file system"):
        prepare_directory(StoreConfig.from_url(f"lmdb://{tmp_path}/store"))


LARGE = 300_000


def files_of(tmp_path, name="state"):
    """Return the files of large values, those under way too."""
    return sorted((tmp_path / "store" / f"{name}.blobs").iterdir())


@pytest.mark.parametrize("space", ["app", "cache"])
def test_large_values_lie_in_files_that_go_with_their_last_reference(make, tmp_path, space):
    """Two keys of one content share a file; it goes when both are gone."""
    name = "cache" if space == "cache" else "state"
    keys = make(cache_size=64 * 1024 * 1024).keyspace(space)
    value, other = os.urandom(LARGE), os.urandom(LARGE)
    keys.put_many({b"a": value, b"b": value, b"c" * 1000: other})
    assert keys.get_many([b"a", b"b", b"c" * 1000]) == [value, value, other]
    assert len(files_of(tmp_path, name)) == 2
    keys.put(b"a", value)
    keys.put(b"a", b"small")
    assert keys.get(b"b") == value
    keys.put_many({b"b": b"small", b"d": value})
    assert keys.get(b"d") == value
    keys.delete(b"d")
    keys.clear()
    assert files_of(tmp_path, name) == []
    assert keys.usage().bytes < LARGE


def test_large_values_take_part_in_everything(make, tmp_path):
    """Compare-and-set, expiry and counters treat them as any other value."""
    clock = ManualClock()
    backend = make(clock)
    keys = backend.keyspace("app")
    one, other = os.urandom(LARGE), os.urandom(LARGE)
    assert keys.add(b"a", one)
    assert not keys.cas(b"a", other, b"x")
    assert not keys.add(b"a", other)
    assert keys.cas(b"a", one, other, 10.0)
    assert keys.get(b"a") == other
    assert keys.ttl(b"a") == pytest.approx(10, abs=0.01)
    with pytest.raises(WrongType):
        keys.incr(b"a", 1)
    clock.advance(11)
    assert keys.get(b"a") is None
    backend.sweep()
    assert files_of(tmp_path) == []


def test_a_write_that_fails_leaves_no_file_and_the_old_value(make, tmp_path):
    """When the transaction is undone, so are its files."""
    keys = make(state_size=1024 * 1024).keyspace("app")
    value = os.urandom(LARGE)
    keys.put(b"a", value)
    with pytest.raises(StoreFull):
        keys.put_many(
            {b"a": os.urandom(LARGE)} | {b"%d" % n: os.urandom(200_000) for n in range(9)}
        )
    assert keys.get(b"a") == value
    assert len([path for path in files_of(tmp_path) if path.name.startswith(".")]) == 0


def test_readers_of_a_large_value_that_is_replaced_all_the_time_see_whole_values(make):
    """A reader that finds the file gone reads the record again."""
    keys = make().keyspace("app")
    values = [bytes([n]) * LARGE for n in range(4)]
    keys.put(b"a", values[0])
    stop = threading.Event()

    def write():
        n = 0
        while not stop.is_set():
            n += 1
            keys.put(b"a", values[n % 4])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(keys.get(b"a") in values for _ in range(300))
    finally:
        stop.set()
        writer.join()


def test_files_that_killed_writers_left_go_after_an_hour(make, tmp_path):
    """What nothing refers to is removed once nobody can be about to store it."""
    backend = make()
    keys = backend.keyspace("app")
    keys.put(b"a", os.urandom(LARGE))
    (kept,) = files_of(tmp_path)
    for name, age in ((".new-old", 7200), ("ab" * 32, 7200), (".new-young", 10)):
        path = kept.parent / name
        path.write_bytes(b"left")
        os.utime(path, (time.time() - age,) * 2)
    os.utime(kept, (time.time() - 7200,) * 2)
    keys.remove_abandoned()
    assert [path.name for path in files_of(tmp_path)] == sorted([".new-young", kept.name])


async def test_the_event_loop_is_not_held_up_by_large_values(make):
    """The twins write files in a thread."""
    keys = make().keyspace("app")
    value = os.urandom(LARGE)
    await keys.aput(b"a", value)
    assert await keys.acas(b"a", value, value * 2)
    assert await keys.aget(b"a") == value * 2


WRITE_AND_STOP = """
import os, signal, sys, time
from hornbeam_state.backends.embedded.backend import EmbeddedBackend
from hornbeam_state import StoreConfig
keys = EmbeddedBackend(StoreConfig.from_url(sys.argv[1])).keyspace("app")
def stop(txn):
    print("holding", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
keys._write(stop)
"""


@pytest.fixture
def stopped_writer(make, tmp_path):
    """A process that is stopped in the middle of a write."""
    backend = make()
    backend.check()
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_AND_STOP, f"lmdb://{tmp_path}/store"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )
    assert process.stdout.readline() == b"holding\n"
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # just after
    yield backend, process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_stopped_writer_makes_others_fail_and_not_hang(stopped_writer):
    """Writers fail within the timeout, readers and the cache do not notice."""
    backend, process = stopped_writer
    start = time.monotonic()
    with pytest.raises(StoreUnavailable, match="Nothing was written"):
        backend.keyspace("app").put(b"a", b"1")
    assert 0.9 < time.monotonic() - start < 20
    assert backend.keyspace("app").get(b"a") is None
    backend.keyspace("cache").put(b"a", b"1")
    os.kill(process.pid, signal.SIGCONT)
    wait_until(lambda: process.poll() is not None, "the writer ends")
    backend.keyspace("app").put(b"a", b"1")


def test_a_killed_writer_frees_its_place_at_once(make, stopped_writer):
    """The kernel passes the guard on."""
    _, process = stopped_writer
    process.kill()
    process.wait()
    start = time.monotonic()
    make(timeout=20).keyspace("app").put(b"a", b"1")
    assert time.monotonic() - start < 10


async def test_a_stopped_writer_does_not_hold_up_the_event_loop(make, stopped_writer):
    """The loop goes on while a thread waits for the guard."""
    backend, process = stopped_writer
    longest = 0.0

    async def watch():
        nonlocal longest
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - before)

    watching = asyncio.create_task(watch())
    waiting = asyncio.create_task(make(timeout=20).keyspace("app").aincr(b"n", 1))
    await asyncio.sleep(0.01)
    with pytest.raises(StoreUnavailable):
        await backend.keyspace("app").aincr(b"n", 1)
    assert not waiting.done()
    os.kill(process.pid, signal.SIGCONT)
    assert await waiting == 1
    watching.cancel()
    assert longest < 10


def test_threads_may_fork_at_the_same_time(make):
    """Telemetry of a library does, for one; none of them waits for ever."""
    backend = make()
    backend.opened()
    upkeep = backend.upkeep
    upkeep.hold()

    def fork():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if not pid:
            os._exit(0)
        os.waitpid(pid, 0)

    threads = [threading.Thread(target=fork, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)  # they wait for the upkeep
    upkeep.go_on()
    threads.append(threading.Thread(target=fork, daemon=True))
    threads[-1].start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
