"""The client: a channel to a server on this machine, for all threads and event loops."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
import weakref
from collections import deque
from math import inf
from os import register_at_fork
from typing import TYPE_CHECKING, Any

from hornbeam_state.errors import CodecError, DeadlineExceeded, NodeDown, Overloaded
from hornbeam_state.transports.calling import Calling
from hornbeam_state.transports.deadlines import Deadlines
from hornbeam_state.transports.local import messages
from hornbeam_state.transports.local.frames import Frame
from hornbeam_state.transports.local.link import Link, LinkLost
from hornbeam_state.transports.local.messages import Kind
from hornbeam_state.transports.waiting import Call, lag
from hornbeam_state.waking import wake

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable, Mapping

    from hornbeam_state.transports.base import Request
    from hornbeam_state.transports.local.frames import FrameReader, Received
    from hornbeam_state.transports.waiting import Waker

logger = logging.getLogger("hornbeam.transport")


class LocalChannel(Calling):
    """A `Channel` on a unix socket; `connect` makes one.

    Futures and callbacks are finished on the thread of the channel: what they call must not block.

    Args:
        sock: Connected, and greeted.
        reader: Makes frames of what arrives.
        peer: What the server said of itself.
        most_bytes: The largest frame that the server takes.
        on_note: Called with each note of the server.
        on_lost: Called once when the connection has ended, with the reason, or with None when
            it was closed on this side.
        most_pending: How many calls may wait for their answers.
    """

    def __init__(
        self,
        sock: socket.socket,
        reader: FrameReader,
        *,
        peer: Mapping[str, Any],
        most_bytes: int,
        on_note: Callable[[Any], None] | None,
        on_lost: Callable[[BaseException | None], None] | None,
        most_pending: int,
    ) -> None:
        self.peer = peer
        self._most_bytes = most_bytes
        self._on_note = on_note
        self._on_lost = on_lost
        self._most_pending = most_pending
        self._numbers = itertools.count(1)
        self._calls: dict[int, Call] = {}
        self._dropped: deque[Call] = deque()
        self._deadlines = Deadlines(self._calls)
        self._why_lost: str | None = None
        self._server_left = False
        self._link = Link(sock, reader, self)
        _channels.add(self)
        self._link.start()

    @property
    def connected(self) -> bool:
        """Whether calls can be made."""
        return not self._link.lost

    @property
    def pending(self) -> int:
        """How many calls have no answer yet."""
        return len(self._calls)

    def fail(self, reason: str) -> None:
        """End the connection; whoever waits gets `NodeDown` with the reason."""
        self._why_lost = self._why_lost or reason
        self._link.close()

    def close(self) -> None:
        """End the connection; whoever waits gets `NodeDown`. Closing again does nothing."""
        self.fail("the connection was closed")

    # Ends of calls.

    def expire(self, call: Call) -> None:
        """End a call whose deadline passed."""
        if not self._end(call, DeadlineExceeded("the server did not answer in time")):
            call.deadline = inf  # its answer is here, and being read
        call.waker.wake(call)

    def abandon(self, call: Call) -> None:
        """Cancel a call, unless it is done."""
        self._end(call, None)

    def forget(self, call: Call) -> None:
        """Cancel a call soon. Takes no lock: a finalizer may call it."""
        if not call.done:
            self._dropped.append(call)
            self._link.wake()

    def note_deadline(self, call: Call) -> None:
        """See to it that the call ends in time, whoever waits for it."""
        if call.deadline != inf and self._deadlines.add(call.deadline, call.number):
            self._link.wake()

    def _end(self, call: Call, error: Exception | None) -> bool:
        """Cancel a call that has no answer yet, and finish it; return False when it has one."""
        frame: Frame | None = call.message
        if self._calls.pop(call.number, None) is None:
            return False
        if error is None:
            call.finish([])
        else:
            call.fail(error)
        if frame is not None and not self._link.unsend(frame):
            with contextlib.suppress(LinkLost):
                self._link.send(Frame(Kind.CANCEL, call.number), bounded=False)
        return True

    def begin(
        self, request: Request, waker: Waker, *, streams: bool = False, blocks: bool = False
    ) -> Call:
        """Send a call; see `Calling`."""
        kind = Kind.STREAM if streams else Kind.CALL
        if blocks and self._link.is_own_thread:
            raise RuntimeError("a callback of the channel may not wait for the channel")
        if request.timeout <= 0:
            raise DeadlineExceeded("the deadline passed before the call was made")
        call = Call(next(self._numbers), time.monotonic() + request.timeout, waker)
        frame = call.message = messages.call(kind, call.number, request)
        if frame.size > self._most_bytes:
            raise CodecError(
                f"a call of {frame.size} bytes: the server takes {self._most_bytes} at most"
            )
        if len(self._calls) >= self._most_pending:
            raise Overloaded.refusal(f"{self._most_pending} calls wait for their answers")
        self._calls[call.number] = call
        try:
            self._link.send(frame, deadline=call.deadline if blocks else None)
        except LinkLost:
            self._calls.pop(call.number, None)
            raise self._node_down(sent=False) from None
        except BaseException:
            self.abandon(call)
            raise
        return call

    def _node_down(self, *, sent: bool) -> NodeDown:
        error = NodeDown(self._why_lost or "the connection is lost")
        error.sent = sent
        return error

    # On the thread of the link.

    def receive(self, frames: Iterable[Received]) -> None:
        """Take what the server says, and wake those whom it concerns."""
        woken: list[Call] = []
        try:
            for frame in frames:
                call = self._take(frame)
                if call is not None and (not woken or woken[-1] is not call):
                    woken.append(call)
        finally:
            wake(woken)

    def tend(self) -> float:
        """End the calls that were dropped and those that are late; return when the next is."""
        while self._dropped:
            self.abandon(self._dropped.popleft())
        now = time.monotonic()
        for number in self._deadlines.take_due(now):
            call = self._calls.get(number)
            if call is not None:
                self.expire(call)
        return self._deadlines.next() - now

    def lose(self, error: BaseException | None) -> None:
        """Fail whoever waits."""
        if error is not None:
            self._why_lost = f"the connection to the server is lost: {error}"
        wake(self._take_all())
        if self._on_lost is not None:
            _call_back(self._on_lost, error)

    def forget_after_fork(self) -> None:
        """In a forked child: fail whoever waits; the connection is the parent's."""
        self._link.forget_after_fork()
        self._why_lost = "the connection was made by the parent of this process"
        self._deadlines = Deadlines(self._calls)
        for call in self._take_all():
            call.waker.fail_after_fork(call.error)

    def _take_all(self) -> list[Call]:
        """Fail all calls, and return them."""
        failed = []
        for number in list(self._calls):
            call = self._calls.pop(number, None)
            if call is not None:
                frame: Frame | None = call.message
                begun = (frame is None or frame.begun) and not self._server_left
                call.fail(self._node_down(sent=begun))
                failed.append(call)
        return failed

    def _take(self, frame: Received) -> Call | None:
        """Take a frame; return the call to whose waiter it is something to see."""
        match frame.kind:
            case Kind.RESULTS:
                return self._finish(frame, messages.read_values, Call.finish)
            case Kind.FAILURE:
                return self._finish(frame, messages.read_failure, Call.fail)
            case Kind.END:
                return self._finish(frame, messages.read_values, Call.finish)
            case Kind.CHUNK:
                return self._push(frame)
            case Kind.NOTE:
                (note,) = messages.read_values(frame)
                if self._on_note is not None:
                    _call_back(self._on_note, note)
                return None
            case Kind.GOODBYE:
                self._server_left = True  # the end of the connection follows
                return None
            case Kind.REFUSAL:
                raise CodecError(f"the server refused: {messages.read_failure(frame)}")
        raise CodecError(f"damaged frame: a server sends none of kind {frame.kind}")

    def _finish(
        self,
        frame: Received,
        read: Callable[[Received], Any],
        finish: Callable[[Call, Any], None],
    ) -> Call | None:
        call = self._calls.pop(frame.call, None)
        if call is not None:
            try:
                finish(call, read(frame))
            except BaseException as error:  # noqa: BLE001 - it is the caller's: nobody else ends it
                call.fail(error)
        return call

    def _push(self, frame: Received) -> Call | None:
        call = self._calls.get(frame.call)
        if call is None:
            return None
        try:
            (chunk,) = messages.read_values(frame)
            if not call.push(chunk):
                self._end(call, lag())
        except Exception as error:  # noqa: BLE001 - it is the listener's
            self._end(call, error)
        return call


def _call_back(fn: Callable[[Any], None], argument: Any) -> None:
    try:
        fn(argument)
    except Exception:
        logger.exception("a callback of a channel raised")


_channels: weakref.WeakSet[LocalChannel] = weakref.WeakSet()  # to be told of a fork


def _forget_after_fork() -> None:
    for channel in list(_channels):
        channel.forget_after_fork()


register_at_fork(after_in_child=_forget_after_fork)
