"""Threads and tasks that increment counters while servers fail, and keep account of it."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from typing import Self

from redis_servers import wait_until

from hornbeam_state.errors import StoreUnavailable


class Load:
    """Increments counters of a key space, sync and asyncio, until it is left.

    Attributes:
        acknowledged: Increments that were answered, by key.
        unknown: Increments that may or may not have happened, by key.
        answered: Increments answered at all.
        failed: Calls that raised.
        longest: Seconds of the longest call.
    """

    def __init__(self, space, names, threads: int = 3, tasks: int = 3) -> None:
        self._space = space
        self._names = names
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._faults: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._guard, args=(self._work,)) for _ in range(threads)
        ]
        self._threads.append(
            threading.Thread(target=self._guard, args=(lambda: asyncio.run(self._awork(tasks)),))
        )
        self.acknowledged: Counter[bytes] = Counter()
        self.unknown: Counter[bytes] = Counter()
        self.failed = 0
        self.longest = 0.0
        self.messages: set[str] = set()

    @property
    def answered(self) -> int:
        return self.acknowledged.total()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self.wait_for_more("the load begins")
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert self._faults == []

    def wait_for_more(self, what: str, count: int = 100, timeout: float = 20.0) -> None:
        """Wait until so many further increments were answered."""
        before = self.answered
        wait_until(lambda: self.answered >= before + count, what, timeout)

    def check(self, *, may_lose: bool = False) -> None:
        """Compare the counters with the account; replication may lose what was acknowledged."""
        for name in self._names:
            value = int(self._space.get(name) or 0)
            most = self.acknowledged[name] + self.unknown[name]
            assert value <= most, f"{name!r} counted {value} times, asked {most} times at most"
            assert may_lose or value >= self.acknowledged[name], f"{name!r} lost an increment"

    def _guard(self, work) -> None:
        try:
            work()
        except BaseException as fault:
            self._faults.append(fault)

    def _work(self) -> None:
        while not self._stop.is_set():
            name, started = random.choice(self._names), time.monotonic()
            try:
                self._space.incr(name, 1)
            except StoreUnavailable as error:
                self._note(name, started, error)
                time.sleep(0.005)
            else:
                self._note(name, started, None)

    async def _awork(self, tasks: int) -> None:
        async def work():
            while not self._stop.is_set():
                name, started = random.choice(self._names), time.monotonic()
                try:
                    await self._space.aincr(name, 1)
                except StoreUnavailable as error:
                    self._note(name, started, error)
                    await asyncio.sleep(0.005)
                else:
                    self._note(name, started, None)

        async with asyncio.TaskGroup() as group:
            for _ in range(tasks):
                group.create_task(work())

    def _note(self, name, started, error) -> None:
        with self._lock:
            self.longest = max(self.longest, time.monotonic() - started)
            if error is None:
                self.acknowledged[name] += 1
                return
            self.failed += 1
            self.messages.add(str(error))
            if "may or may not" in str(error):
                self.unknown[name] += 1
