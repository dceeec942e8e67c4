"""The client's end of a connection: any thread sends, one thread of its own does the rest.

A sender writes what the socket takes at once. What it does not take is left to the thread, which
also reads, and sees to whatever else the owner of the link has to do in time.
"""

from __future__ import annotations

import logging
import select
import socket
import threading
import time
from math import inf
from typing import TYPE_CHECKING, Final, Protocol

from hornbeam_state.backends.readiness import Readiness
from hornbeam_state.errors import CodecError, ConfigError, DeadlineExceeded, Overloaded
from hornbeam_state.transports.local.outbox import Outbox

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hornbeam_state.transports.local.frames import Frame, FrameReader, Received

logger = logging.getLogger("hornbeam.transport")

_MOST_WAITING: Final = 2**26
_LONGEST_POLL_S: Final = 3600.0
_JOIN_S: Final = 2.0


class Owner(Protocol):
    """Whom a link tells what happens, on its thread."""

    def receive(self, frames: Iterable[Received]) -> None:
        """Take frames that arrived. What it raises ends the link."""

    def tend(self) -> float:
        """Do what is due; return in how many seconds it is to be called again, at the latest."""
        ...

    def lose(self, error: BaseException | None) -> None:
        """Take note that the link ended, once: None: it was closed."""


class LinkLost(Exception):
    """Nothing can be sent any more."""


class Link:
    """A connected socket, its outbox, and the thread that looks after both.

    Args:
        sock: The socket, which does block.
        reader: Makes frames of what arrives; it may hold some bytes already.
        owner: Whom to tell.
    """

    def __init__(self, sock: socket.socket, reader: FrameReader, owner: Owner) -> None:
        self.lost = False
        self._sock = sock
        self._reader = reader
        self._owner = owner
        self._bell: Readiness | None = Readiness()
        self._lock = threading.Lock()  # of the outbox and of what follows
        self._room = threading.Condition(self._lock)
        self._outbox = Outbox()
        self._stuck = False  # the socket took no more: the thread goes on
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="hornbeam-link", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller runs on the thread of the link, and must not wait for it."""
        return threading.current_thread() is self._thread

    def send(self, frame: Frame, *, deadline: float | None = None, bounded: bool = True) -> None:
        """Send a frame, behind those before it. Thread-safe.

        Args:
            frame: The frame.
            deadline: Wait so long for room, by the monotonic clock; None: do not wait.
            bounded: Whether there has to be room.

        Raises:
            LinkLost: the link has ended; not a byte was sent.
            Overloaded: too many bytes wait.
            DeadlineExceeded: they did for too long.
        """
        with self._lock:
            if bounded and self._outbox.bytes:
                self._await_room(frame, deadline)
            if self.lost:
                raise LinkLost
            self._outbox.push(frame)
            if not self._stuck:
                self._flush()
                if self._stuck:
                    self.wake()

    def unsend(self, frame: Frame) -> bool:
        """Take a frame back; return whether not a byte of it was sent. Thread-safe."""
        with self._lock:
            return self._outbox.remove(frame)

    def wake(self) -> None:
        """Have the thread call `tend` soon. Takes no lock: a finalizer may call it."""
        bell = self._bell
        if bell is not None:
            bell.set()

    def close(self) -> None:
        """End the link, and wait a moment for its thread."""
        self._closing = True
        self.wake()
        if not self.is_own_thread:
            self._thread.join(_JOIN_S)

    def forget_after_fork(self) -> None:
        """In a forked child: let go of what the parent uses. Its socket is closed already."""
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._outbox = Outbox()
        self._bell = None
        self._closing = self.lost = True

    def _await_room(self, frame: Frame, deadline: float | None) -> None:
        def has_room() -> bool:
            waiting = self._outbox.bytes
            return self.lost or not waiting or waiting + frame.size <= _MOST_WAITING

        if has_room():
            return
        if deadline is None:
            raise Overloaded.refusal(f"{self._outbox.bytes} bytes wait to be sent to the server")
        timeout = None if deadline == inf else max(0.0, deadline - time.monotonic())
        timeout = None if timeout is None else min(timeout, threading.TIMEOUT_MAX)
        if not self._room.wait_for(has_room, timeout):
            raise DeadlineExceeded("the server did not read the calls before it in time")

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            self._owner.receive(self._reader.feed(0))
            self._serve()
        except (OSError, CodecError, ConfigError) as raised:
            error = raised
        except BaseException as raised:
            logger.exception("a connection ended by an internal error")
            error = raised
        finally:
            self._end(error)

    def _serve(self) -> None:
        if self._bell is None:  # it ended before it began
            return
        poller = select.poll()
        poller.register(self._bell, select.POLLIN)
        own = self._sock.fileno()
        poller.register(own, select.POLLIN)
        writing = False
        while not self._closing:
            if writing is not self._stuck:
                writing = not writing
                poller.modify(own, select.POLLIN | (select.POLLOUT if writing else 0))
            seconds = min(self._owner.tend(), _LONGEST_POLL_S)
            for descriptor, event in poller.poll(1000 * max(0.0, seconds)):
                if descriptor != own:
                    self._bell.clear()
                    continue
                if event & select.POLLOUT:
                    self._write()
                if event & ~select.POLLOUT:
                    self._read()

    def _flush(self) -> None:
        try:
            self._stuck = not self._outbox.flush(self._sock)
        except OSError:
            # The server is gone. What it said before is still to be read, and then the end.
            self._stuck = False

    def _write(self) -> None:
        with self._lock:
            self._flush()
            self._room.notify_all()

    def _read(self) -> None:
        try:
            count = self._sock.recv_into(self._reader.buffer(), 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        if not count:
            raise ConnectionResetError("the server closed the connection")
        self._owner.receive(self._reader.feed(count))

    def _end(self, error: BaseException | None) -> None:
        with self._lock:
            self.lost = True
            self._sock.close()
            self._room.notify_all()
        self._bell = None
        self._owner.lose(None if self._closing else error)
