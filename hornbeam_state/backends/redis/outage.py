"""When a lost connection is made again, and when those who wait for messages are told. Pure."""

from __future__ import annotations

import math
import random
from typing import Final

FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 2.0


def pause_before(attempt: int) -> float:
    """Return the seconds before a connection is made again: none, then ever more, up to two."""
    if attempt == 0:
        return 0.0
    longest = min(FIRST_PAUSE * 2.0 ** min(attempt - 1, 10), LONGEST_PAUSE)
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - so that not all come at once


class Attempts:
    """How long to wait before each attempt to connect.

    A connection that was lost soon counts as a failed attempt, so that a server that accepts and
    hangs up is not asked in a tight loop.
    """

    def __init__(self) -> None:
        self._failed = 0

    def pause(self, lasted: float) -> float:
        """Return the seconds before the next one, after a connection that lasted for so many."""
        if lasted >= LONGEST_PAUSE:
            self._failed = 0
        self._failed += 1
        return pause_before(self._failed - 1)


class Outage:
    """The time from which messages may be missing until all is subscribed again.

    Takes the time, never looks at a clock.

    Args:
        timeout: Seconds after which an outage is worth an error.

    Attributes:
        next_try: When to make a connection.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._since: float | None = None
        self._told = False
        self._attempts = Attempts()
        self.next_try = 0.0

    def begin(self, since: float) -> None:
        """Note that the server has not been heard; one that goes on began earlier."""
        if self._since is None:
            self._since = since

    def failed(self, now: float, lasted: float = 0.0) -> None:
        """Note that there is no connection, after one that lasted for so many seconds."""
        self.next_try = now + self._attempts.pause(lasted)

    def must_tell(self, now: float) -> bool:
        """Return True once for each outage, when it has lasted for `timeout`."""
        if now < self.tell_at():
            return False
        self._told = True
        return True

    def tell_at(self) -> float:
        """Return when `must_tell` will be true."""
        return math.inf if self._since is None or self._told else self._since + self._timeout

    def end(self) -> bool:
        """Note that all is well; return whether there was an outage."""
        was, self._since, self._told = self._since is not None, None, False
        return was
