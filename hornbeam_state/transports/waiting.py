"""Calls that wait for their answers, and how each kind of caller is told.

A call is done once: whoever takes it out of the table of the channel finishes it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any, Final, Protocol

from hornbeam_state import waking
from hornbeam_state.errors import Overloaded
from hornbeam_state.waking import Gate, TaskGate

if TYPE_CHECKING:
    from collections.abc import Callable

    from hornbeam_state.backends.readiness import Readiness

logger = logging.getLogger("hornbeam.transport")

MOST_CHUNKS: Final = 4096
"""How far a listener may be behind its stream."""


class Waker(waking.Waker, Protocol):
    """Tells whoever waits for a call that there is something to see."""

    @property
    def calls_back(self) -> bool:
        """Whether `wake` runs code of the waiter."""
        ...

    def fail_after_fork(self, error: BaseException | None) -> None:
        """In a forked child: let nobody wait who still could."""


class Call:
    """A call that has no answer yet.

    Args:
        number: What the transport calls it.
        deadline: When the caller stops waiting, by the monotonic clock.
        waker: How to tell the caller.

    Attributes:
        message: The call as the transport sends it; held until it is done.
        chunks: What came of a stream and was not taken.
        done: Whether no more comes.
    """

    __slots__ = ("chunks", "deadline", "done", "error", "message", "number", "values", "waker")

    def __init__(self, number: int, deadline: float, waker: Waker) -> None:
        self.number = number
        self.deadline = deadline
        self.waker = waker
        self.message: Any = None
        self.chunks: deque[Any] = deque()
        self.values: list[Any] = []
        self.error: BaseException | None = None
        self.done = False

    def finish(self, values: list[Any]) -> None:
        """Be done, with these results."""
        self.values = values
        self._end()

    def fail(self, error: BaseException) -> None:
        """Be done, with an error."""
        self.error = error
        self._end()

    def push(self, chunk: Any) -> bool:
        """Keep a chunk for the listener; return False when it is too far behind."""
        if len(self.chunks) >= MOST_CHUNKS:
            return False
        self.chunks.append(chunk)
        return True

    def outcome(self) -> list[Any]:
        """Return the results, or raise the error; it is done."""
        if self.error is not None:
            raise self.error
        return self.values

    def _end(self) -> None:
        self.message = None  # it may hold large arrays
        self.done = True


def lag() -> Overloaded:
    """Return what a listener gets that is too far behind."""
    return Overloaded(f"the listener is {MOST_CHUNKS} chunks behind")


class ThreadWaker(Gate):
    """A thread that blocks.

    Attributes:
        bell: What else ends its waiting, while it waits for something else than to be woken.
    """

    __slots__ = ("bell",)
    loop = None
    calls_back = False

    def __init__(self) -> None:
        super().__init__()
        self.bell: Readiness | None = None

    def wake(self, call: Call) -> None:  # noqa: ARG002 - a Waker
        """Open the gate, unless it is open."""
        self.open()
        bell = self.bell
        if bell is not None:
            bell.set()

    def fail_after_fork(self, error: BaseException | None) -> None:  # noqa: ARG002 - a Waker
        """Open the gate."""
        self.open()


class TaskWaker(TaskGate):
    """An asyncio task that awaits."""

    __slots__ = ()
    calls_back = False

    def wake(self, call: Call) -> None:  # noqa: ARG002 - a Waker
        """Let the task go on."""
        self.open()

    def fail_after_fork(self, error: BaseException | None) -> None:
        """Do nothing: the loop is the parent's."""


class Reply(Future[list[Any]]):
    """The future of a call; cancelling it cancels the call.

    Args:
        abandon: Cancels the call.
    """

    loop = None
    calls_back = True

    def __init__(self, abandon: Callable[[Call], object]) -> None:
        super().__init__()
        self._abandon = abandon
        self.call: Call | None = None

    def cancel(self) -> bool:
        """Cancel the call unless it is done; return whether it is cancelled."""
        cancelled = super().cancel()
        call, self.call = self.call, None
        if cancelled and call is not None:
            self._abandon(call)
            self.set_running_or_notify_cancel()  # without it `concurrent.futures.wait` waits on
        return cancelled

    def wake(self, call: Call) -> None:
        """Finish. The callbacks run here; what they raise is logged."""
        self.call = None  # they refer to each other: without this only the collector frees both
        try:
            if call.error is not None:
                self.set_exception(call.error)
            else:
                self.set_result(call.values)
        except InvalidStateError:
            pass  # it was cancelled
        except BaseException:
            # The future catches no more than Exception, and this thread has others to wake.
            logger.exception("a callback of a future raised")

    def fail_after_fork(self, error: BaseException | None) -> None:
        """Fail. Callbacks belong to threads and event loops of the parent."""
        self._condition = threading.Condition()  # a thread of the parent may have held its lock
        if not self.done():
            self._done_callbacks.clear()  # type: ignore[attr-defined]  # not in its stubs
            self.set_exception(error)
