"""A connection on which threads wait in turn, as long as they like; made again when it is lost."""

from __future__ import annotations

import select
import threading
import time
from math import inf
from typing import TYPE_CHECKING, Any, Final

from redis import exceptions as driver

from hornbeam_state.backends.readiness import Readiness
from hornbeam_state.backends.redis.errors import FAILURES
from hornbeam_state.backends.redis.outage import Attempts
from hornbeam_state.backends.redis.replies import command, quick_replies
from hornbeam_state.backends.redis.wire import Wire

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hornbeam_state.backends.redis.batches import Command
    from hornbeam_state.backends.redis.link import Link

UNKNOWN_SCRIPT: Final = "NOSCRIPT"
"""How a reply begins that means: the script has to be sent once more."""

# Not what a server says of one command, but that it is the wrong one, or not ready yet.
_MISPLACED: Final = (
    driver.AskError,  # and MovedError
    driver.BusyLoadingError,
    driver.ClusterDownError,
    driver.MasterDownError,
    driver.ReadOnlyError,
    driver.TryAgainError,
)
# The same, as replies begin that nobody has sorted. A server that became a replica says the last
# one to who waits.
_MISPLACED_CODES: Final = (
    *("ASK ", "MOVED ", "LOADING ", "CLUSTERDOWN ", "MASTERDOWN ", "READONLY ", "TRYAGAIN "),
    "UNBLOCKED ",
)


class LineLost(Exception):
    """The connection is gone; what was asked may or may not have been done."""


class Line:
    """A connection to the server that holds a bucket, for one thread at a time.

    What was asked and not answered is not lost when the thread goes: another may wait for it.

    Args:
        link: Connections to the servers of the store.
        bucket: The bucket.
        timeout: Seconds that the server has for a reply, beside the time it was asked to wait.

    Attributes:
        bell: Ends the waiting of a thread; None after the end.
    """

    def __init__(self, link: Link, bucket: int, timeout: float) -> None:
        self._link = link
        self.bell: Readiness | None = Readiness()
        self._bucket = bucket
        self._timeout = timeout
        self._wire: Wire | None = None
        self._replies = quick_replies()
        self._poller = select.poll()
        self._expected = 0
        self._due = 0.0
        self._wait = 0.0
        self._attempts = Attempts()
        self._opened_at = inf
        self._closed = threading.Event()

    @property
    def is_open(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._wire is not None

    def open(self) -> None:
        """Connect.

        Raises:
            StoreError: the server cannot be reached.
            LineLost: the line was closed meanwhile.
        """
        self._address = self._link.locate(self._bucket)
        wire = Wire(self._link.dial_to(self._address))
        self._replies, self._expected = quick_replies(), 0
        self._poller = select.poll()
        self._descriptor = wire.fileno()
        self._poller.register(self._descriptor, select.POLLIN)
        if self.bell is not None:
            self._poller.register(self.bell, select.POLLIN)
        self._wire = wire
        self._opened_at = time.monotonic()
        if self._closed.is_set():
            self.drop()
            raise LineLost("it was closed")

    def ask(self, *commands: Command, wait: float = 0.0) -> None:
        """Send commands together; their replies are taken later.

        Args:
            commands: What to send: little enough for the buffer of an idle connection, or it
                blocks until the server has read it.
            wait: How many seconds the server was asked to wait before the last reply.

        Raises:
            LineLost: the connection is lost.
        """
        wire = self._opened()
        output = bytearray().join(command(*one.words) for one in commands)
        self._expected += len(commands)
        self._wait = wait
        self._due = time.monotonic() + self._timeout + (wait if self._expected == 1 else 0.0)
        try:
            wire.send(output)
            while output:
                self._await_room(wire)
                wire.send(output)
        except FAILURES as error:
            raise self._lose(error) from error

    def take(self, seconds: float) -> list[Any]:
        """Wait for replies, or for the bell; return those that came, errors among them.

        Args:
            seconds: How long to wait.

        Raises:
            LineLost: the connection is lost, or the replies are late.
        """
        wire = self._opened()
        ready = self._poller.poll(1000 * max(0.0, seconds))
        if not any(descriptor == self._descriptor for descriptor, _ in ready):
            if ready and self.bell is not None:
                self.bell.clear()
            if self._expected and time.monotonic() >= self._due:
                raise self._lose(TimeoutError("the server did not answer in time"))
            return []
        try:
            replies = self._replies.feed(wire.receive())
        except FAILURES as error:
            raise self._lose(error) from error
        if len(replies) > self._expected:
            raise self._lose(ConnectionError("a reply to nothing that was asked"))
        if replies:
            self._expected -= len(replies)
            self._due = time.monotonic() + self._timeout + self._wait
            for reply in replies:
                if is_misplaced(reply):
                    raise self._lose(reply) from reply
        return replies

    def pause(self) -> None:
        """Wait before the next `open`: ever longer, up to two seconds, or until it is closed."""
        lasted, self._opened_at = time.monotonic() - self._opened_at, inf
        self._closed.wait(self._attempts.pause(lasted))

    def close(self) -> None:
        """Have the thread that waits on it get `LineLost`. From any thread, and for good."""
        self._closed.set()
        wire = self._wire
        if wire is not None:
            wire.hang_up()

    def drop(self) -> None:
        """Let go of the connection: what was asked on it is asked again on the next."""
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()

    def end(self) -> None:
        """Let go of the connection for good, on the thread of the line, or in a forked child."""
        self._closed.set()
        self.drop()
        self.bell = None

    def _await_room(self, wire: Wire) -> None:
        poller = select.poll()
        poller.register(wire, select.POLLOUT)
        if not poller.poll(1000 * max(0.0, self._due - time.monotonic())):
            raise TimeoutError("the connection takes nothing")

    def _opened(self) -> Wire:
        if self._wire is None:
            raise LineLost("there is no connection")
        return self._wire

    def _lose(self, error: Exception) -> LineLost:
        self.drop()
        self._link.lost(self._address)
        return LineLost(str(error))


def first_error(replies: Sequence[Any]) -> Exception | None:
    """Return the first reply that is an error."""
    return next((reply for reply in replies if isinstance(reply, Exception)), None)


def is_misplaced(reply: Any) -> bool:
    """Return whether a reply says that the server is the wrong one, or not ready."""
    if not isinstance(reply, driver.ResponseError):
        return False
    text = str(reply)
    return (
        isinstance(reply, _MISPLACED) or text.startswith(_MISPLACED_CODES) or " -READONLY" in text
    )
