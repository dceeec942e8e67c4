"""The HTTP request that code works for: its deadline, and whether its client still waits.

The worker sets it for each request. Tasks, `asyncio.to_thread` and the threads of anyio, in which
FastAPI runs sync endpoints, inherit it.
"""

from __future__ import annotations

import re
import time
from contextvars import ContextVar
from math import inf
from typing import TYPE_CHECKING, Final

from hornbeam_ml.errors import ClientDisconnected
from hornbeam_state.errors import DeadlineExceeded

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT_HEADER: Final = "X-Request-Timeout-Ms"
_LONGEST_MS: Final = 86_400_000.0
_MILLISECONDS: Final = re.compile(r"[0-9]{1,15}(\.[0-9]{1,15})?")


class Request:
    """A request until its response is complete. Safe to use from any thread.

    Work that goes on after the response, such as a background task, is bound to nothing: then
    there is no deadline, and a client that leaves stops nothing.

    Args:
        deadline: When its client stops waiting, seconds of `time.monotonic`; `inf`: never.

    Attributes:
        client_left: Whether the client went away before the response was complete.
        over: Whether the response is complete.
    """

    __slots__ = ("_deadline", "_waiting", "client_left", "over")

    def __init__(self, deadline: float = inf) -> None:
        self._deadline = deadline
        self._waiting: dict[object, Callable[[], None]] = {}
        self.client_left = False
        self.over = False

    @property
    def deadline(self) -> float:
        """When its client stops waiting; `inf` once the response is complete."""
        return inf if self.over else self._deadline

    def check(self) -> None:
        """Return if work for the request may begin.

        Raises:
            ClientDisconnected: nobody waits for it any more.
            DeadlineExceeded: it is too late.
        """
        if self.over:
            return
        if self.client_left:
            raise ClientDisconnected("the client of the request has left")
        if self._deadline <= time.monotonic():
            raise DeadlineExceeded("the deadline of the request passed")

    def attach(self, work: object, cancel: Callable[[], None]) -> None:
        """Have work cancelled when the client leaves: at once, if it has.

        Args:
            work: What `forget` is told when it is done.
            cancel: Called on the thread that notices, maybe twice; neither waits nor raises.
        """
        self._waiting[work] = cancel
        if self.client_left and not self.over:  # `leave` may have looked before
            cancel()

    def forget(self, work: object) -> None:
        """Note that work is done."""
        self._waiting.pop(work, None)

    def leave(self) -> None:
        """Note that the client left, and cancel what waits for it."""
        if self.over:
            return
        self.client_left = True
        for cancel in list(self._waiting.values()):
            cancel()

    def end(self) -> None:
        """Note that the response is complete."""
        if not self.over:
            self.over = True
            self._waiting.clear()


_current: ContextVar[Request | None] = ContextVar("hornbeam_request", default=None)


def current_request() -> Request | None:
    """Return the request that the calling thread or task works for."""
    return _current.get()


set_current_request: Final = _current.set
"""Says which request the calling thread or task works for from now on."""


def check_request() -> None:
    """Return if work for the request may begin, or where there is none; see `Request.check`."""
    request = current_request()
    if request is not None:
        request.check()


def seconds_left() -> float | None:
    """Return for how long the caller may wait, by the deadline of its request; None: for ever."""
    request = current_request()
    if request is None or request.deadline == inf:
        return None
    return max(0.0, request.deadline - time.monotonic())


def deadline_from(header: str, now: float) -> float:
    """Return the deadline that the value of the header sets; more than a day counts as a day.

    Raises:
        ValueError: it is no number of milliseconds above 0. The message is for the client.
    """
    timeout_ms = float(header) if _MILLISECONDS.fullmatch(header.strip()) else 0.0
    if timeout_ms <= 0:
        raise ValueError(f"{TIMEOUT_HEADER}: give one number of milliseconds above 0, such as 250")
    return now + min(timeout_ms, _LONGEST_MS) / 1000
