"""How much memory processes have, and how much of it loading took."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import pytest
from serving_helpers import in_child

from hornbeam_ml import Serving, get_model, memory, register_model
from hornbeam_ml.memory import LoadMeter, Memory, memory_of
from hornbeam_ml.models import load_costs

MIB = 1024 * 1024
# As Linux 6 writes it.
ROLLUP = """\
561424edc000-7ffe8f7cf000 ---p 00000000 00:00 0                          [rollup]
Rss:                8752 kB
Pss:                7349 kB
Pss_Anon:           2908 kB
Shared_Clean:       1616 kB
Private_Clean:      4228 kB
Private_Dirty:      2908 kB
Private_Hugetlb:    2048 kB
Locked:                0 kB
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            ROLLUP,
            Memory(rss_bytes=8752 * 1024, pss_bytes=7349 * 1024, uss_bytes=9184 * 1024),
            id="figures",
        ),
        pytest.param("", None, id="a process that has just ended"),
    ],
)
def test_what_the_kernel_writes_is_read(text, expected):
    assert memory._parse(text) == expected


def test_a_process_has_more_after_it_took_some():
    before = memory_of()
    taken = b"x" * (40 * MIB)
    grown = memory_of() - before
    assert len(taken) == 40 * MIB
    for bytes_ in (grown.rss_bytes, grown.pss_bytes, grown.uss_bytes):
        assert 36 * MIB < bytes_ < 80 * MIB


def test_shared_pages_count_in_parts():
    """For two processes half each; and they are nobody's own."""
    with mmap.mmap(-1, 40 * MIB) as shared:
        shared.write(b"x" * (40 * MIB))
        pss, uss = memory_of().pss_bytes, memory_of().uss_bytes

        def child():
            assert shared[-1:] == b"x"
            assert sum(shared[:: mmap.PAGESIZE]) > 0  # maps every page
            mine, parents = memory_of(), memory_of(os.getppid())
            return f"{pss - parents.pss_bytes > 16 * MIB} {uss - mine.uss_bytes > 36 * MIB}"

        assert in_child(child) == "True True"


def test_what_cannot_be_read_is_none():
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
        assert memory_of(ended.pid) is None
    assert memory_of(ended.pid) is None


def test_a_load_whose_memory_cannot_be_read_has_its_time(monkeypatch):
    monkeypatch.setattr(memory, "_counter", memory._Counter())
    monkeypatch.setattr(memory, "memory_of", lambda: None)
    cost = LoadMeter().cost()
    assert cost.memory is None
    assert cost.seconds >= 0


def test_small_loads_are_counted_once_a_second(monkeypatch):
    """Counting takes longer than they do."""
    counted = []
    monkeypatch.setattr(memory, "_counter", memory._Counter())
    monkeypatch.setattr(memory, "memory_of", lambda: counted.append(1) or memory_of())
    costs = [LoadMeter().cost() for _ in range(100)]
    assert len(counted) < 50
    assert costs[-1].memory.rss_bytes < MIB
    large = LoadMeter()
    kept = os.urandom(40 * MIB)
    assert large.cost().memory.uss_bytes > 36 * MIB
    assert len(kept) == 40 * MIB


def test_the_loads_of_a_model_and_of_a_serving_are_measured():
    """Each with what it brought; what a model took is known when it is loaded."""
    register_model("weights", lambda: bytearray(os.urandom(40 * MIB)))
    assert load_costs()["weights"] is None
    get_model("weights")

    def load():
        weights = os.urandom(40 * MIB)
        return lambda batch: [weights[item] for item in batch]

    with Serving(load, instances=2) as serving:
        assert serving.load_costs == ()
        serving.start()
        costs = [load_costs()["weights"], *serving.load_costs]
        assert len(costs) == 3
        assert all(cost.memory.uss_bytes > 36 * MIB for cost in costs)
        assert all(0 < cost.seconds < 20 for cost in costs)
