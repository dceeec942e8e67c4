"""HTTP connections of uvicorn that tell when their client leaves, and that end without a loss."""

from __future__ import annotations

import contextlib
import fcntl
import termios
import weakref
from typing import TYPE_CHECKING, Any, ClassVar, Final

from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.server import ServerState

from hornbeam_ml.http.entry import AsgiEntry
from hornbeam_ml.http.parsers import HttpProtocol

if TYPE_CHECKING:
    from hornbeam_ml.http.access_log import Observer

_GOODBYE_S: Final = 1.0

_LEAVING: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\n"
    b"connection: close\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n"
)


class Connections(ServerState):
    """What the connections of a server share.

    Attributes:
        expected: Connections that were accepted and are not made yet, such as those in the middle
            of a TLS handshake.
        linger: When the server leaves: how many seconds an idle connection stays open, for a
            request that its client may be sending. Until then None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.expected: weakref.WeakSet[Connection] = weakref.WeakSet()
        self.linger: float | None = None

    def leave(self, linger: float) -> None:
        """Have every connection end as soon as it owes its client nothing."""
        self.linger = linger
        self.default_headers = [*self.default_headers, CLOSE_HEADER]
        for connection in list(self.connections):
            connection.shutdown()


class Connection(HttpProtocol):
    """uvicorn's protocol, the requests of which enter the app through an `AsgiEntry`.

    The end of a connection, also a half-closed one, tells the entry. No message is taken from the
    app's own `receive`, and nothing polls.

    When the server leaves, uvicorn closes a connection whose request it has not read yet. This one
    stays for a moment and answers with ``Connection: close``.

    Attributes:
        observer: Told of every request and response; None: nobody wants to know.
    """

    observer: ClassVar[Observer | None] = None
    server_state: Connections
    timeout_keep_alive: Any
    timeout_keep_alive_task: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app: Any
        self.entry = AsgiEntry(self.app)
        self.app = self.entry if self.observer is None else self.observer.http(self.entry)
        self.server_state.expected.add(self)

    def connection_made(self, transport: Any) -> None:
        """Begin, also when the server leaves by now."""
        super().connection_made(transport)
        self.server_state.expected.discard(self)
        if self.server_state.linger is not None:
            self.shutdown()

    def on_reading_paused(self) -> None:
        """Go on reading: only so the end of the connection is noticed."""
        if self._has_room() and not self.transport.is_closing():
            self.flow.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that the client left, or that the connection was closed after its last response."""
        self.entry.leave()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Leave: the server takes no more connections. Nothing that was begun is cut off."""
        linger = self.server_state.linger or 0.0
        self.timeout_keep_alive = min(self.timeout_keep_alive, linger)
        if self._is_answering():
            self._announce_close()
        elif not self.is_receiving():
            self._expire_within(linger)

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection. A server that leaves waits for no client to agree to it.

        With TLS the other side is to close, too, and a pool of connections looks at none of those
        that are idle.
        """
        super().timeout_keep_alive_handler()
        if self.server_state.linger is not None:
            self.loop.call_later(_GOODBYE_S, self._drop)

    def handle_websocket_upgrade(self, *args: Any) -> None:
        """Become a WebSocket, unless the server leaves."""
        if self.server_state.linger is None:
            super().handle_websocket_upgrade(*args)
        else:
            self.transport.write(_LEAVING)
            self.transport.close()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _announce_close(self) -> None:
        """Say in the last response that it is the last; one that has begun cannot."""
        last = self.last_cycle()
        if not last.response_started:
            last.default_headers = self.server_state.default_headers

    def _expire_within(self, linger: float) -> None:
        """Close the connection unless a request comes before."""
        timer = self.timeout_keep_alive_task
        if timer is not None:
            linger = min(linger, timer.when() - self.loop.time())
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(
            max(0.0, linger), self.timeout_keep_alive_handler
        )

    def _drop(self) -> None:
        """End the connection if all that was sent has arrived; the transport's own count is short.

        What a transport holds back it hands to the kernel as soon as there is room.
        """
        with contextlib.suppress(OSError, ValueError):  # closed
            socket = self.transport.get_extra_info("socket")
            if not any(fcntl.ioctl(socket.fileno(), termios.TIOCOUTQ, bytes(4))):
                self.transport.abort()

    def _has_room(self) -> bool:
        """Return whether to read on although uvicorn paused.

        It does after a body of more than 64 KiB, also when the whole of it is there, and when
        requests are pipelined.
        """
        return self.cycle is not None and not self.cycle.more_body and self.may_read_ahead()
