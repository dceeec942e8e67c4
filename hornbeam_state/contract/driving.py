"""What the parts of the contract stand on: methods called directly, or their awaitable twins."""

from __future__ import annotations

import asyncio
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from hornbeam_state.backends.base import Backend


class SyncDriver:
    """Calls methods directly; runs racing jobs in a thread each."""

    def call(self, target: object, method: str, *args: Any) -> Any:
        """Call a method."""
        return getattr(target, method)(*args)

    async def acall(self, target: object, method: str, *args: Any) -> Any:
        """Call a method, within a racing job."""
        return self.call(target, method, *args)

    def race(self, *jobs: Coroutine[Any, Any, Any]) -> list[Any]:
        """Run jobs at the same time, and return what they return."""
        with ThreadPoolExecutor(len(jobs)) as pool:
            return list(pool.map(_drive, jobs))


class AsyncDriver:
    """Calls the awaitable twins on an event loop; runs racing jobs in a task each."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner

    def call(self, target: object, method: str, *args: Any) -> Any:
        """Call the twin of a method."""
        return self._runner.run(self.acall(target, method, *args))

    async def acall(self, target: object, method: str, *args: Any) -> Any:
        """Call the twin of a method, within a racing job."""
        return await getattr(target, "a" + method)(*args)

    def race(self, *jobs: Coroutine[Any, Any, Any]) -> list[Any]:
        """Run jobs at the same time, and return what they return."""

        async def together() -> list[Any]:
            return await asyncio.gather(*jobs)

        return self._runner.run(together())


Driver = SyncDriver | AsyncDriver


class Driven:
    """An object whose methods, or their twins, are called by a driver.

    ``driven.get(key)`` calls; ``await driven.soon.get(key)`` does within a racing job.
    """

    def __init__(self, target: object, driver: Driver, *, soon: bool = False) -> None:
        self._target = target
        self._driver = driver
        self._call = driver.acall if soon else driver.call

    @property
    def soon(self) -> Driven:
        """Its methods, to be awaited within a racing job."""
        return Driven(self._target, self._driver, soon=True)

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return partial(self._call, self._target, method)


def _drive(job: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that never waits for anything."""
    try:
        job.send(None)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("a sync job waited")


def in_child(work: Callable[[], bool]) -> bool:
    """Return what `work` returns in a forked child; False if it raises there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: "may lead to deadlocks"
        child = os.fork()
    if child == 0:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def succeeds(action: Callable[[], None]) -> bool:
    """Return True after an action that does not raise."""
    action()
    return True


class Contract:
    """What all parts of the contract stand on."""

    brief = 0.04
    """Seconds to live that a test waits out."""

    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        """Supply an empty backend, and close it after."""
        raise NotImplementedError

    def elapse(self, seconds: float) -> None:
        """Let time pass for the backend."""
        time.sleep(seconds)

    @pytest.fixture(params=["sync", "async"])
    def driver(self, request: pytest.FixtureRequest, backend: Backend) -> Iterator[Driver]:
        """Run the test through one kind of methods."""
        if request.param == "sync":
            yield SyncDriver()
            return
        with asyncio.Runner() as runner:
            yield AsyncDriver(runner)
            runner.run(backend.aclose())
