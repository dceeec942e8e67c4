"""Calls that wait for a serving, and how each kind of waiter is told.

A call is finished once: with a result for each of its items, or with an error. Its fields change
under the lock of its queue only; waking happens outside of it.
"""

from __future__ import annotations

import logging
from collections import deque
from concurrent.futures import InvalidStateError
from typing import TYPE_CHECKING, Any, Final, Protocol

from hornbeam_state import waking
from hornbeam_state.errors import Overloaded
from hornbeam_state.waking import Gate, TaskGate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hornbeam_ml.promises import Promise
    from hornbeam_ml.request import Request
    from hornbeam_ml.serving.template import Lane


logger = logging.getLogger("hornbeam.serving")


class _Done:
    """Type of `DONE`."""

    def __repr__(self) -> str:
        return "DONE"


DONE: Final = _Done()
"""In a step of a streaming model: the item in this place has no more chunks."""

MOST_CHUNKS: Final = 4096


class Waker(waking.Waker, Protocol):
    """Tells whoever waits for a call that there is something to see."""

    def start(self) -> bool:
        """Note that the call runs now; return False when it was cancelled."""
        ...


class Call:
    """One call: some items that wait for their results together.

    Args:
        count: How many items.
        arrived: When, in seconds of the queue's clock.
        deadline: When the caller stops waiting.
        waker: How to tell the caller.
    """

    __slots__ = (
        *("__weakref__", "arrived", "deadline", "done", "entries", "error", "left"),
        *("request", "results", "waker"),
    )
    streams = False

    def __init__(self, count: int, arrived: float, deadline: float, waker: Waker) -> None:
        self.arrived = arrived
        self.deadline = deadline
        self.waker = waker
        self.entries: Sequence[Entry] = ()
        self.results: list[Any] = [None] * count
        self.left = count
        self.error: BaseException | None = None
        self.done = False
        self.request: Request | None = None

    def attach(self, request: Request, cancel: Callable[[], None]) -> None:
        """Have it cancelled when the client of an HTTP request leaves before it is done."""
        self.request = request
        request.attach(self, cancel)

    def detach(self) -> None:
        """Let it be the request's no longer."""
        request, self.request = self.request, None
        if request is not None:
            request.forget(self)

    def start(self) -> bool:
        """Note that an item of it runs now; return False when nobody waits for it."""
        return self.waker.start()

    def settle(self, index: int, result: Any) -> None:
        """Keep the result of an item; the last one finishes the call."""
        self.results[index] = result
        self.left -= 1
        if not self.left:
            self.end()

    def fail(self, error: BaseException | None) -> None:
        """Finish with an error; None: nobody waits any more."""
        self.error = error
        self.end()

    def end(self) -> None:
        """Finish."""
        self.done = True
        self.entries = ()  # they refer to the call: without this only the collector frees both
        self.detach()

    def outcome(self) -> list[Any]:
        """Return the results, or raise the error; the call is done."""
        if self.error is not None:
            raise self.error
        return self.results


class StreamingCall(Call):
    """A call for the chunks of one item, which come one by one."""

    __slots__ = ("chunks", "unheard")
    streams = True

    def __init__(self, count: int, arrived: float, deadline: float, waker: Waker) -> None:
        super().__init__(count, arrived, deadline, waker)
        self.chunks: deque[Any] = deque()
        self.unheard = False  # set without the lock, by the collector of the listener

    def start(self) -> bool:
        """Note that it runs now; return False when nobody listens."""
        return not self.unheard

    def push(self, chunk: Any) -> None:
        """Keep a chunk for the listener. One that is too far behind gets an error in the end."""
        if chunk is DONE or self.unheard:
            self.end()
        elif len(self.chunks) >= MOST_CHUNKS:
            self.fail(Overloaded(f"the listener is {MOST_CHUNKS} chunks behind"))
        else:
            self.chunks.append(chunk)


class Entry:
    """One item of a call.

    Args:
        call: The call.
        index: The item's place in it.
        item: What the model takes.
        lane: What it has in common with those it may share a batch with.
        length: Its tokens.
    """

    __slots__ = ("call", "heads_batch", "index", "item", "lane", "length")

    def __init__(self, call: Call, index: int, item: Any, lane: Lane, length: int = 1) -> None:
        self.call = call
        self.index = index
        self.item = item
        self.lane = lane
        self.length = length
        self.heads_batch = False

    @property
    def arrived(self) -> float:
        """When its call arrived."""
        return self.call.arrived

    @property
    def deadline(self) -> float:
        """When its caller stops waiting."""
        return self.call.deadline


class ThreadWaker(Gate):
    """A thread that blocks."""

    __slots__ = ()
    loop = None

    def start(self) -> bool:
        """Return True: one that stops waiting says so."""
        return True

    def wake(self, call: Call) -> None:  # noqa: ARG002 - a Waker
        """Let the thread go on."""
        self.open()


class TaskWaker(TaskGate):
    """An asyncio task that awaits."""

    __slots__ = ()

    def start(self) -> bool:
        """Return True: one that stops waiting says so."""
        return True

    def wake(self, call: Call) -> None:  # noqa: ARG002 - a Waker
        """Let the task go on."""
        self.open()


class PromiseWaker:
    """Nobody in particular: a future that someone may look at.

    Args:
        promise: The future.
        change: Makes the result of it from the result of the call.
    """

    __slots__ = ("_change", "promise")
    loop = None

    def __init__(self, promise: Promise, change: Callable[[Any], Any]) -> None:
        self.promise = promise
        self._change = change

    def start(self) -> bool:
        """Note that the call runs now; return False when it was cancelled."""
        return self.promise.set_running_or_notify_cancel()

    def wake(self, call: Call) -> None:
        """Finish the future. Its callbacks run here; what they raise is logged."""
        promise = self.promise
        if promise.done() or not (promise.running() or self.start()):
            return
        error = call.error
        if error is None:
            try:
                result = self._change(call.results[0])
            except BaseException as raised:  # noqa: BLE001 - it is the caller's
                error = raised
        try:
            if error is not None:
                promise.set_exception(error)
            else:
                promise.set_result(result)
        except InvalidStateError:
            pass  # it was woken twice at the same time
        except BaseException:
            # The future catches no more than Exception, and this thread has others to wake.
            logger.exception("a callback of a future raised")
