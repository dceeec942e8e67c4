"""A connection that one task waits on for as long as it likes: the twin of `line` on an event loop.

What arrives is taken apart where it is read, without a task or a thread between: a call passes
through here twice before it runs.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

from redis.exceptions import RedisError

from hornbeam_state.backends.redis.errors import FAILURES
from hornbeam_state.backends.redis.outage import Attempts
from hornbeam_state.backends.redis.replies import command, quick_replies
from hornbeam_state.backends.redis.wire import Wire
from hornbeam_state.transports.opening import open_in_thread
from hornbeam_state.transports.redis.line import UNKNOWN_SCRIPT, LineLost, is_misplaced

if TYPE_CHECKING:
    from hornbeam_state.backends.redis.batches import Command
    from hornbeam_state.backends.redis.connections import SyncConnection
    from hornbeam_state.backends.redis.link import Link
    from hornbeam_state.backends.redis.topology import Address


class _Asked(NamedTuple):
    """Commands that were sent together, and their replies so far."""

    future: asyncio.Future[list[Any]]
    expected: int
    wait: float
    replies: list[Any]


class AsyncLine:
    """A connection to the server that holds a bucket, for one task.

    Args:
        link: Connections to the servers of the store.
        bucket: The bucket.
        timeout: Seconds that the server has for a reply, beside the time it was asked to wait.
    """

    def __init__(self, link: Link, bucket: int, timeout: float) -> None:
        self._link = link
        self._bucket = bucket
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._wire: Wire | None = None
        self._replies = quick_replies()
        self._output = bytearray()
        self._writing = False
        self._asked: deque[_Asked] = deque()
        self._due = 0.0  # when it is too late for the replies to the first of them
        self._timer: asyncio.TimerHandle | None = None
        self._attempts = Attempts()
        self._opened_at = inf

    @property
    def is_open(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._wire is not None

    async def open(self) -> None:
        """Connect, in place of the connection there was, if any.

        Raises:
            StoreError: the server cannot be reached.
        """
        self.close()  # whoever opens it again may have failed at something else
        self._address, connection = await open_in_thread(
            self._dial, lambda dialled: dialled[1].disconnect()
        )
        self._wire, self._replies, self._output = Wire(connection), quick_replies(), bytearray()
        self._loop.add_reader(self._wire.fileno(), self._read)
        self._opened_at = time.monotonic()

    async def ask(self, *commands: Command, wait: float = 0.0) -> list[Any]:
        """Send commands together and return their replies, errors among them.

        Cancelled, it leaves a connection that is of no use: `close` it.

        Args:
            commands: What to send.
            wait: How many seconds the server was asked to wait.

        Raises:
            LineLost: the connection is lost.
        """
        replies = await self.post(*commands, wait=wait)
        for number, reply in enumerate(replies):
            if isinstance(reply, RedisError):
                if str(reply).startswith(UNKNOWN_SCRIPT):
                    (replies[number],) = await self.post(commands[number].in_full(), wait=wait)
                elif is_misplaced(reply):
                    raise self._lose(reply) from reply
        return replies

    def post(self, *commands: Command, wait: float = 0.0) -> asyncio.Future[list[Any]]:
        """Send commands together, before this returns; return a future of their replies.

        More may be posted before those are here: the server takes them in order.

        Args:
            commands: What to send.
            wait: How many seconds the server was asked to wait.

        Raises:
            LineLost: there is no connection; the future raises it when that is lost.
        """
        if self._wire is None:
            raise LineLost("there is no connection")
        asked = _Asked(self._loop.create_future(), len(commands), wait, [])
        self._asked.append(asked)
        if len(self._asked) == 1:
            self._expect(asked)
        for one in commands:
            self._output += command(*one.words)
        self._write()
        return asked.future

    async def pause(self) -> None:
        """Wait before the next `open`: ever longer, up to two seconds."""
        lasted, self._opened_at = time.monotonic() - self._opened_at, inf
        await asyncio.sleep(self._attempts.pause(lasted))

    def close(self) -> None:
        """Close the connection; who waits gets `LineLost`."""
        self._hang_up(LineLost("it was closed"))

    def forget_after_fork(self) -> None:
        """In a forked child: close its copy of the connection; the loop is the parent's."""
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()

    def _dial(self) -> tuple[Address, SyncConnection]:
        address = self._link.locate(self._bucket)
        return address, self._link.dial_to(address)

    def _expect(self, asked: _Asked) -> None:
        """Have the replies to this come in time, those before having come."""
        self._due = self._loop.time() + self._timeout + asked.wait
        if self._timer is None:
            self._timer = self._loop.call_at(self._due, self._run_out)

    def _run_out(self) -> None:
        """Look whether it is too late: one timer serves many replies, and may be late itself."""
        self._timer = None
        if not self._asked:
            return
        if self._loop.time() < self._due:
            self._timer = self._loop.call_at(self._due, self._run_out)
        else:
            self._lose(TimeoutError("the server did not answer in time"))

    def _read(self) -> None:
        wire = self._wire
        if wire is None:
            return
        try:
            arrived = self._replies.feed(wire.receive())
        except FAILURES as error:
            self._lose(error)
            return
        for reply in arrived:
            if not self._asked:
                self._lose(ConnectionError("a reply to nothing that was asked"))
                return
            asked = self._asked[0]
            asked.replies.append(reply)
            if len(asked.replies) == asked.expected:
                self._asked.popleft()
                if not asked.future.done():
                    asked.future.set_result(asked.replies)
                if self._asked:
                    self._expect(self._asked[0])

    def _write(self) -> None:
        wire = self._wire
        if wire is None:
            return
        try:
            wire.send(self._output)
        except OSError as error:
            self._lose(error)
            return
        if bool(self._output) is not self._writing:
            self._writing = bool(self._output)
            if self._writing:
                self._loop.add_writer(wire.fileno(), self._write)
            else:
                self._loop.remove_writer(wire.fileno())

    def _lose(self, error: Exception) -> LineLost:
        """Let go of the connection; who waits gets the error that this returns."""
        lost = LineLost(str(error))
        lost.__cause__ = error
        self._hang_up(lost)
        self._link.lost(self._address)
        return lost

    def _hang_up(self, error: LineLost) -> None:
        wire, self._wire = self._wire, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if wire is not None:
            self._loop.remove_reader(wire.fileno())
            if self._writing:
                self._loop.remove_writer(wire.fileno())
                self._writing = False
            wire.close()
        asked, self._asked = self._asked, deque()
        for one in asked:
            if not one.future.done():
                one.future.set_exception(error)
                one.future.exception()  # who does not wait any more need not hear of it
