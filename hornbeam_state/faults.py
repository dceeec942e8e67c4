"""Faults for tests: which calls of a backend they strike, and what they do to them.

No locks are used, so that a fork in the middle of a call leaves none behind: lists are only
appended to and copied, and numbers are drawn from `itertools.count`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Container

    from hornbeam_state.backends.base import Space

T = TypeVar("T")
Moment = Literal["before", "after"]

KEYSPACE_OPERATIONS: Final = frozenset(
    (
        *("get", "get_many", "put", "put_many", "add", "cas", "incr", "delete"),
        *("keys", "ttl", "clear", "usage"),
    )
)
OPERATIONS: Final = KEYSPACE_OPERATIONS | frozenset(
    ("check", "try_lock", "release", "publish", "subscribe", "take")
)
"""What can be made to fail; an awaitable twin goes by the name of its sync method."""

_ASK_EVERY: Final = 0.001


class Call(NamedTuple):
    """A call of an operation, or of its awaitable twin.

    Attributes:
        operation: The name of the sync method.
        space: The key space, or None where it is about none.
        names: The keys, the prefix, the lock or the topics that it is about.
    """

    operation: str
    space: Space | None
    names: tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class Where:
    """Which calls a fault strikes, and on which side of them."""

    moment: Moment
    operations: frozenset[str]
    space: Space | None
    nth: int | Container[int] | None
    when: Callable[[Call], bool] | None

    def matches(self, call: Call) -> bool:
        """Return whether the call is one of these, whatever its number."""
        return (
            call.operation in self.operations
            and self.space in (None, call.space)
            and (self.when is None or self.when(call))
        )

    def is_struck(self, number: int) -> bool:
        """Return whether the matching call of this number, from 1, is struck."""
        if self.nth is None or isinstance(self.nth, int):
            return self.nth in (None, number)
        return number in self.nth


class Fault:
    """What happens to some calls, from when it is made until it is ended.

    A context manager that ends it.
    """

    def __init__(self, faults: Faults, where: Where) -> None:
        self.where = where
        self._faults = faults
        self._numbers = itertools.count(1)
        faults.begin(self)

    def end(self) -> None:
        """Strike no more calls. Idempotent."""
        self._faults.end(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def strikes(self, moment: Moment, call: Call) -> bool:
        """Count a call if it matches, and return whether it is struck."""
        return (
            moment == self.where.moment
            and self.where.matches(call)
            and self.where.is_struck(next(self._numbers))
        )

    def strike(self, call: Call) -> None:
        """Let it happen to a call."""
        raise NotImplementedError

    async def astrike(self, call: Call) -> None:
        """Awaitable twin of `strike`."""
        self.strike(call)


class Failure(Fault):
    """An error in place of an answer."""

    def __init__(self, faults: Faults, where: Where, error: Callable[[str], Exception]) -> None:
        self._error = error
        super().__init__(faults, where)

    def strike(self, call: Call) -> None:
        """Raise the error."""
        if self.where.moment == "before":
            raise self._error(f"a test lets {call.operation!r} fail: nothing was done")
        raise self._error(f"a test lets {call.operation!r} fail: the outcome is unknown")


class Outage(Failure):
    """The failure of everything; of ``take`` only once, which is for the inbox to see to."""


class Delay(Fault):
    """An answer that takes longer."""

    def __init__(self, faults: Faults, where: Where, seconds: float) -> None:
        self._seconds = seconds
        super().__init__(faults, where)

    def strike(self, call: Call) -> None:  # noqa: ARG002
        """Sleep."""
        time.sleep(self._seconds)

    async def astrike(self, call: Call) -> None:  # noqa: ARG002
        """Let the event loop go on meanwhile."""
        await asyncio.sleep(self._seconds)


class Hold(Fault):
    """Calls that stay where they are until the hold is ended.

    Args:
        faults: Those of the backend.
        where: Which calls.
        patience: Most seconds that a call is held, or waited for.
    """

    def __init__(self, faults: Faults, where: Where, patience: float) -> None:
        self._patience = patience
        self._reached = threading.Event()
        self._ended = threading.Event()
        super().__init__(faults, where)

    def reached(self) -> None:
        """Wait until a call is held.

        Raises:
            TimeoutError: none came.
        """
        if not self._reached.wait(self._patience):
            raise self._nobody_came()

    async def areached(self) -> None:
        """Awaitable twin of `reached`."""
        if not await _is_set(self._reached, self._patience):
            raise self._nobody_came()

    def end(self) -> None:
        """Let the held calls go on."""
        super().end()
        self._ended.set()

    def strike(self, call: Call) -> None:
        """Wait for the end.

        Raises:
            TimeoutError: it did not come.
        """
        self._reached.set()
        if not self._ended.wait(self._patience):
            raise self._nobody_ended(call)

    async def astrike(self, call: Call) -> None:
        """Awaitable twin of `strike`."""
        self._reached.set()
        if not await _is_set(self._ended, self._patience):
            raise self._nobody_ended(call)

    def _nobody_came(self) -> TimeoutError:
        return TimeoutError(f"no call came to be held within {self._patience} s")

    def _nobody_ended(self, call: Call) -> TimeoutError:
        return TimeoutError(f"{call.operation!r} was held for {self._patience} s: end the hold")


class Faults:
    """The faults of one backend, and the calls it has met.

    Args:
        began: Called when there is a new one.

    Attributes:
        calls: The calls, in the order in which they came.
    """

    def __init__(self, began: Callable[[], None]) -> None:
        self.calls: list[Call] = []
        self._began = began
        self._faults: list[Fault] = []

    def begin(self, fault: Fault) -> None:
        """Let a fault strike from now on."""
        self._faults.append(fault)
        self._began()

    def end(self, fault: Fault) -> None:
        """Let a fault strike no more."""
        with contextlib.suppress(ValueError):
            self._faults.remove(fault)

    def end_all(self) -> None:
        """Let no fault strike any more."""
        for fault in list(self._faults):
            fault.end()

    @property
    def outage(self) -> Outage | None:
        """The outage that goes on, if any."""
        return next((one for one in list(self._faults) if isinstance(one, Outage)), None)

    def run(
        self,
        call: Call,
        action: Callable[..., T],
        *args: Any,
        lost: Callable[[T], object] | None = None,
    ) -> T:
        """Do what is asked, with the faults before and after it.

        Args:
            call: The call.
            action: What does it.
            *args: The arguments of that.
            lost: What to do with a result that the caller is not told.
        """
        self.calls.append(call)
        for fault in self._striking("before", call):
            fault.strike(call)
        result = action(*args)
        try:
            for fault in self._striking("after", call):
                fault.strike(call)
        except BaseException:
            if lost is not None:
                lost(result)
            raise
        return result

    async def arun(
        self,
        call: Call,
        action: Callable[..., Awaitable[T]],
        *args: Any,
        lost: Callable[[T], object] | None = None,
    ) -> T:
        """Awaitable twin of `run`."""
        self.calls.append(call)
        for fault in self._striking("before", call):
            await fault.astrike(call)
        result = await action(*args)
        try:
            for fault in self._striking("after", call):
                await fault.astrike(call)
        except BaseException:
            if lost is not None:
                lost(result)
            raise
        return result

    def _striking(self, moment: Moment, call: Call) -> list[Fault]:
        return [fault for fault in list(self._faults) if fault.strikes(moment, call)]


async def _is_set(event: threading.Event, patience: float) -> bool:
    """Wait for an event that any thread may set. Asked for, so that no loop need be told."""
    deadline = time.monotonic() + patience
    while not event.is_set():
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(_ASK_EVERY)
    return True
