"""The deadlines of calls that nobody waits for: those behind a future."""

from __future__ import annotations

import heapq
import threading
from math import inf
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection

_SLACK: Final = 64


class Deadlines:
    """When which call ends. Thread-safe.

    Args:
        waiting: The calls that have no answer yet; others are forgotten by and by.
    """

    def __init__(self, waiting: Collection[int]) -> None:
        self._waiting = waiting
        self._heap: list[tuple[float, int]] = []
        self._lock = threading.Lock()

    def add(self, deadline: float, number: int) -> bool:
        """Add a call; return whether it is the first to end."""
        with self._lock:
            if len(self._heap) > 2 * len(self._waiting) + _SLACK:
                self._heap = [entry for entry in self._heap if entry[1] in self._waiting]
                heapq.heapify(self._heap)
            heapq.heappush(self._heap, (deadline, number))
            return self._heap[0] == (deadline, number)

    def take_due(self, now: float) -> list[int]:
        """Return the calls whose time has come, once."""
        due = []
        with self._lock:
            while self._heap and self._heap[0][0] <= now:
                due.append(heapq.heappop(self._heap)[1])
        return due

    def next(self) -> float:
        """Return when the next call ends; `inf`: there is none."""
        with self._lock:
            return self._heap[0][0] if self._heap else inf
