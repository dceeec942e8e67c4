"""A connection that neither reading nor writing waits on."""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from hornbeam_state.backends.redis.connections import SyncConnection

# Each call lets other threads run, and must wait for them after: large replies are read in large
# pieces. The memory for such a piece is mapped and unmapped each time: small ones are not.
_SMALL: Final = 64 * 1024
_LARGE: Final = 1024 * 1024
_LATER: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Wire:
    """The socket of an open connection, after its greeting. Owns the connection.

    Args:
        connection: One on which nothing is on its way.
    """

    def __init__(self, connection: SyncConnection) -> None:
        self._connection = connection
        self._socket: socket.socket = connection._sock  # noqa: SLF001 - there is no other way
        self._socket.setblocking(False)
        self._size = _SMALL

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._socket.fileno()

    def receive(self) -> bytes:
        """Return what has arrived, which may be nothing.

        Raises:
            OSError: the connection was lost, or closed by the server.
        """
        parts = []
        try:
            while True:
                data = self._socket.recv(self._size)
                if not data:
                    raise ConnectionError("the server closed it")
                self._size = _LARGE if len(data) == self._size else _SMALL
                parts.append(data)
                # What TLS has decrypted ahead makes no descriptor readable.
                if not (isinstance(self._socket, ssl.SSLSocket) and self._socket.pending()):
                    break
        except _LATER:
            pass
        return b"".join(parts)

    def send(self, output: bytearray) -> None:
        """Send as much as can be sent now, and remove it from `output`.

        Raises:
            OSError: the connection was lost.
        """
        try:
            while output:
                del output[: self._socket.send(output)]
        except _LATER:
            pass

    def hang_up(self) -> None:
        """Have whoever waits on it find it lost. From any thread."""
        with contextlib.suppress(OSError):  # it is being closed
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close it; in a child of the process that made it without a word to the server."""
        self._connection.disconnect()
