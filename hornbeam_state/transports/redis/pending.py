"""Calls of this process that have no answer yet, and the answers as they arrive. Pure."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hornbeam_state.errors import CodecError, NodeDown
from hornbeam_state.transports.failures import load_failure
from hornbeam_state.transports.redis.bodies import read_body
from hornbeam_state.transports.redis.envelope import Kind, Refused
from hornbeam_state.transports.waiting import Call, lag

if TYPE_CHECKING:
    from hornbeam_state.backends.redis.batches import Command
    from hornbeam_state.transports.redis.envelope import Answer
    from hornbeam_state.transports.redis.keys import NodeKeys
    from hornbeam_state.transports.waiting import Waker


class Route(Protocol):
    """The channel of a call: which node it is for, and its calls that have no answer yet."""

    waiting: dict[int, Pending]
    node: str
    keys: NodeKeys
    secret: bytes | None
    most_bytes: int


class Pending(Call):
    """A call that has no answer yet.

    Args:
        number: What nothing else of this process has.
        id: The same, for everybody.
        deadline: When the caller stops waiting, by the monotonic clock.
        waker: How to tell the caller.
        route: The channel.

    Attributes:
        entry: Where it waits in its stream; None: it is not known to have been added.
        tried: Whether it may have been added.
        leftover: Removes its large values, if it has any, when nobody will run it.
    """

    __slots__ = ("_body", "_filled", "_next", "entry", "id", "leftover", "route", "tried")

    def __init__(self, number: int, id: bytes, deadline: float, waker: Waker, route: Route) -> None:
        super().__init__(number, deadline, waker)
        self.id = id
        self.route = route
        self.entry: bytes | None = None
        self.tried = False
        self.leftover: Command | None = None
        self._next = 0  # the number of the answer that is to come
        self._body: memoryview | None = None  # of one of which a part is here
        self._filled = 0

    def take(self, answer: Answer) -> bool:
        """Take an answer, or a part of one, once; return whether there is something to see.

        Raises:
            Exception: what ends the call, unless it is the end of it: an answer is lost, too
                large or damaged, or the listener too far behind.
        """
        if answer.number < self._next or (answer.offset < self._filled):
            return False  # it was read before
        if answer.number > self._next or answer.offset > self._filled:
            raise NodeDown("a part of the answer was lost with the server")
        body = self._gather(answer)
        if body is None:
            return False
        self._next, self._body, self._filled = answer.number + 1, None, 0
        match answer.kind:
            case Kind.RESULTS:
                self.finish(read_body(body))
            case Kind.END:
                self.finish([])
            case Kind.FAILURE:
                self.fail(load_failure(body))
            case _:
                (chunk,) = read_body(body)
                if not self.push(chunk):
                    raise lag()
        return True

    def _gather(self, answer: Answer) -> bytes | memoryview | None:
        """Return the whole of an answer, when this is the last part of it."""
        if answer.total == len(answer.part):
            return answer.part
        if answer.total > self.route.most_bytes:
            raise CodecError(
                f"an answer of {answer.total} bytes: {self.route.most_bytes} are the most here"
            )
        if self._body is None:
            self._body = np.empty(answer.total, np.uint8).data
        elif len(self._body) != answer.total:
            raise Refused("its parts have different lengths")
        self._filled = answer.offset + len(answer.part)
        self._body[answer.offset : self._filled] = answer.part
        return self._body if self._filled == answer.total else None


class Clock:
    """The server's clock, as far as its answers tell. Nothing here looks at that of this machine.

    Only a monotonic clock is used between answers, so it does not matter what time this machine
    believes it is.
    """

    def __init__(self) -> None:
        self._ahead: float | None = None

    @property
    def is_set(self) -> bool:
        """Whether the server has told the time."""
        return self._ahead is not None

    def set(self, milliseconds: int) -> None:
        """Take note of what the server said just now."""
        self._ahead = milliseconds - time.monotonic() * 1000

    def now(self) -> int:
        """Return the time in milliseconds."""
        return int((self._ahead or 0.0) + time.monotonic() * 1000)


class Table:
    """The calls of a process that have no answer yet. Whoever takes one out finishes it."""

    def __init__(self) -> None:
        self.calls: dict[int, Pending] = {}

    def add(self, call: Pending) -> None:
        """Add a call."""
        call.route.waiting[call.number] = call
        self.calls[call.number] = call

    def get(self, number: int) -> Pending | None:
        """Return a call, if it is still there."""
        return self.calls.get(number)

    def take(self, call: Pending) -> bool:
        """Take a call out; return False when somebody else did."""
        call.route.waiting.pop(call.number, None)
        return self.calls.pop(call.number, None) is not None
