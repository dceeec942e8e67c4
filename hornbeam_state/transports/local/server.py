"""The server: a listening socket, and the clients that came."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from typing import TYPE_CHECKING, Any, Final

from hornbeam_state.errors import MISSING, ConfigError
from hornbeam_state.transports.local import messages, sockets
from hornbeam_state.transports.local.connection import Connection
from hornbeam_state.transports.local.frames import MOST_BYTES
from hornbeam_state.transports.local.messages import Kind

if TYPE_CHECKING:
    import socket
    from pathlib import Path

    from hornbeam_state.transports.base import Handler

logger = logging.getLogger("hornbeam.transport")

MOST_CALLS: Final = 4096
_MOST_ACCEPTED: Final = 16  # in a row, so that calls get their turn
_NO_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_PAUSE_S: Final = 0.2
_LONGEST_CANCEL_S: Final = 2.0


class Server:
    """Answers the calls of processes of this machine and user. Not thread-safe.

    Args:
        path: Where to listen: a file in a directory that is closed to other users.
        handler: What to do with calls.
        most_calls: How many calls of one client run at a time; more are refused: `Overloaded`.
        most_bytes: The largest message, and how much the running calls of one client may hold.
    """

    def __init__(
        self,
        path: Path,
        handler: Handler,
        *,
        most_calls: int = MOST_CALLS,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.handler = handler
        self.most_calls = most_calls
        self.most_bytes = most_bytes
        self.closing = False
        self._path = path
        self._note: Any = MISSING
        self._listener: socket.socket | None = None
        self._identity: tuple[int, int] | None = None
        self._connections: set[Connection] = set()
        self._clients: set[Connection] = set()  # those that were greeted

    @property
    def clients(self) -> int:
        """How many clients are connected."""
        return len(self._clients)

    async def start(self) -> None:
        """Listen, and answer on the running event loop.

        Raises:
            ConfigError: the path is too long, its directory is not ours alone, somebody listens
                there, or the server was started before.
        """
        if self._listener is not None or self.closing:
            raise ConfigError("a server starts once: make another")
        listener = sockets.listen(self._path)
        status = self._path.stat()
        self._identity = (status.st_dev, status.st_ino)
        self._listener = listener
        self._accept_on()

    def announce(self, note: Any) -> None:
        """Send a small value to all clients, and the latest to each that comes.

        Raises:
            CodecError: it cannot be encoded.
        """
        messages.value(Kind.NOTE, 0, note)  # refused here, and not when a client comes
        self._note = note
        for connection in list(self._clients):
            connection.pipe.send(messages.value(Kind.NOTE, 0, note))

    async def close(self, *, grace: float = 0.0) -> None:
        """End, for good. Closing again does nothing.

        No new client is served, and new calls are refused: `NodeDown`, not sent.

        Args:
            grace: Seconds to wait for the calls that run, and for their answers to be read. Then
                they are cancelled.
        """
        self.closing = True
        self._stop_listening()
        deadline = asyncio.get_running_loop().time() + grace
        await self._finish(deadline)
        tasks = self._tasks()
        for connection in list(self._connections):
            connection.leave()
        if tasks:
            _, left = await asyncio.wait(tasks, timeout=_LONGEST_CANCEL_S)
            if left:
                logger.warning("%d calls did not end when they were cancelled", len(left))

    # What the connections tell.

    def welcome(self, connection: Connection) -> None:
        """Take note of a client that was greeted."""
        self._clients.add(connection)
        if self._note is not MISSING:
            connection.pipe.send(messages.value(Kind.NOTE, 0, self._note))

    def forget(self, connection: Connection) -> None:
        """Take note that a connection ended."""
        self._connections.discard(connection)
        self._clients.discard(connection)

    def _tasks(self) -> list[asyncio.Task[None]]:
        return [task for connection in self._connections for task in connection.calls]

    async def _finish(self, deadline: float) -> None:
        """Wait until nothing runs and everything is read, or until the deadline."""
        time = asyncio.get_running_loop().time
        while (left := deadline - time()) > 0:
            if tasks := self._tasks():
                await asyncio.wait(tasks, timeout=left)
            elif any(connection.pipe.unread for connection in self._connections):
                await asyncio.sleep(min(left, 0.005))
            else:
                return

    # Listening.

    def _accept_on(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _stop_listening(self) -> None:
        listener, self._listener = self._listener, None
        if listener is None:
            return
        asyncio.get_running_loop().remove_reader(listener)
        # First the file: as long as somebody listens there, no other server takes the place.
        with contextlib.suppress(OSError):
            status = self._path.stat()
            if (status.st_dev, status.st_ino) == self._identity:
                self._path.unlink()
        listener.close()

    def _accept(self) -> None:
        loop, listener = asyncio.get_running_loop(), self._listener
        if listener is None:
            return
        for _ in range(_MOST_ACCEPTED):
            try:
                sock = sockets.accept(listener)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _NO_DESCRIPTORS:
                    logger.warning("cannot take a client: %s", error.strerror)
                    loop.remove_reader(listener)
                    loop.call_later(_PAUSE_S, self._accept_on)
                    return
                continue  # that client left again
            self._serve(sock)

    def _serve(self, sock: socket.socket) -> None:
        try:
            uid = sockets.peer_uid(sock)
        except OSError:
            sock.close()
            return
        if uid not in (os.geteuid(), 0):
            logger.warning("a process of user id %d is not served", uid)
            sock.close()
            return
        self._connections.add(Connection(sock, self))
