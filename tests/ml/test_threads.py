"""The compute-thread budget, from fake control groups and fake environments."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from hornbeam_ml import threads
from hornbeam_state.errors import ConfigError


@pytest.fixture
def sixteen_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(16)), raising=False)


def write_tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        pytest.param("0::/\n", {}, 16, id="no-control-groups"),
        pytest.param("0::/\n", {"cpu.max": "max 100000\n"}, 16, id="v2-no-quota"),
        pytest.param("0::/\n", {"cpu.max": "400000 100000\n"}, 4, id="v2-own-mount"),
        pytest.param("0::/a/b\n", {"a/b/cpu.max": "300000 100000\n"}, 3, id="v2-nested"),
        pytest.param(
            "0::/a/b\n",
            {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"},
            2,
            id="v2-quota-of-a-parent",
        ),
        pytest.param(
            "0::/a/b\n",
            {"a/b/cpu.max": "300000 100000", "a/cpu.max": "800000 100000"},
            3,
            id="v2-the-least-counts",
        ),
        pytest.param("0::/docker/abc\n", {"cpu.max": "250000 100000"}, 2, id="v2-host-path"),
        pytest.param("0::/\n", {"cpu.max": "50000 100000"}, 1, id="less-than-one-core"),
        pytest.param("0::/\n", {"cpu.max": "9900000 100000"}, 16, id="more-than-there-are"),
        pytest.param("0::/\n", {"cpu.max": "garbage"}, 16, id="unreadable"),
        pytest.param("", {"cpu.max": "100000 100000"}, 16, id="no-membership"),
        pytest.param(
            "4:cpu,cpuacct:/x\n",
            {"cpu/x/cpu.cfs_quota_us": "600000\n", "cpu/x/cpu.cfs_period_us": "100000\n"},
            6,
            id="v1",
        ),
        pytest.param(
            "4:cpu,cpuacct:/x\n",
            {
                "cpu,cpuacct/cpu.cfs_quota_us": "200000",
                "cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            2,
            id="v1-joint-mount-host-path",
        ),
        pytest.param(
            "2:cpuacct:/\n1:cpu:/\n0::/\n",
            {
                "cpu/cpu.cfs_quota_us": "-1",
                "cpu/cpu.cfs_period_us": "100000",
                "unified/cpu.max": "500000 100000",
            },
            5,
            id="both-versions",
        ),
    ],
)
def test_cores_are_the_least_of_affinity_and_quotas(
    tmp_path, sixteen_cores, membership, files, cores
):
    """A quota of the control group, or of one above it, lowers the count."""
    write_tree(tmp_path / "fs", files)
    (tmp_path / "self").write_text(membership)
    assert threads.usable_cores(tmp_path / "fs", tmp_path / "self") == cores


def test_cores_of_this_machine_are_at_least_one_and_at_most_the_affinity():
    """The real files are read without complaint."""
    assert 1 <= threads.usable_cores() <= len(os.sched_getaffinity(0))


def test_affinity_alone_counts_where_nothing_is_mounted(tmp_path, monkeypatch):
    """A process bound to three cores gets three, and one on a system without affinity all."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {1, 5, 7}, raising=False)
    assert threads.usable_cores(tmp_path, tmp_path / "none") == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert threads.usable_cores(tmp_path, tmp_path / "none") == 6


@pytest.mark.parametrize(
    ("cores", "workers", "share"), [(8, 2, 4), (8, 3, 2), (2, 4, 1), (1, 1, 1), (4, 0, 4)]
)
def test_processes_share_the_cores(cores, workers, share):
    """Nobody gets less than one thread."""
    assert threads.fair_share(cores, workers) == share


