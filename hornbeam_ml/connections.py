"""HTTP connections of uvicorn that tell when their client leaves."""

from __future__ import annotations

from typing import Any, Final

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from hornbeam_ml.entry import AsgiEntry

_MOST_PIPELINED: Final = 4
_MOST_HELD: Final = 65_536


class Connection(AutoHTTPProtocol):  # type: ignore[misc,valid-type] # chosen when it is imported
    """uvicorn's protocol, the requests of which enter the app through an `AsgiEntry`.

    The end of a connection, also a half-closed one, tells the entry. No message is taken from the
    app's own `receive`, and nothing polls.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app: Any
        self.entry = self.app = AsgiEntry(self.app)

    def data_received(self, data: bytes) -> None:
        """Handle what the client sent, and go on reading: only so the end is noticed."""
        AutoHTTPProtocol.data_received(self, data)  # for every packet: `super()` takes longer
        if self.flow.read_paused and self._has_room() and not self.transport.is_closing():
            self.flow.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that the client left, or that the connection was closed after its last response."""
        self.entry.leave()
        super().connection_lost(exc)

    def _has_room(self) -> bool:
        """Return whether to read on although uvicorn paused.

        It does after a body of more than 64 KiB, also when the whole of it is there, and when
        requests are pipelined.
        """
        if self.cycle is None or self.cycle.more_body:
            return False
        if hasattr(self, "pipeline"):  # httptools parses ahead
            return len(self.pipeline) < _MOST_PIPELINED
        return len(self.conn.trailing_data[0]) < _MOST_HELD  # h11 does not
