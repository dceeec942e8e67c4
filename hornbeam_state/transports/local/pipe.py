"""The server's end of a socket: frames in, frames out, on one event loop.

Nothing here waits. Who does not read what was sent is not read from either.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final, Protocol

from hornbeam_state.errors import CodecError, ConfigError
from hornbeam_state.transports.local.outbox import Outbox

if TYPE_CHECKING:
    import socket

    from hornbeam_state.transports.local.frames import Frame, FrameReader, Received

logger = logging.getLogger("hornbeam.transport")

_HIGH_BYTES: Final = 2**20  # so many unread bytes stop the reading
_LOW_BYTES: Final = 2**18  # so few let it go on
_LONGEST_TURN_S: Final = 0.001
_MOST_READS: Final = 4  # in a row, so that others get their turn


class Owner(Protocol):
    """Whom a pipe tells what happens."""

    def take(self, frame: Received) -> None:
        """Take a frame. A CodecError says that it makes no sense."""

    def refuse(self, error: Exception) -> None:
        """Take note that what arrives makes no sense."""

    def lose(self) -> None:
        """Take note that the pipe is closed, once."""


class Pipe:
    """A socket that does not block, on the running event loop.

    Args:
        sock: The socket.
        reader: Makes frames of what arrives.
        owner: Whom to tell.
    """

    def __init__(self, sock: socket.socket, reader: FrameReader, owner: Owner) -> None:
        self.closed = False
        self._sock = sock
        self._reader = reader
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._outbox = Outbox()
        self._reading = False
        self._writing = False  # as soon as the socket takes more
        self._last_round = 0.0
        self._flushing = False  # in the next round of the loop
        self._waiting: list[asyncio.Future[None]] = []  # for the peer to read
        self._resume()

    @property
    def unread(self) -> int:
        """How many bytes the socket has not taken."""
        return self._outbox.bytes

    def send(self, frame: Frame, *, at_once: bool = False) -> None:
        """Send a frame; with others of this round of the loop, unless it is to go at once."""
        if self.closed:
            return
        self._outbox.push(frame)
        if self._writing:
            return
        if at_once:
            self.flush()
        elif not self._flushing:
            self._flushing = True
            self._loop.call_soon(self.flush)

    async def drain(self) -> None:
        """Wait until the peer has read most of what was sent, or the pipe is closed.

        Now and then it waits a round of the loop, however fast the peer reads: who sends without
        an end, and waits for nothing else, would leave no time to anybody.
        """
        now = self._loop.time()
        if now - self._last_round > _LONGEST_TURN_S:
            await asyncio.sleep(0)
            self._last_round = self._loop.time()
        if self._outbox.bytes > _HIGH_BYTES:
            self.flush()
        if self._outbox.bytes > _HIGH_BYTES and not self.closed:
            waiter = self._loop.create_future()
            self._waiting.append(waiter)
            await waiter

    def flush(self) -> None:
        """Send what the socket takes."""
        self._flushing = False
        if self.closed:
            return
        try:
            empty = self._outbox.flush(self._sock)
        except OSError:
            self.close()
            return
        if empty is self._writing:
            self._writing = not empty
            if empty:
                self._loop.remove_writer(self._sock)
            else:
                self._loop.add_writer(self._sock, self.flush)
        if self._outbox.bytes > _HIGH_BYTES:
            self._pause()
        elif self._outbox.bytes <= _LOW_BYTES:
            self._resume()

    def close(self) -> None:
        """Close the socket; what it has not taken is lost."""
        if self.closed:
            return
        self._pause()
        if self._writing:
            self._loop.remove_writer(self._sock)
        self.closed = True
        self._sock.close()
        self._let_waiters_go()
        self._owner.lose()

    def _pause(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._sock)

    def _resume(self) -> None:
        if not self._reading:
            self._reading = True
            self._loop.add_reader(self._sock, self._read)
        if self._waiting:
            self._let_waiters_go()

    def _let_waiters_go(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        self._waiting.clear()

    def _read(self) -> None:
        try:
            for _ in range(_MOST_READS):
                buffer = self._reader.buffer()
                room = len(buffer)
                count = self._sock.recv_into(buffer)
                if not count:
                    self.close()
                    return
                for frame in self._reader.feed(count):
                    self._owner.take(frame)
                    if self.closed:
                        return
                if count < room:
                    return
        except BlockingIOError:
            pass
        except OSError:
            self.close()
        except (CodecError, ConfigError, MemoryError) as error:
            self._owner.refuse(error)
        except Exception:
            logger.exception("the connection of a client is closed by an internal error")
            self.close()
