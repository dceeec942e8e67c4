"""uvicorn's protocol over h11, with gunicorn's limits and as strict as the one over httptools."""

from __future__ import annotations

from typing import Any, ClassVar, Final

import h11
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from hornbeam_ml.http.limits import (
    TOO_LONG_FIELD,
    TOO_LONG_LINE,
    TOO_MANY_FIELDS,
    Limits,
    Refusal,
)

_BOTH_LENGTHS = Refusal(400, "both Content-Length and Transfer-Encoding")
_NO_TUNNEL = Refusal(400, "CONNECT is for proxies")
_MOST_HELD: Final = 65_536


class LimitedH11Protocol(H11Protocol):
    """Refuses requests that exceed the limits, also before they are complete.

    Attributes:
        limits: Of requests.
        keeps_alive: Whether connections are kept at all.
    """

    limits: ClassVar[Limits]
    keeps_alive: ClassVar[bool] = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn: _LimitedConnection = _LimitedConnection(self.limits)

    def data_received(self, data: bytes) -> None:
        """Parse what the client sent."""
        super().data_received(data)
        if self.flow.read_paused:
            self.on_reading_paused()

    def on_reading_paused(self) -> None:
        """Called when a packet leaves the connection with reading paused."""

    def is_receiving(self) -> bool:
        """Return whether a part of a request's head is there."""
        return bool(self.conn.trailing_data[0])

    def last_cycle(self) -> Any:
        """Return the last request that was parsed, and its response."""
        return self.cycle  # h11 parses none before this one is answered

    def may_read_ahead(self) -> bool:
        """Return whether there is room for another request behind the one that is answered."""
        return len(self.conn.trailing_data[0]) < _MOST_HELD

    def handle_events(self) -> None:
        """Handle what was parsed."""
        super().handle_events()
        cycle = self.cycle
        if not self.keeps_alive and cycle is not None and CLOSE_HEADER not in cycle.default_headers:
            cycle.default_headers = [*cycle.default_headers, CLOSE_HEADER]

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be parsed; where a response has begun, only close."""
        if self.conn.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            self.transport.close()
            return
        refusal = self.conn.refusal or Refusal(400, msg)
        body = refusal.reason.encode()
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", b"%d" % len(body)),
            CLOSE_HEADER,
        ]
        reason = STATUS_PHRASES[refusal.status]
        for event in (
            h11.Response(status_code=refusal.status, headers=headers, reason=reason),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class _LimitedConnection(h11.Connection):
    """Fails where a request exceeds a limit.

    Attributes:
        refusal: Why it failed, where that was not h11's own decision.
    """

    def __init__(self, limits: Limits) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size=limits.longest_head)
        self.refusal: Refusal | None = None
        self._limits = limits

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.refusal = self._refusal_of(event)
        elif event is h11.NEED_DATA and self.their_state is h11.IDLE:
            self.refusal = self._refusal_of_part(self.trailing_data[0])
        if self.refusal is not None:
            raise h11.RemoteProtocolError(self.refusal.reason, self.refusal.status)
        return event

    def _refusal_of(self, request: h11.Request) -> Refusal | None:
        if request.method == b"CONNECT":
            return _NO_TUNNEL  # uvicorn cannot answer it
        headers = list(request.headers)
        names = {name for name, _ in headers}
        if {b"content-length", b"transfer-encoding"} <= names:
            # h11 would believe the latter; something in front of us, maybe not
            return _BOTH_LENGTHS
        return self._limits.refusal(request.method, request.target, headers)

    def _refusal_of_part(self, received: bytes) -> Refusal | None:
        line, end, rest = received.partition(b"\n")
        if len(line) > self._limits.line:
            return TOO_LONG_LINE
        if rest.count(b"\n") > self._limits.fields:
            return TOO_MANY_FIELDS
        unfinished = rest.rpartition(b"\n")[2]
        return TOO_LONG_FIELD if end and len(unfinished) > self._limits.field_size else None
