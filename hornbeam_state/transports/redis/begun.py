"""Which calls a process has begun: a server may forget it. Pure."""

from __future__ import annotations

import time
from typing import Final

MOST_KNOWN: Final = 2**16


class Begun:
    """The calls that a process has begun, until their deadlines.

    A replica that is promoted, and a server that restarts from a snapshot, may still have calls in
    the stream that were taken from it since. The latest `MOST_KNOWN` of those are known again here.
    """

    def __init__(self) -> None:
        self._until: dict[bytes, float] = {}  # in the order in which they were begun

    def note(self, id: bytes, left_s: float, now: float | None = None) -> bool:
        """Take note of a call that begins; return False if it began before.

        Args:
            id: The call.
            left_s: Seconds until its deadline, after which nobody runs it in any case.
            now: The time, by the monotonic clock.
        """
        now = time.monotonic() if now is None else now
        if id in self._until:
            return False
        self._until[id] = now + left_s
        self._forget(now)
        return True

    def _forget(self, now: float) -> None:
        while self._until:
            oldest = next(iter(self._until))
            if self._until[oldest] > now and len(self._until) <= MOST_KNOWN:
                return
            del self._until[oldest]
