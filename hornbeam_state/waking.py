"""Letting threads and tasks wait for a call, and waking them when there is something to see."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from math import inf
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Waker(Protocol):
    """Tells whoever waits for a call that there is something to see."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """Where `wake` has to be called; None: anywhere."""
        ...

    def wake(self, call: Any, /) -> None:
        """Tell the waiter; may be called again."""


class Awaited(Protocol):
    """A call that somebody waits for."""

    @property
    def waker(self) -> Waker:
        """How to tell who waits."""
        ...


class Gate:
    """Lets one thread wait until another opens it, once for each opening, or several."""

    __slots__ = ("_closed",)

    def __init__(self) -> None:
        self._closed = threading.Lock()
        self._closed.acquire()

    def wait(self, seconds: float) -> bool:
        """Block until it is open, or for so long, and close it; return whether it was open."""
        if seconds == inf:
            return self._closed.acquire()
        return self._closed.acquire(timeout=min(max(0.0, seconds), threading.TIMEOUT_MAX))

    def open(self) -> None:
        """Open it, unless it is open."""
        with contextlib.suppress(RuntimeError):
            self._closed.release()


class TaskGate:
    """The same for one task of the running event loop; it is opened there."""

    __slots__ = ("_opened", "loop")

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._opened = self.loop.create_future()

    async def wait(self) -> None:
        """Wait until it is open, and close it."""
        await self._opened
        self._opened = self.loop.create_future()

    def open(self) -> None:
        """Open it, unless it is open."""
        if not self._opened.done():
            self._opened.set_result(None)


def wake(calls: Iterable[Awaited]) -> None:
    """Tell the waiters of some calls, those of one event loop all at once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Awaited]] = {}
    for call in calls:
        loop = call.waker.loop
        if loop is None:
            call.waker.wake(call)
        else:
            by_loop.setdefault(loop, []).append(call)
    for loop, group in by_loop.items():
        with contextlib.suppress(RuntimeError):  # it is closed, and its tasks are gone
            loop.call_soon_threadsafe(_wake_here, group)


def _wake_here(calls: Sequence[Awaited]) -> None:
    for call in calls:
        call.waker.wake(call)
