"""Locks of the embedded store: who gets them, who waits, and what frees them."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from child_processes import PATIENCE, Child, start_program

from hornbeam_state import HornbeamError, KeyTooLong, LockTimeout, open_store


@pytest.fixture
def url(tmp_path):
    # It is opened by many at once, each of whom may be kept waiting by a busy machine.
    return f"lmdb://{tmp_path}/store?timeout=10"


@pytest.fixture
def store(url):
    store = open_store(url)
    yield store
    store.close()


def is_free(store, name: str) -> bool:
    try:
        with store.lock(name, timeout=0):
            return True
    except LockTimeout:
        return False


def count_in_file(path, times: int, lock) -> None:
    """Add to a number in a file, with no protection but the lock."""
    for _ in range(times):
        with lock:
            number = int(path.read_text())
            time.sleep(0)
            path.write_text(str(number + 1))


# Mutual exclusion.


def test_threads_exclude_each_other(store, tmp_path):
    """With one lock object for all of them, and with one each."""
    path = tmp_path / "number"
    path.write_text("0")
    shared = store.lock("name")
    threads = [
        threading.Thread(target=count_in_file, args=(path, 15, shared if i % 2 else store.lock("name")))
        for i in range(6)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert path.read_text() == "90"


async def test_tasks_exclude_each_other(store):
    """One at a time is inside, although each lets others run there."""
    shared = store.lock("name")
    inside, most, done = 0, 0, 0

    async def work(lock) -> None:
        nonlocal inside, most, done
        for _ in range(5):
            async with lock:
                inside += 1
                most = max(most, inside)
                await asyncio.sleep(0)
                inside -= 1
                done += 1

    await asyncio.gather(*(work(shared if i % 2 else store.lock("name")) for i in range(8)))
    assert (most, done) == (1, 40)


async def test_tasks_and_threads_exclude_each_other(store, tmp_path):
    """Sync and async are two ways to one lock, also on the same lock object."""
    path = tmp_path / "number"
    path.write_text("0")
    lock = store.lock("name")

    async def work() -> None:
        for _ in range(10):
            async with lock:
                number = int(path.read_text())
                await asyncio.sleep(0)
                path.write_text(str(number + 1))

    await asyncio.gather(
        *(work() for _ in range(3)),
        *(asyncio.to_thread(count_in_file, path, 10, lock) for _ in range(3)),
    )
    assert path.read_text() == "60"


def test_processes_exclude_each_other(url, tmp_path):
    """A number in a plain file, counted under the lock by all of them, ends exact."""
    path = tmp_path / "number"
    path.write_text("0")

    def work() -> None:
        store = open_store(url)
        count_in_file(path, 25, store.lock("name"))

    for child in [Child(work) for _ in range(4)]:
        child.value()
    assert path.read_text() == "100"


def test_names_are_independent(store):
    """Any number may be held at once, also one name in two key spaces."""
    names = ["a", "b", "a/b", "ä", "\0", "x" * 4096, "x" * 4095]
    locks = [store.lock(name, timeout=0) for name in names]
    locks += [store.space("sys").lock(name, timeout=0) for name in names]
    for lock in locks:
        lock.__enter__()
    assert not any(is_free(store, name) for name in names)
    assert not any(is_free(store.space("sys"), name) for name in names)
    assert is_free(store.space("cache"), "a")
    for lock in locks:
        lock.__exit__(None, None, None)
    assert all(is_free(store, name) for name in names)


def test_a_lock_and_a_key_of_one_name_do_not_meet(store):
    """A held lock is no value, and clearing the store frees nothing."""
    with store.lock("name"):
        assert store.get("name") is None
        assert store.keys() == []
        store.set("name", 1)
        assert store.clear() == 1
        assert not is_free(store, "name")


# Waiting.


@pytest.mark.parametrize("timeout", [0, 0.0, 0.05, 0.2])
def test_a_wait_ends_at_its_timeout(store, timeout):
    """With `LockTimeout`, also a TimeoutError, that names the lock; not earlier, not never."""
    with store.lock("its-name"):
        start = time.monotonic()
        with (
            pytest.raises(LockTimeout, match="its-name") as caught,
            store.lock("its-name", timeout=timeout),
        ):
            pytest.fail("it was entered")  # fmt: skip
        took = time.monotonic() - start
    assert isinstance(caught.value, TimeoutError)
    assert isinstance(caught.value, HornbeamError)
    assert timeout <= took < timeout + 10


async def test_an_awaited_wait_ends_at_its_timeout(store):
    """And the loop runs meanwhile."""
    with store.lock("name"):
        waiting = asyncio.create_task(store.lock("name", timeout=PATIENCE).__aenter__())
        for _ in range(20):
            await asyncio.sleep(0.005)
        assert not waiting.done()
        waiting.cancel()
        with pytest.raises(LockTimeout):
            async with store.lock("name", timeout=0.1):
                pytest.fail("it was entered")


def test_a_free_lock_is_taken_without_waiting(store):
    """A timeout of 0 means "only if it is free"."""
    with store.lock("name", timeout=0):
        pass
    with store.lock("name", timeout=0), store.lock("other", timeout=0):
        pass


def test_a_waiter_gets_it_when_it_is_freed(store):
    """Soon after, with and without a timeout."""
    for timeout in (None, PATIENCE):
        entered = threading.Event()

        def wait(timeout=timeout, entered=entered) -> None:
            with store.lock("name", timeout=timeout):
                entered.set()

        with store.lock("name"):
            thread = threading.Thread(target=wait)
            thread.start()
            assert not entered.wait(0.05)
        assert entered.wait(10)
        thread.join(PATIENCE)


def test_a_lock_can_be_taken_again_and_again(store):
    """The same object, after success, failure and timeout."""
    lock = store.lock("name", timeout=0)
    for _ in range(50):
        with lock:
            pass
    with store.lock("name"), pytest.raises(LockTimeout):
        lock.__enter__()
    with lock:
        pass
    assert str(store.backend.directory / "locks") not in open_files("self")


def test_the_owner_is_not_let_in_twice(store):
    """It is not reentrant: the same object says so, another one waits like everyone."""
    lock = store.lock("name", timeout=0)
    with lock:
        with pytest.raises(RuntimeError, match="reentrant"), lock:
            pytest.fail("it was entered")
        with pytest.raises(LockTimeout), store.lock("name", timeout=0):
            pytest.fail("it was entered")
        assert not is_free(store, "name")
    assert is_free(store, "name")


async def test_the_owning_task_is_not_let_in_twice(store):
    """As for threads; other tasks of the thread wait."""
    lock = store.lock("name", timeout=0.05)

    async def other() -> str:
        try:
            async with lock:
                return "entered"
        except LockTimeout:
            return "waited"

    async with lock:
        with pytest.raises(RuntimeError, match="reentrant"):
            async with lock:
                pytest.fail("it was entered")
        assert await asyncio.create_task(other()) == "waited"
    assert await asyncio.create_task(other()) == "entered"


# What frees it.


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_frees_it(store, error):
    """And comes out as it is."""
    with pytest.raises(error, match="mine"), store.lock("name"):
        raise error("mine")
    assert is_free(store, "name")


async def test_an_exception_in_a_task_frees_it(store):
    """And comes out as it is."""
    with pytest.raises(ZeroDivisionError):
        async with store.lock("name"):
            raise ZeroDivisionError
    assert is_free(store, "name")


async def test_a_cancelled_holder_frees_it(store):
    """Cancellation goes on to whoever awaits the task."""
    entered = asyncio.Event()

    async def hold() -> None:
        async with store.lock("name"):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(hold())
    await entered.wait()
    assert not is_free(store, "name")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert is_free(store, "name")


async def test_a_cancelled_waiter_leaves_nothing_behind(store):
    """Neither a lock that is taken later, nor an object that thinks it is held."""
    lock = store.lock("name")

    async def wait() -> None:
        async with lock:
            pytest.fail("it was entered")

    async with store.lock("name"):
        waiters = [asyncio.create_task(wait()) for _ in range(5)]
        await asyncio.sleep(0.03)
        for task in waiters:
            task.cancel()
        results = await asyncio.gather(*waiters, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError] * 5
    assert is_free(store, "name")
    async with lock:
        pass


async def test_a_timeout_around_a_waiter_is_a_cancellation(store):
    """`asyncio.timeout` works with it."""
    async with store.lock("name"):
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.05), store.lock("name"):
                pytest.fail("it was entered")
        assert not isinstance(caught.value, LockTimeout)
    assert is_free(store, "name")


def test_a_killed_owner_frees_it(store, url):
    """At once: the kernel knows."""
    reader, writer = os.pipe()

    def hold() -> None:
        with open_store(url).lock("name"):
            os.write(writer, b"held")
            signal.pause()

    child = Child(hold)
    assert os.read(reader, 4) == b"held"
    assert not is_free(store, "name")
    os.kill(child.pid, signal.SIGKILL)
    with store.lock("name", timeout=10):
        pass
    child.outcome(code=-signal.SIGKILL)
    os.close(reader)
    os.close(writer)


def test_a_lock_outlives_the_store_that_was_closed(store, url):
    """Closing files frees no lock that is still held."""
    other = open_store(url)
    with other.lock("name"):
        other.close()
        store.close()
        assert not is_free(store, "name")
    assert is_free(store, "name")
    other.close()


def test_it_may_be_left_by_another_thread(store):
    """FastAPI enters and leaves a sync dependency in two threads of its pool."""
    lock = store.lock("name")
    entering = threading.Thread(target=lock.__enter__)
    entering.start()
    entering.join()
    assert not is_free(store, "name")
    lock.__exit__(None, None, None)
    assert is_free(store, "name")


# Forks.


def test_a_child_neither_holds_nor_frees_its_parents_lock(store):
    """Whatever the child does with its copy: it waits outside, and its end frees nothing."""

    def try_in_child() -> list[bool]:
        return [is_free(store, "name"), is_free(open_store(store.config.url), "name")]

    with store.lock("name"):
        assert Child(try_in_child).value() == [False, False]
        assert not is_free(store, "name")
    assert is_free(store, "name")
    assert Child(try_in_child).value() == [True, True]


def test_a_child_may_wait_with_the_very_lock_its_parent_holds(store):
    """A lock object made before the fork is no one's in the child: it waits, then gets it."""
    lock = store.lock("name", timeout=0.05)
    with lock:
        assert Child(lock.__enter__).outcome().error == "LockTimeout"
        assert not is_free(store, "name")
    patient = store.lock("name", timeout=PATIENCE)
    with patient:

        def enter_and_leave() -> str:
            with patient:
                return "entered"

        child = Child(enter_and_leave)
        time.sleep(0.03)
    assert child.value() == "entered"


