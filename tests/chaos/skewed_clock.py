"""A wrong clock, for programs that import this before what reads the time.

``CHAOS_AHEAD_S`` says by how many seconds it is ahead; nothing happens without it.
"""

from __future__ import annotations

import os
import time

_real, _real_ns = time.time, time.time_ns
AHEAD_S = float(os.environ.get("CHAOS_AHEAD_S", "0"))


def _wrong() -> float:
    return _real() + AHEAD_S


def _wrong_ns() -> int:
    return _real_ns() + int(AHEAD_S * 1e9)


if AHEAD_S:
    time.time, time.time_ns = _wrong, _wrong_ns
