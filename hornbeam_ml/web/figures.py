"""What `/stats` shows: this worker, models and servings, the model host, the other workers."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hornbeam_ml import models, readiness
from hornbeam_ml.memory import memory_of
from hornbeam_ml.serving import chosen_hosts
from hornbeam_ml.serving.registry import open_servings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hornbeam_ml.memory import LoadCost, Memory
    from hornbeam_ml.serving import ServingStats

_START_FIELD: Final = 19  # of /proc/PID/stat, counted from the one after the name


def figures() -> dict[str, Any]:
    """Return the figures of this process, and of the workers beside it."""
    return {
        "worker": {
            "pid": os.getpid(),
            "phase": readiness.phase(),
            "reasons": readiness.reasons(),
            "uptime_s": round(_uptime_s(), 3),
            "memory": _shown(memory_of()),
        },
        "models": [
            {"name": name, "loaded": cost is not None, "load": _shown(cost)}
            for name, cost in models.load_costs().items()
        ],
        "servings": [
            {**_serving(serving.stats()), "loads": [_shown(cost) for cost in serving.load_costs]}
            for serving in open_servings()
        ],
        "host": [{"pid": pid, **_of_others(pid)} for pid in _host_pids()],
        "workers": [{**worker, **_of_others(worker["pid"])} for worker in _workers()],
    }


def show_workers(workers: Callable[[], Sequence[Mapping[str, Any]]]) -> None:
    """Have `figures` list these workers.

    Args:
        workers: Returns one mapping for each worker of this server: ``pid``, ``state``,
            ``generation`` and whatever else is to be shown. It must not wait for anything.
    """
    global _workers  # noqa: PLW0603 - what is known of the server, once in a process
    _workers = workers


def _only_this() -> list[dict[str, Any]]:
    return [{"pid": os.getpid(), "state": readiness.phase(), "generation": None}]


_workers: Callable[[], Sequence[Mapping[str, Any]]] = _only_this


def _host_pids() -> list[int]:
    hosts = chosen_hosts.current()
    return [] if hosts is None else hosts.pids()


def _serving(stats: ServingStats) -> dict[str, Any]:
    shown = asdict(stats)
    # Keys are whatever the app declares, and JSON has only strings for names.
    shown["keys"] = [
        {"key": None if key is None else str(key), **figures}
        for key, figures in shown["keys"].items()
    ]
    return shown


def _shown(figures: LoadCost | Memory | None) -> dict[str, Any] | None:
    return None if figures is None else asdict(figures)


def _of_others(pid: int) -> dict[str, int | None]:
    memory = memory_of(pid)
    if memory is None:
        return {"rss_bytes": None, "pss_bytes": None}
    return {"rss_bytes": memory.rss_bytes, "pss_bytes": memory.pss_bytes}


def _uptime_s() -> float:
    """Return how long this process runs. Its age, not that of an interpreter it was forked from."""
    fields = Path("/proc/self/stat").read_text("ascii", "replace").rpartition(")")[2].split()
    began = int(fields[_START_FIELD]) / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