def test_a_child_that_leaves_its_parents_block_frees_nothing(store):
    """The block ends in both processes; only the parent's end counts."""
    lock = store.lock("name")
    lock.__enter__()
    Child(lock.__exit__, None, None, None).outcome()
    assert not is_free(store, "name")
    lock.__exit__(None, None, None)
    assert is_free(store, "name")


def test_a_child_does_not_keep_a_dead_parents_lock(store, url):
    """The owner is the process that took it: when it is killed, the lock is free."""
    reader, writer = os.pipe()
    ended, end = os.pipe()

    def parent() -> None:
        inner = open_store(url)
        inner.check()
        with inner.lock("name"), inner.lock("other"):
            os.close(end)
            grandchild = Child(os.read, ended, 1)  # lives until the test ends
            os.write(writer, b"%08d" % grandchild.pid)
            signal.pause()

    child = Child(parent)
    grandchild = int(os.read(reader, 8))
    os.kill(child.pid, signal.SIGKILL)
    try:
        with store.lock("name", timeout=10), store.lock("other", timeout=10):
            os.kill(grandchild, 0)
    finally:
        os.close(end)
        child.outcome(code=-signal.SIGKILL)
        os.close(ended)
        os.close(reader)
        os.close(writer)


def test_a_started_program_does_not_keep_the_lock(store):
    """Its descriptor is closed in a program that is run while it is held."""
    with store.lock("name"):
        program = start_program()
        inherited = open_files(program.pid)
    assert is_free(store, "name")
    program.communicate(timeout=PATIENCE)
    assert len(inherited) >= 3
    assert str(store.backend.directory / "locks") not in inherited


