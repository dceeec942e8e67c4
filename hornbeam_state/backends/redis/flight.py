"""Finding something out once, for all who want to know it."""

from __future__ import annotations

import threading


class Flight:
    """Lets one caller at a time find something out. Takes the time, never looks at a clock.

    Thread-safe, and held by no thread: an asyncio task may begin in one and end in another.

    Args:
        lease: Seconds after which another may begin, in case the first never comes to an end.
        interval: Least seconds between two beginnings, unless `begin` is told otherwise.
    """

    def __init__(self, lease: float, interval: float = 0.0) -> None:
        self._lease = lease
        self._interval = interval
        self._lock = threading.Lock()
        self._began: float | None = None
        self._busy = False

    def begin(self, now: float, *, at_once: bool = False) -> bool:
        """Return whether the caller is to find out, and to call `end` after.

        Args:
            now: The time.
            at_once: Whether to disregard the interval.
        """
        with self._lock:
            if self._began is not None:
                age = now - self._began
                if age < (self._lease if self._busy else 0 if at_once else self._interval):
                    return False
            self._began, self._busy = now, True
            return True

    def end(self) -> None:
        """Let others begin."""
        self._busy = False