@pytest.mark.parametrize(
    ("environ", "budget"),
    [
        pytest.param({}, 4, id="the-share"),
        pytest.param({"HORNBEAM_THREADS": "3"}, 3, id="ours"),
        pytest.param({"HORNBEAM_THREADS": ""}, 4, id="ours-empty"),
        pytest.param({"OMP_NUM_THREADS": "2"}, 2, id="openmp"),
        pytest.param({"OMP_NUM_THREADS": "2,1"}, 2, id="openmp-nested"),
        pytest.param({"OMP_NUM_THREADS": "nonsense"}, 4, id="openmp-nonsense"),
        pytest.param({"OMP_NUM_THREADS": "2", "HORNBEAM_THREADS": "7"}, 7, id="ours-wins"),
        pytest.param({"MKL_NUM_THREADS": "2"}, 4, id="of-one-library"),
    ],
)
def test_budget_is_what_the_user_said_or_the_share(environ, budget):
    """HORNBEAM_THREADS beats OMP_NUM_THREADS, which beats the share."""
    assert threads.thread_budget(4, environ) == budget


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", "²", " "])
def test_a_bad_override_is_refused_by_name(value):
    """The message names the variable and what it held."""
    with pytest.raises(ConfigError, match=r"HORNBEAM_THREADS=.*whole number"):
        threads.thread_budget(4, {"HORNBEAM_THREADS": value})


def test_environment_is_set_where_the_user_said_nothing():
    """A library's own variable stays; the others get the budget."""
    environ = {"MKL_NUM_THREADS": "3", "OTHER": "x"}
    threads.set_environment(2, environ)
    assert environ["MKL_NUM_THREADS"] == "3"
    assert environ["OTHER"] == "x"
    for name in ("OMP", "OPENBLAS", "NUMEXPR", "RAYON", "BLIS"):
        assert environ[f"{name}_NUM_THREADS"] == "2"
    assert environ["VECLIB_MAXIMUM_THREADS"] == "2"


def test_override_replaces_the_variables_of_libraries():
    """HORNBEAM_THREADS is meant for this worker; OMP_NUM_THREADS may be the image's default."""
    environ = {"OMP_NUM_THREADS": "1", "HORNBEAM_THREADS": "4"}
    threads.set_environment(4, environ)
    assert environ["OMP_NUM_THREADS"] == "4"


class Library:
    """Stands in for a loaded library, as threadpoolctl shows it."""

    def __init__(self, internal_api, num_threads):
        self.internal_api = internal_api
        self.num_threads = num_threads

    def set_num_threads(self, num_threads):
        self.num_threads = num_threads


class Torch:
    """Stands in for an imported torch."""

    def __init__(self, threads):
        self.threads = threads

    def get_num_threads(self):
        return self.threads

    def set_num_threads(self, threads):
        self.threads = threads


@pytest.mark.parametrize(
    ("environ", "before", "after"),
    [
        pytest.param({}, (8, 8, 8), (2, 2, 2), id="lowered"),
        pytest.param({}, (1, 1, 1), (1, 1, 1), id="never-raised"),
        pytest.param({"OMP_NUM_THREADS": "5"}, (8, 8, 8), (8, 2, 8), id="set-by-the-app-itself"),
        pytest.param({"OPENBLAS_NUM_THREADS": "5"}, (8, 8, 8), (2, 8, 2), id="one-set-by-user"),
    ],
)
def test_loaded_libraries_are_lowered_to_the_budget(monkeypatch, environ, before, after):
    """Whose variable holds another number than the budget is left alone."""
    openmp, openblas, torch = Library("openmp", before[0]), Library("openblas", before[1]), Torch(0)
    torch.threads = before[2]
    loaded = type("Controller", (), {"lib_controllers": [openmp, openblas, Library("exotic", 9)]})
    monkeypatch.setattr(threads, "ThreadpoolController", loaded)
    monkeypatch.setitem(sys.modules, "torch", torch)
    full = dict(environ)
    threads.set_environment(2, full)
    threads.limit_loaded(2, full)
    assert (openmp.num_threads, openblas.num_threads, torch.threads) == after


def test_half_imported_torch_is_left_alone(monkeypatch):
    """Another thread may be importing it just now."""
    monkeypatch.setitem(sys.modules, "torch", object())
    threads.limit_loaded(1, {"OMP_NUM_THREADS": "1"})


REAL = """
import os, sys, threading
import numpy
if sys.argv[1] == "loaded": import torch
from threadpoolctl import threadpool_info, threadpool_limits
from hornbeam_ml import threads
threads.set_environment(1)
threads.limit_loaded(1)
import torch
seen = []
def look():
    torch.ones(64, 64) @ torch.ones(64, 64)
    seen.append(torch.get_num_threads())
    seen.extend(i["num_threads"] for i in threadpool_info() if i["internal_api"] == "openblas")
    with threadpool_limits(3, user_api="blas"):  # request threads may still choose for themselves
        seen.extend(i["num_threads"] for i in threadpool_info() if i["internal_api"] == "openblas")
thread = threading.Thread(target=look); thread.start(); thread.join()
print(torch.get_num_threads(), *seen)
"""