# Arguments.


@pytest.mark.parametrize(
    ("options", "error"),
    [
        pytest.param({"ttl": 0}, ValueError, id="ttl-zero"),
        pytest.param({"ttl": -1}, ValueError, id="ttl-negative"),
        pytest.param({"ttl": math.nan}, ValueError, id="ttl-nan"),
        pytest.param({"ttl": "30"}, TypeError, id="ttl-str"),
        pytest.param({"ttl": None}, TypeError, id="ttl-none"),
        pytest.param({"timeout": -0.1}, ValueError, id="timeout-negative"),
        pytest.param({"timeout": math.nan}, ValueError, id="timeout-nan"),
        pytest.param({"timeout": "1"}, TypeError, id="timeout-str"),
    ],
)  # fmt: skip
def test_bad_times_are_refused(store, options, error):
    """When the lock is made, before anyone waits."""
    with pytest.raises(error):
        store.lock("name", **options)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        pytest.param("", ValueError, id="empty"),
        pytest.param(5, TypeError, id="int"),
        pytest.param(b"name", TypeError, id="bytes"),
        pytest.param(None, TypeError, id="none"),
        pytest.param("\ud800", ValueError, id="lone-surrogate"),
        pytest.param("x" * 4097, KeyTooLong, id="long"),
    ],
)  # fmt: skip
def test_bad_names_are_refused(store, name, error):
    """A name follows the rules of keys."""
    with pytest.raises(error):
        store.lock(name)


def test_times_are_keywords(store):
    """`lock("name", 5)` would leave the reader guessing."""
    with pytest.raises(TypeError):
        store.lock("name", 5)


def test_the_ttl_has_no_effect(store):
    """The kernel frees a dead owner's lock; a slow one keeps it."""
    with store.lock("name", ttl=0.001):
        time.sleep(0.01)
        assert not is_free(store, "name")


def open_files(pid: int | str) -> list[str]:
    """Return what the descriptors of a process lead to."""
    files = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor of this very listing
            files.append(str(descriptor.readlink()))
    return files


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf"), 1e11])
def test_a_ttl_that_makes_no_sense_is_refused(ttl):
    """On every store alike, and before anything is asked of it."""
    with pytest.raises(ValueError, match="lock ttl"):
        open_store("memory://").lock("name", ttl=ttl)
