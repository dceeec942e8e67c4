"""Trees of processes: what they use, and that none outlives the benchmark."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that they stay findable."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def leave_on_sigterm() -> None:
    """Let SIGTERM unwind the stack like Ctrl-C, so that servers are stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))


def tree(pid: int) -> list[int]:
    """Return a process and all its descendants, parents first."""
    found = [pid]
    for each in found:
        for task in _entries(f"/proc/{each}/task"):
            with contextlib.suppress(OSError):
                children = Path(f"/proc/{each}/task/{task}/children").read_text().split()
                found += map(int, children)
    return found


def end_descendants(seconds: float = 10.0) -> None:
    """End all that descends from this process: politely first, then for sure."""
    me = os.getpid()
    deadline = time.monotonic() + seconds
    for pid in tree(me)[1:]:
        _send(pid, signal.SIGTERM)
    while (rest := _living(me)) and time.monotonic() < deadline:
        time.sleep(0.05)
    while rest:
        for pid in rest:
            _send(pid, signal.SIGKILL)
        time.sleep(0.05)
        rest = _living(me)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a tree so far, that of children it has waited for included."""
    return sum(_ticks(each) for each in tree(pid)) / CLOCK_TICKS


def resident_mib(pid: int) -> float:
    """Return the memory of a tree; pages that its processes share count once for each."""
    return sum(_resident_kib(each) for each in tree(pid)) / 1024


def _living(me: int) -> list[int]:
    """Return the descendants that still run, having reaped those that do not."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return tree(me)[1:]


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _ticks(pid: int) -> int:
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15]))
    return 0


def _resident_kib(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
    return 0


def _entries(directory: str) -> list[str]:
    try:
        return [path.name for path in Path(directory).iterdir()]
    except OSError:
        return []
