"""Eight processes that count on a server, and keep account of it."""

from __future__ import annotations

import random
import time
from collections import Counter

from processes import Child, Gate, wait_until

from hornbeam_state import StoreUnavailable, open_store

PROCESSES = 8
TIMEOUT = 0.3
SLACK = 2.0
"""Seconds beyond the timeout that this machine, busy with eight processes, may take."""


def count_until(note, url: str, gate: Gate, seed: int) -> dict:
    """Count, on a counter of one's own and on a shared one, until the gate opens."""
    dice, outcomes = random.Random(seed), Counter()
    store = open_store(url, timeout=TIMEOUT)
    longest = 0.0
    while not gate.is_open():
        for key in ("shared", f"own/{seed}"):
            started = time.monotonic()
            try:
                store.incr(key)
                outcomes[f"{key} done"] += 1
            except StoreUnavailable as error:
                known = "may or may not" not in str(error)
                outcomes[f"{key} {'not done' if known else 'unknown'}"] += 1
                time.sleep(dice.random() * 0.01)
            longest = max(longest, time.monotonic() - started)
        if outcomes["shared done"] % 100 == 1:
            note(outcomes["shared done"])
    return {"outcomes": outcomes, "longest": longest}


class Load:
    """Eight processes that count."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._gate = Gate()
        self._children = [Child(count_until, url, self._gate, seed) for seed in range(PROCESSES)]

    def runs(self, seconds: float = 20.0) -> None:
        """Wait until every process counts (again)."""
        for child in self._children:
            before = len(child.notes())
            wait_until(
                lambda child=child, before=before: len(child.notes()) > before,
                "every process counts",
                seconds,
            )

    def check(self, url: str | None = None, *, may_lose: bool = False) -> str:
        """End it, and compare what was acknowledged with what was counted.

        Args:
            url: Where to look, if not where was counted.
            may_lose: Whether a failover may have lost what was acknowledged.
        """
        self._gate.open()
        found = [child.value() for child in self._children]
        self._gate.close()
        store = open_store(url or self.url, timeout=10)
        total = sum((Counter(one["outcomes"]) for one in found), Counter())
        for key in ("shared", *(f"own/{seed}" for seed in range(PROCESSES))):
            done, unknown = total[f"{key} done"], total[f"{key} unknown"]
            counted = store.get(key, 0)
            assert counted <= done + unknown, f"{key} was counted twice"
            assert may_lose or counted >= done, f"{key} lost increments"
        longest = max(one["longest"] for one in found)
        counted = store.get("shared")
        store.close()
        assert longest < TIMEOUT + SLACK
        return (
            f"shared: {total['shared done']} acknowledged, {total['shared unknown']} unknown, "
            f"{total['shared not done']} refused, counted {counted}; longest call {longest:.2f} s"
        )
