"""Counters of many processes, exact whatever happens to the processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hornbeam_ml.metrics import Metrics


def test_threads_lose_no_counts(tmp_path):
    """Many threads that count at once are all counted."""
    metrics = Metrics(tmp_path / "metrics")
    threads = [
        threading.Thread(target=lambda: [metrics.add("a", 1, 2) for _ in range(2000)])
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.totals() == {"a": [16000, 32000]}


COUNT_AND_DIE = """
import os, signal, sys
from pathlib import Path
from hornbeam_ml.metrics import Metrics
metrics = Metrics(Path(sys.argv[1]))
for n in range(1000):
    metrics.add("calls", 1)
    metrics.add(f"series {n % 10}", 1)
os.kill(os.getpid(), int(sys.argv[2]))
"""


def run(directory, how=signal.SIGKILL):
    return subprocess.Popen(
        [sys.executable, "-c", COUNT_AND_DIE, str(directory), str(int(how))],
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )


def test_killed_processes_lose_no_counts_and_leave_no_new_files(tmp_path):
    """Counts outlive kill -9, and a later process goes on in a dead one's slot."""
    directory = tmp_path / "metrics"
    for _ in range(3):
        run(directory).wait()
    for process in [run(directory, signal.SIGTERM) for _ in range(4)]:
        process.wait()
    assert Metrics(directory).totals()["calls"] == [7000]
    assert len(list(directory.iterdir())) <= 4


def test_a_forked_child_counts_in_a_slot_of_its_own(tmp_path):
    """Parent and child count at the same time without losing anything."""
    metrics = Metrics(tmp_path / "metrics")
    metrics.add("a", 1)
    children = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            for _ in range(1000):
                metrics.add("a", 1)
            os._exit(0)
        children.append(pid)
    for _ in range(1000):
        metrics.add("a", 1)
    for pid in children:
        os.waitpid(pid, 0)
    assert metrics.totals() == {"a": [4001]}


def test_without_a_usable_directory_a_process_counts_for_itself(tmp_path):
    """A directory that cannot be used is a warning, not an error."""
    (tmp_path / "file").write_text("")
    metrics = Metrics(tmp_path / "file")
    with pytest.warns(RuntimeWarning, match="not shared"):
        metrics.add("a", 1)
    metrics.add("a", 1)
    assert metrics.totals() == {"a": [2]}


def test_too_many_series_are_a_warning(tmp_path):
    """A slot does not grow without bound; what it knows already still counts."""
    metrics = Metrics(tmp_path / "metrics")
    metrics.add("first", 1)

    def fill():
        for n in range(10_000):
            metrics.add(f"{n:0200d}", 1, 1, 1, 1)

    with pytest.warns(RuntimeWarning, match="too many"):
        fill()
    metrics.add("first", 1)
    assert metrics.totals()["first"] == [2]


def test_damaged_and_foreign_slot_files_do_not_stop_counting(tmp_path):
    """Rubbish in a slot file is ignored, or replaced by whoever takes the slot."""
    directory = tmp_path / "metrics"
    directory.mkdir()
    (directory / "slot-0000").write_bytes(b"rubbish" * 100)
    (directory / "slot-0001").write_bytes(b"")
    (directory / "slot-0002").write_bytes(b"HBSLOT01" + b"\xff" * 500)
    metrics = Metrics(directory)
    metrics.add("a", 1)
    assert metrics.totals() == {"a": [1]}
