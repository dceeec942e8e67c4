"""A cheap HTTP client for asyncio: one connection, one request at a time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

END_OF_HEADERS = b"\r\n\r\n"


@dataclass(frozen=True)
class Answer:
    """What came back; a status of 0 means that the connection ended first."""

    status: int
    body: bytes = b""
    retry_after: bool = False


class Connection(asyncio.Protocol):
    """A kept connection to a server that says how long its answers are."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.received = bytearray()
        self.answer: asyncio.Future[Answer] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def send(self, request: bytes) -> asyncio.Future[Answer]:
        """Send a request; the future ends with its answer, and is the last one's until then."""
        self.answer = asyncio.get_running_loop().create_future()
        if self.transport.is_closing():
            self._finish(Answer(0))
        else:
            self.transport.write(request)
        return self.answer

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, found, body = self.received.partition(END_OF_HEADERS)
        if not found:
            return
        headers = bytes(head).lower()
        length = int(headers.partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(body) >= length:
            self.received.clear()
            status = int(headers[9:12])
            self._finish(Answer(status, bytes(body), b"\r\nretry-after:" in headers))

    def connection_lost(self, _exc: Exception | None) -> None:
        self._finish(Answer(0))

    def _finish(self, answer: Answer) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_result(answer)


async def connect(port: int) -> Connection:
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, "127.0.0.1", port)
    return connection


def post(path: str, body: bytes) -> bytes:
    """Return the bytes of a request."""
    return (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode() + body
