"""HTTP/1.1 by hand, for tests: exact bytes out, one response after the other in."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass

LIMIT_S = 20


@dataclass
class Response:
    """What a server answered, the framing taken off."""

    version: str
    status: int
    headers: list[tuple[str, str]]
    body: bytes = b""

    def header(self, name):
        """Return the one value of a header, None without it."""
        values = [value for key, value in self.headers if key == name]
        assert len(values) <= 1, self.headers
        return values[0] if values else None

    def json(self):
        return json.loads(self.body)


class Wire:
    """A connection. Reading fails when nothing comes for a long time."""

    def __init__(self, address, tls=None, hostname="localhost"):
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.socket = socket.socket(family)
        self.socket.settimeout(LIMIT_S)
        try:
            self.socket.connect(address)
            if tls is not None:
                self.socket = tls.wrap_socket(self.socket, server_hostname=hostname)
        except OSError:
            self.socket.close()
            raise
        self.received = bytearray()

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        self.socket.close()

    def send(self, *parts):
        """Send texts or bytes, each by itself; return self."""
        for part in parts:
            self.socket.sendall(part.encode() if isinstance(part, str) else part)
        return self

    def get(self, path="/echo", *headers):
        """Send a request and return its response."""
        self.send("\r\n".join([f"GET {path} HTTP/1.1", "Host: x", *headers, "", ""]))
        return self.response()

    def response(self, method="GET"):
        """Read one response, interim ones included, by what its headers say of its length."""
        head = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        version, status, *_ = head[0].split(" ", 2)
        pairs = [line.partition(":") for line in head[1:-2]]
        headers = [(name.lower(), value.strip()) for name, _, value in pairs]
        response = Response(version, int(status), headers)
        if method == "HEAD" or response.status < 200 or response.status in {204, 304}:
            return response
        if response.header("transfer-encoding") == "chunked":
            chunks = []
            while size := int(self._until(b"\r\n"), 16):
                chunks.append(self._exactly(size))
                assert self._exactly(2) == b"\r\n"
            assert self._exactly(2) == b"\r\n"
            response.body = b"".join(chunks)
        elif (length := response.header("content-length")) is not None:
            response.body = self._exactly(int(length))
        else:
            response.body = self.rest()
        return response

    def rest(self):
        """Read until the server closes, and return everything."""
        while part := self._receive():
            self.received += part
        return self._take(len(self.received))

    def closed(self):
        """Wait until the server closes; return whether nothing came before."""
        return self.rest() == b""

    def _receive(self):
        try:
            return self.socket.recv(1 << 16)
        except ConnectionResetError:  # it closed before it had read everything
            return b""

    def _until(self, end):
        while (start := self.received.find(end)) < 0:
            self._more()
        return self._take(start + len(end))

    def _exactly(self, size):
        while len(self.received) < size:
            self._more()
        return self._take(size)

    def _take(self, size):
        data = bytes(self.received[:size])
        del self.received[:size]
        return data

    def _more(self):
        part = self._receive()
        if not part:
            raise ConnectionError(f"closed after {self.received!r}")
        self.received += part