@pytest.mark.parametrize("torch", ["loaded", "later"])
def test_real_libraries_keep_the_budget_in_every_thread(torch, tmp_path):
    """torch and OpenBLAS, loaded before or after the environment was set."""
    pytest.importorskip("torch")
    environ = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", REAL, torch],
        cwd=tmp_path,
        env={**environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    main, inside, *openblas = done.stdout.split() or [done.stderr]
    assert (main, inside) == ("1", "1")
    half = len(openblas) // 2
    assert set(openblas[:half]) == {"1"}
    assert "3" in openblas[half:] or len(os.sched_getaffinity(0)) < 3


class ThreadedTorch(Torch):
    """Stands in for torch, with a number for each thread that asked, and one for those to come."""

    def __init__(self, threads):
        super().__init__(threads)
        self.own = threading.local()
        self.calls = 0

    def get_num_threads(self):
        if not hasattr(self.own, "threads"):
            self.own.threads = self.threads
        return self.own.threads

    def set_num_threads(self, threads):
        self.calls += 1
        self.own.threads = self.threads = threads


@pytest.fixture
def torch_of_four(monkeypatch):
    """Four threads, and an OpenMP that counts for itself."""
    torch, openmp = ThreadedTorch(4), Library("openmp", 3)
    loaded = type("Controller", (), {"lib_controllers": [openmp, Library("openblas", 8)]})
    monkeypatch.setattr(threads, "ThreadpoolController", loaded)
    monkeypatch.setitem(sys.modules, "torch", torch)
    torch.openmp = openmp
    return torch


def in_thread(function):
    """Run a function in a new thread and return its result."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(20)


def test_a_threads_limit_goes_down_and_up_again_and_never_beyond_the_first(torch_of_four):
    """Torch and OpenMP follow, each up to what it had."""

    def steps():
        seen = []
        for count in (1, 4, 8, 2):
            threads.limit_this_thread(count)
            seen.append(
                (
                    threads.current_limit(),
                    torch_of_four.own.threads,
                    torch_of_four.openmp.num_threads,
                )
            )
        return seen

    assert in_thread(steps) == [(1, 1, 1), (4, 4, 3), (8, 4, 3), (2, 2, 2)]


def test_other_threads_keep_their_number(torch_of_four, monkeypatch):
    """Those that have computed, and those that start later."""
    monkeypatch.setenv("HORNBEAM_THREADS", "3")
    assert torch_of_four.get_num_threads() == 4
    in_thread(lambda: threads.limit_this_thread(1))
    assert torch_of_four.get_num_threads() == 4
    assert in_thread(torch_of_four.get_num_threads) == 4
    assert in_thread(threads.current_limit) == threads.current_limit() == 3


def test_the_same_limit_again_tells_torch_nothing(torch_of_four):
    """It is set before every batch."""

    def steps():
        threads.limit_this_thread(2)
        before = torch_of_four.calls
        for _ in range(5):
            threads.limit_this_thread(2)
        return torch_of_four.calls - before

    assert in_thread(steps) == 0


def test_torch_that_is_imported_later_is_limited_then(torch_of_four, monkeypatch):
    """A model may import it with its first batch."""

    def steps():
        monkeypatch.delitem(sys.modules, "torch")
        threads.limit_this_thread(2)
        monkeypatch.setitem(sys.modules, "torch", object())  # half imported
        threads.limit_this_thread(2)
        monkeypatch.setitem(sys.modules, "torch", torch_of_four)
        threads.limit_this_thread(2)
        return torch_of_four.own.threads

    assert in_thread(steps) == 2


def test_real_torch_computes_with_the_limit_of_the_thread():
    """Also in a thread that never computed before, and after many switches."""
    torch = pytest.importorskip("torch")
    here, before = torch.get_num_threads(), in_thread(torch.get_num_threads)

    def steps():
        seen = []
        for count in (1, before, 1):
            threads.limit_this_thread(count)
            torch.ones(64, 64) @ torch.ones(64, 64)
            seen.append(torch.get_num_threads())
        return seen

    assert in_thread(steps) == [1, before, 1]
    assert (torch.get_num_threads(), in_thread(torch.get_num_threads)) == (here, before)
