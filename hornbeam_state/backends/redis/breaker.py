"""A circuit breaker: spares callers the wait for a server that is known to be down."""

from __future__ import annotations

import threading
from typing import Final

FAILURES: Final = 3
FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 2.0


class Breaker:
    """Decides whether a call may try the server. Takes the time, never looks at a clock.

    After `FAILURES` failures in a row it opens: calls are refused for a pause, then one of them
    is let through as a probe. A probe that fails doubles the pause, up to `LONGEST_PAUSE`; any
    call that succeeds closes the circuit. Thread-safe.

    Args:
        lease: Seconds a probe has before another is let through, in case it never reports.
    """

    def __init__(self, lease: float) -> None:
        self._lease = lease
        self._lock = threading.Lock()
        self._failures = 0
        self._opened_at = 0.0
        self._refuse_until = 0.0  # calls are refused before this time
        self._pause = FIRST_PAUSE

    def wait(self, now: float) -> float:
        """Return 0 if a call may go ahead at `now`, else the seconds until one may."""
        if self._failures < FAILURES:
            return 0.0
        with self._lock:
            if self._failures >= FAILURES and now < self._refuse_until:
                return self._refuse_until - now
            self._refuse_until = now + self._lease
            return 0.0

    def succeeded(self) -> None:
        """Note that the server answered."""
        if self._failures:
            with self._lock:
                self._failures = 0
                self._pause = FIRST_PAUSE

    def failed(self, started: float, now: float) -> None:
        """Note that a call that began at `started` could not reach the server.

        A call from before the circuit opened says nothing new when it fails after: of thirty
        that wait on a stalled server, the first few open it and the others change nothing.
        """
        with self._lock:
            if self._failures >= FAILURES and started < self._opened_at:
                return
            self._failures += 1
            if self._failures < FAILURES:
                return
            if self._failures > FAILURES:
                self._pause = min(self._pause * 2, LONGEST_PAUSE)
            self._opened_at = now
            self._refuse_until = now + self._pause
