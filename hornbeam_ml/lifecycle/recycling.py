"""When a worker has served enough and is to be replaced, and when it is its turn to go."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from hornbeam_ml.lifecycle.board import State
from hornbeam_ml.memory import resident_bytes
from hornbeam_state.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hornbeam_ml.lifecycle.board import Row

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_UNITS: Final = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_LOOK_S: Final = 1.0  # between two looks at the memory
_RESPAWN_S: Final = 3.0  # from a worker's last word to its replacement it takes no longer
_ALONE_S: Final = 5.0  # who is alone for so long is the only worker there will be


def memory_limit(environ: Mapping[str, str]) -> int | None:
    """Return the bytes that HORNBEAM_MAX_RSS allows a worker; None: any number.

    Raises:
        ConfigError: it is no size.
    """
    text = environ.get("HORNBEAM_MAX_RSS", "").strip()
    if not text:
        return None
    match = _SIZE.fullmatch(text)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if not size:
        raise ConfigError(f"HORNBEAM_MAX_RSS={text!r}: use a size such as 800M or 1.5G, or bytes")
    return size


class Limits:
    """What a worker may use up before it is replaced.

    Args:
        requests: How many it may serve; None: any number.
        memory: How many bytes of it may be resident; None: any number.
    """

    def __init__(self, requests: int | None, memory: int | None) -> None:
        self._requests = requests
        self._memory = memory
        self._next_look = 0.0

    def exceeded(self, requests: int, now: float) -> str | None:
        """Return which limit is reached, in words, if one is.

        Args:
            requests: How many the worker has begun to serve.
            now: Seconds of a monotonic clock.
        """
        if self._requests is not None and requests >= self._requests:
            return f"{requests} requests, the limit is {self._requests}"
        if self._memory is None or now < self._next_look:
            return None
        self._next_look = now + _LOOK_S
        return self._too_large(self._memory)

    def give_up_memory(self) -> str | None:
        """Give the limit of memory up if a new worker exceeds it; return the reason, in words.

        One that replaces it would be as large, and so on, as fast as workers can boot.
        """
        reason = None if self._memory is None else self._too_large(self._memory)
        if reason is not None:
            self._memory = None
        return reason

    def _too_large(self, limit: int) -> str | None:
        resident = resident_bytes()
        if resident < limit:
            return None
        return f"{_mib(resident)} are resident, HORNBEAM_MAX_RSS is {_mib(limit)}"


def may_leave(own: Row, rows: Sequence[Row], wanted: int, now: float, since: float) -> bool:
    """Return whether it is the turn of a worker that is to be replaced.

    One goes at a time, and only while another is ready, unless there is no other.

    Args:
        own: Its row.
        rows: All rows; `own` may be among them.
        wanted: How many workers the server is to have.
        now: Seconds of a monotonic clock.
        since: When it began to wait for its turn.
    """
    rows = [row for row in rows if row.slot != own.slot]
    if any(not row.alive and now - row.since < _RESPAWN_S for row in rows):
        return False  # its replacement is about to come
    others = [row.state for row in rows if row.alive]
    if not others:
        return wanted <= 1 or now - since >= _ALONE_S
    return State.READY in others and {State.READY, State.RETIRING}.issuperset(others)


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
