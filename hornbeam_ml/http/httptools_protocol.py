"""uvicorn's protocol over httptools, bounded: httptools itself keeps whatever it is sent."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, ClassVar, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from hornbeam_ml.http.limits import TOO_LONG_FIELD, Limits, Refusal

_MOST_PIPELINED: Final = 4


class HttptoolsProtocol(HttpToolsProtocol):
    """Refuses requests that exceed the limits, also before they are complete.

    The head of a request is checked when it is complete, which is exact. Until then, and between
    two pieces of a body, what has come is bounded: by the longest part of a head and one packet.

    Attributes:
        limits: Of requests.
        keeps_alive: Whether connections are kept at all.
    """

    limits: ClassVar[Limits]
    keeps_alive: ClassVar[bool] = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._most_fields = self.limits.fields
        # Half of it: what a packet held behind a head that was not looked at is not counted.
        self._harmless = self.limits.harmless // 2 if self.keeps_alive else -1
        self._fed = 0  # bytes since a head that was not looked at, or since nothing was incomplete
        self._progress = 0  # how many of them came before the part that is incomplete
        self._fields: tuple[object, int] = (None, 0)
        self._refusal: Refusal | None = None
        self.url, self.headers = b"", []

    # The next two run for every request: three attributes and a list more than uvicorn's.

    def data_received(self, data: bytes) -> None:
        """Parse what the client sent."""
        self._fed += len(data)
        HttpToolsProtocol.data_received(self, data)
        if self._fed > self._harmless:
            self._watch()
        if self.flow.read_paused:
            self.on_reading_paused()

    def on_headers_complete(self) -> None:
        """Start the request, unless it exceeds a limit."""
        if self._fed <= self._harmless and len(self.headers) <= self._most_fields:
            self._fed = 0
        else:
            self._check_head()
        HttpToolsProtocol.on_headers_complete(self)
        # uvicorn would append the trailers of the body to the headers that the app looks at.
        self.headers = []

    def on_reading_paused(self) -> None:
        """Called when a packet leaves the connection with reading paused."""

    def is_receiving(self) -> bool:
        """Return whether a part of a request's head is there."""
        answered = None if self.cycle is None else self.cycle.scope
        return self.scope is not answered

    def last_cycle(self) -> Any:
        """Return the last request that was parsed, and its response."""
        return self.pipeline[0][0] if self.pipeline else self.cycle

    def may_read_ahead(self) -> bool:
        """Return whether there is room for another request behind the one that is answered."""
        return len(self.pipeline) < _MOST_PIPELINED

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body, the size of which nothing limits."""
        self._progress = self._fed
        HttpToolsProtocol.on_body(self, body)

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be parsed, after the responses that are still to come."""
        refusal, self._refusal = self._refusal or Refusal(400, msg), None
        cycle = self.cycle
        self.parser = _Deaf()  # type: ignore[assignment]
        if cycle is None or cycle.response_complete:
            self._send(refusal)
        elif not cycle.more_body:  # it is the next request: this one is answered
            cycle.keep_alive = False
        elif cycle.response_started or self.pipeline:
            self.transport.close()
        else:
            self._send(refusal)

    def _get_upgrade(self) -> bytes | None:
        self.headers = self.scope["headers"]  # type: ignore[assignment]
        return super()._get_upgrade()

    def _check_head(self) -> None:
        self._refusal = self.limits.refusal(self.parser.get_method(), self.url, self.headers)
        if self._refusal is not None:
            raise ValueError(self._refusal.reason)  # to the parser, which then fails

    def _watch(self) -> None:
        """Bound what the parser may keep of an incomplete head, chunk size or trailer."""
        if isinstance(self.parser, _Deaf):
            return
        cycle = self.cycle
        if cycle is not None and not self.keeps_alive:
            cycle.keep_alive = False  # the app starts later
        if cycle is not None and not cycle.more_body and cycle.scope is self.scope:
            self._fed = self._progress = 0
            return
        headers = self.headers
        if self._fields[0] is not headers or self._fields[1] != len(headers):
            self._fields, self._progress = (headers, len(headers)), self._fed
        refusal = self.limits.refusal(b"", self.url, headers)
        if refusal is None and self._fed - self._progress > self.limits.longest_part:
            refusal = TOO_LONG_FIELD
        if refusal is not None and not self.transport.is_closing():
            self.logger.warning("Invalid HTTP request received: %s", refusal.reason)
            self._refusal = refusal
            self.send_400_response(refusal.reason)

    def _send(self, refusal: Refusal) -> None:
        body = refusal.reason.encode()
        head = [
            STATUS_LINE[HTTPStatus(refusal.status)],
            *(b"%b: %b\r\n" % header for header in self.server_state.default_headers),
            b"content-type: text/plain; charset=utf-8\r\n",
            b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body),
        ]
        self.transport.write(b"".join([*head, body]))
        self.transport.close()


class _Deaf:
    """In place of a parser that failed: a client may go on sending, and is not heard."""

    def feed_data(self, data: bytes) -> None:
        """Ignore it."""
