"""What takes the place of Linux's locks on other systems, tried out on this one."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from redis_servers import wait_until

from hornbeam_state.backends import kernel_locks, mapped_file
from hornbeam_state.backends.embedded import write_guard
from hornbeam_state.backends.embedded.backend import EmbeddedBackend
from hornbeam_state.backends.file_locks import FileGuard, try_own_file
from hornbeam_state.config import StoreConfig
from hornbeam_state.errors import StoreUnavailable
from hornbeam_state.testing import LockContract


@pytest.fixture
def another_system(monkeypatch):
    """Take away what only Linux and glibc have."""
    monkeypatch.setattr(kernel_locks, "HAS_RANGES", False)
    monkeypatch.setattr(write_guard, "has_robust_mutexes", lambda: False)
    monkeypatch.delattr(mapped_file.os, "posix_fallocate")


class TestElsewhere(LockContract):
    """The embedded store on a system without robust mutexes and locks of ranges."""

    @pytest.fixture
    def backend(self, another_system, tmp_path):
        config = StoreConfig.from_url(f"lmdb://{tmp_path}/store", timeout=10)
        backend = EmbeddedBackend(config)
        yield backend
        backend.close()

    def test_processes_count_together(self, backend, children):
        """Threads of several processes write to one counter and to the cache."""
        state, cache = backend.keyspace("app"), backend.keyspace("cache")

        def count():
            for number in range(100):
                state.incr(b"n", 1)
                cache.put(b"%d" % number, b"v" * 1000, 60)

        def work():
            threads = [threading.Thread(target=count) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            state.incr(b"finished", 1)

        state.incr(b"n", 0)
        children.extend(in_child(work) for _ in range(3))
        count()
        wait_until(lambda: state.get(b"finished") == b"3", "the children finish", 30)
        assert state.get(b"n") == b"700"


def in_child(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


@pytest.fixture
def children():
    started: list[int] = []
    yield started
    for child in started:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_guard_is_waited_for_no_longer_than_asked(tmp_path):
    """Between two guards on one file, as processes have them, and between threads of one."""
    first, second = FileGuard(tmp_path / "guard"), FileGuard(tmp_path / "guard")
    assert first.acquire(1)
    for other in (second, first):
        start = time.monotonic()
        assert not other.acquire(0.05)
        assert time.monotonic() - start < 10
    second.release()  # not the holder: nothing happens
    assert not second.acquire(0)
    first.release()
    assert second.acquire(1)


def test_a_guard_is_not_freed_by_another_thread(tmp_path):
    """As with a mutex, the one that took it gives it back."""
    guard = FileGuard(tmp_path / "guard")
    assert guard.acquire(1)
    thread = threading.Thread(target=guard.release)
    thread.start()
    thread.join()
    assert not FileGuard(tmp_path / "guard").acquire(0)
    guard.release()
    assert FileGuard(tmp_path / "guard").acquire(0)


def test_a_killed_holder_frees_guard_and_lock(tmp_path, children):
    """The kernel does, whatever the holder was at."""

    def hold():
        guard = FileGuard(tmp_path / "guard")
        guard.acquire(1)
        try_own_file(tmp_path / "locks" / "name")
        (tmp_path / "held").touch()
        signal.pause()

    children.append(in_child(hold))
    wait_until((tmp_path / "held").exists, "the child holds them")
    guard = FileGuard(tmp_path / "guard")
    assert not guard.acquire(0.02)
    assert try_own_file(tmp_path / "locks" / "name") is None
    os.kill(children[0], signal.SIGKILL)
    assert guard.acquire(20)
    wait_until(lambda: try_own_file(tmp_path / "locks" / "name") is not None, "the lock is free")
    guard.release()


@pytest.mark.usefixtures("another_system")
def test_locks_leave_no_files_behind(tmp_path):
    """Many names are locked in the life of a store."""
    path = tmp_path / "locks"
    for number in range(50):
        held = kernel_locks.try_kernel_lock(path, b"lock %d" % number)
        assert kernel_locks.try_kernel_lock(path, b"lock %d" % number) is None
        assert held.release()
    assert list((tmp_path / "locks.d").iterdir()) == []


@pytest.mark.usefixtures("another_system")
def test_a_lock_that_comes_and_goes_has_one_holder(tmp_path):
    """Its file is removed and made anew all the time, by threads that race."""
    path, inside, most, taken = tmp_path / "locks", [], [], []

    def race():
        start = time.monotonic()
        while (ran := time.monotonic() - start) < 1 or (len(taken) <= 50 and ran < 20):
            held = kernel_locks.try_kernel_lock(path, b"lock")
            if held is not None:
                inside.append(1)
                most.append(len(inside))
                taken.append(1)
                inside.pop()
                held.release()

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) > 50
    assert max(most) == 1


@pytest.mark.usefixtures("another_system")
def test_a_lock_that_cannot_be_made_says_so(tmp_path):
    (tmp_path / "locks.d").write_text("in the way")
    with pytest.raises(StoreUnavailable, match=r"cannot open the lock file .*locks\.d"):
        kernel_locks.try_kernel_lock(tmp_path / "locks", b"lock")
