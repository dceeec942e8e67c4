"""How much memory a process has, and how much of it loading a model took."""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_UNIT: Final = 1024  # what /proc calls kB
_LITTLE: Final = 2**20
_VALID_S: Final = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes that are in memory now; of a difference, what came in addition.

    Attributes:
        rss_bytes: All pages, also those shared with other processes.
        pss_bytes: A page that n processes share counts as 1/n: the sum over all processes is what
            they take together.
        uss_bytes: Only pages of its own: what its end would free.
    """

    rss_bytes: int
    pss_bytes: int
    uss_bytes: int

    def __sub__(self, other: Memory) -> Memory:
        return Memory(
            rss_bytes=self.rss_bytes - other.rss_bytes,
            pss_bytes=self.pss_bytes - other.pss_bytes,
            uss_bytes=self.uss_bytes - other.uss_bytes,
        )


def memory_of(pid: int | None = None) -> Memory | None:
    """Return what a process has in memory; this one's unless a pid is given.

    The kernel looks at every page: that takes some tens of milliseconds for each gigabyte.

    Returns:
        None where that cannot be read: there is no such process, or it is another user's.
    """
    try:
        text = Path(f"/proc/{'self' if pid is None else pid}/smaps_rollup").read_text("ascii")
    except OSError:
        return None
    return _parse(text)


def resident_bytes() -> int:
    """Return `Memory.rss_bytes` of this process; cheap, since the kernel keeps that number."""
    return _quick_count()[0]


def _parse(text: str) -> Memory | None:
    kilobytes: dict[str, int] = {}
    for line in text.splitlines()[1:]:  # the first is a range of addresses
        name, _, value = line.partition(":")
        kilobytes[name] = int(value.removesuffix("kB"))
    if "Pss" not in kilobytes:  # one that has just ended has no memory any more
        return None
    own = ("Private_Clean", "Private_Dirty", "Private_Hugetlb")
    return Memory(
        rss_bytes=_UNIT * kilobytes["Rss"],
        pss_bytes=_UNIT * kilobytes["Pss"],
        uss_bytes=_UNIT * sum(kilobytes.get(name, 0) for name in own),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadCost:
    """What a load took.

    Attributes:
        seconds: Its time, warm-up included.
        memory: What the process had more of after it than before; None where that cannot be read.
            Of loads at the same time each has the growth of all, and less than a mebibyte may
            show as nothing.
    """

    seconds: float
    memory: Memory | None


class LoadMeter:
    """Measures a load, from when it is made until `cost` is asked for."""

    def __init__(self) -> None:
        self._before = _counter.count()
        self._began = time.monotonic()

    def cost(self) -> LoadCost:
        """Return what the load took, now that it is done."""
        seconds = time.monotonic() - self._began
        after = _counter.count()
        if self._before is None or after is None:
            return LoadCost(seconds=seconds, memory=None)
        return LoadCost(seconds=seconds, memory=after - self._before)


class _Counter:
    """Counts the memory of this process, and not again a moment later when it has not changed.

    Many small loads, such as those of tests, would else spend their time with it.
    """

    def __init__(self) -> None:
        self._counted: tuple[int, float, list[int], Memory | None] | None = None

    def count(self) -> Memory | None:
        """Return what this process has in memory."""
        try:
            pid, now, quick = os.getpid(), time.monotonic(), _quick_count()
        except OSError:  # no /proc: a load goes on without being measured
            return None
        if self._counted is not None:
            counter, then, quick_then, memory = self._counted
            moved = max(abs(one - other) for one, other in zip(quick, quick_then, strict=True))
            if counter == pid and now - then < _VALID_S and moved < _LITTLE:
                return memory
        memory = memory_of()
        self._counted = pid, now, quick, memory
        return memory


def _quick_count() -> list[int]:
    """Return the bytes that are resident, and those among them that could be shared."""
    fields = Path("/proc/self/statm").read_text("ascii").split()
    return [int(field) * mmap.PAGESIZE for field in fields[1:3]]


_counter = _Counter()
