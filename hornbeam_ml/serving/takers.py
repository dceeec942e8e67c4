"""Who takes batches from a queue, which of them are idle, and whom to wake."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from math import inf
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hornbeam_ml.serving.calls import Entry

_LONGEST_WAIT_S: Final = threading.TIMEOUT_MAX


class Taker:
    """One that takes batches, as a rule a thread of a stream.

    Attributes:
        batch: The entries it works on.
        since: When it took them.
        progress: When it last began to run some of them, or handed out a chunk.
        alone: Whether no other batch ran at that moment, and nothing else waited.
        until: While it waits for a batch: when it wakes by itself.
    """

    def __init__(self) -> None:
        self.batch: Sequence[Entry] = ()
        self.since = 0.0
        self.progress = 0.0
        self.alone = False
        self.until = inf
        self._gate = threading.Lock()
        self._gate.acquire()

    def wait(self, seconds: float) -> None:
        """Block until `wake`, or for so long."""
        self._gate.acquire(timeout=-1 if seconds == inf else min(max(0, seconds), _LONGEST_WAIT_S))

    def wake(self) -> None:
        """Have it look again."""
        with contextlib.suppress(RuntimeError):  # it is about to
            self._gate.release()


class Takers:
    """The takers of a queue; used under its lock, but for `idle`.

    Those that are idle are woken in the order in which they became so.
    """

    def __init__(self) -> None:
        self._all: set[Taker] = set()
        self._idle: deque[Taker] = deque()

    def __len__(self) -> int:
        return len(self._all)

    @property
    def any_idle(self) -> bool:
        """Whether there is one to wake."""
        return bool(self._idle)

    def add(self) -> Taker:
        """Return a new one."""
        taker = Taker()
        self._all.add(taker)
        return taker

    def remove(self, taker: Taker) -> None:
        """Forget one, whose batch is finished."""
        self._all.discard(taker)

    def note_idle(self, taker: Taker, *, until: float) -> None:
        """Note that one waits for a batch, until then at most."""
        taker.until = until
        self._idle.append(taker)

    def note_awake(self, taker: Taker) -> None:
        """Note that one waits no longer."""
        with contextlib.suppress(ValueError):  # someone woke it
            self._idle.remove(taker)

    def idle(self) -> list[Taker]:
        """Return those that wait; safe while garbage is collected."""
        return list(self._idle)

    def to_wake(self, ready_at: float, now: float) -> Taker | None:
        """Return an idle one, if there is a batch for it or a timer for it to watch.

        Args:
            ready_at: When the next batch is ready.
            now: Seconds.
        """
        watched = ready_at > now and ready_at >= min(taker.until for taker in self._idle)
        return None if watched else self._idle.popleft()

    def is_only_busy(self, taker: Taker) -> bool:
        """Return whether no other one has a batch."""
        return all(other is taker or not other.batch for other in self._all)

    def any_stuck(self, now: float, limit_s: float) -> bool:
        """Return whether one has a batch in which nothing has happened for so long."""
        return any(taker.batch and now - taker.progress > limit_s for taker in self._all)

    def running(self) -> list[Entry]:
        """Return the entries in all batches that run."""
        return [entry for taker in self._all for entry in taker.batch]
