"""Thousands of calls on one loop, half of them cancelled at any moment."""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from pathlib import Path

import pytest
import uvloop
from processes import wait_until

from hornbeam_state import LockTimeout, open_store

pytestmark = pytest.mark.slow

CALLS = 2000
ROUNDS = 3

LOOPS = [
    pytest.param(asyncio.new_event_loop, id="asyncio"),
    pytest.param(uvloop.new_event_loop, id="uvloop"),
]


class Caller:
    """A caller with keys and values of its own, which nobody else may ever be shown."""

    def __init__(self, store, number: int, dice: random.Random) -> None:
        self.name = f"{number:05}"
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._store = store
        self._dice = dice
        self._counted = 0
        self._unknown = 0

    async def call(self) -> None:
        """Make some calls, and check what each returns."""
        await asyncio.sleep(self._dice.random() * 0.2)
        steps = [self._set_and_get, self._count, self._get_many, self._lock, self._replace]
        self._dice.shuffle(steps)
        for step in steps:
            await step()
            self.done[step.__name__] += 1

    def _expect(self, found, expected) -> None:
        if found != expected:
            self.wrong.append(f"{self.name}: {found!r:.80} instead of {expected!r:.80}")

    async def _set_and_get(self) -> None:
        value = [self.name, "x" * self._dice.randrange(2000)]
        await self._store.aset(f"value/{self.name}", value)
        self._expect(await self._store.aget(f"value/{self.name}"), value)

    async def _count(self) -> None:
        for _ in range(3):
            self._unknown += 1
            number = await self._store.aincr(f"n/{self.name}")
            self._unknown -= 1
            self._counted += 1
            if not self._counted <= number <= self._counted + self._unknown:
                self.wrong.append(f"{self.name}: counted {number} instead of {self._counted}")

    async def _get_many(self) -> None:
        mine = {f"{kind}/{self.name}": kind * 10 + self.name for kind in "abc"}
        await self._store.aset_multi(mine)
        self._expect(await self._store.aget_multi([*mine, "none"]), {**mine, "none": None})

    async def _lock(self) -> None:
        try:
            async with self._store.lock(f"lock/{int(self.name) % 50}", timeout=0.05, ttl=5):
                await asyncio.sleep(0)
        except LockTimeout:
            self.done["lock was held"] += 1

    async def _replace(self) -> None:
        key = f"cas/{self.name}"
        await self._store.aset(key, self.name)
        self._expect(await self._store.acas(key, self.name, self.name * 2), True)
        self._expect(await self._store.adelete(key), True)

    async def check_count(self) -> None:
        """Compare the counter with what was acknowledged, now that all is over."""
        found = await self._store.aget(f"n/{self.name}", 0)
        if not self._counted <= found <= self._counted + self._unknown:
            self.wrong.append(f"{self.name}: {found} counted, {self._counted} acknowledged")


async def storm(store, dice: random.Random) -> tuple[Counter, list[str]]:
    """Let callers call, cancel half of them, and see that all is well afterwards."""
    callers = [Caller(store, number, dice) for number in range(CALLS)]
    tasks = [asyncio.create_task(caller.call()) for caller in callers]
    for task in dice.sample(tasks, CALLS // 2):
        asyncio.get_running_loop().call_later(dice.random() * 1.5, task.cancel)
    ends = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
    counts: Counter[str] = sum((caller.done for caller in callers), Counter())
    counts.update(type(end).__name__ for end in ends if end is not None)
    await asyncio.gather(*(caller.check_count() for caller in callers))
    for number in range(50):
        async with store.lock(f"lock/{number}", timeout=20):
            pass
    return counts, [text for caller in callers for text in caller.wrong]


def weather(store, loop_factory) -> Counter:
    """Run some storms on one loop; all of its answers have to be right."""
    dice = random.Random(9)

    async def main() -> Counter:
        total: Counter[str] = Counter()
        for _ in range(ROUNDS):
            counts, wrong = await storm(store, dice)
            assert wrong == []
            total += counts
            await store.aclear()
        await store.aclose()
        return total

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        total = runner.run(main())
    assert total["CancelledError"] > 50
    assert set(total) <= {
        *("_set_and_get", "_count", "_get_many", "_lock", "_replace"),
        *("lock was held", "CancelledError"),
    }
    return total


def descriptors(loop_factory) -> int:
    """Count the open files, with what the first loop of its kind keeps for the process."""
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(asyncio.sleep(0))
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_a_storm_over_an_embedded_store(url, loop_factory, tell):
    """Nothing is left open, held or waiting."""
    before = descriptors(loop_factory)
    store = open_store(url, timeout=20)
    tell(dict(weather(store, loop_factory)))
    assert store.incr("n") == 1
    store.close()
    assert descriptors(loop_factory) == before


@pytest.mark.parametrize("where", ["url", "unix_url"])
@pytest.mark.parametrize("loop_factory", LOOPS)
def test_a_storm_over_redis(make_server, where, loop_factory, tell):
    """No reply reaches another caller, and no connection is left."""
    server = make_server()
    with server.admin() as admin:
        connected = admin.info("clients")["connected_clients"]
        before = descriptors(loop_factory)
        store = open_store(getattr(server, where), timeout=20)
        total = weather(store, loop_factory)
        wait_until(
            lambda: admin.info("clients")["connected_clients"] <= connected + 1,
            "the server sees the connections closed",  # but that of the thread that renews locks
        )
        assert store.incr("n") == 1
        store.close()
        wait_until(lambda: descriptors(loop_factory) <= before, "the connections are closed", 5)
        assert admin.info("clients")["connected_clients"] == connected
    tell(dict(total))
