"""Calls to nodes that are made all the time, and what became of them."""

from __future__ import annotations

import time

from processes import wait_until

DOWN_S = 5.5
"""Until callers know that a node is gone: 5 seconds, and what this machine may take besides."""

SLACK_S = 3.0
CALLERS = 8


class Load:
    """Calls that are made all the time, by several tasks of a process."""

    def __init__(self, caller, node, runs, timeout_ms=1000) -> None:
        self._caller, self._runs, self._timeout_ms = caller, runs, timeout_ms
        self._future = caller.begin(
            "load", node, f"load-{time.monotonic_ns()}", CALLERS, timeout_ms
        )
        self.goes_on()

    def goes_on(self, seconds=20.0) -> None:
        """Wait until calls are answered (again)."""
        before = len(self._runs.all())
        wait_until(lambda: len(self._runs.all()) > before + CALLERS, "calls are answered", seconds)

    def check(self) -> str:
        """End it; no call ran twice, and each ended about in time. Return the figures."""
        self._caller.do("end_loads")
        told = self._future.result(30)
        assert told.error is None, told.message
        assert max(took for _, _, took in told.value.values()) < self._timeout_ms / 1000 + SLACK_S
        return self._runs.check(told.value)


def in_flight(caller, node, runs, *, number, running):
    """Return the futures of so many long calls, of which so many have begun."""
    calls = [caller.begin_call(node, "ahold", f"long-{n}", 60) for n in range(number)]
    for call in range(running):
        runs.wait_for(f"long-{call}")
    return calls


def ends_of(calls, since) -> list:
    """Return what came of calls, that know in time that their node is gone."""
    ends = [call.result(30) for call in calls]
    assert {end.error for end in ends} == {"NodeDown"}
    assert time.monotonic() - since < DOWN_S
    return [end.sent for end in ends]
