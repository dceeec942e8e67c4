"""A client that counts what became of every request it sent."""

from __future__ import annotations

import http.client
import select
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from typing import Self

PATIENCE = 60.0
"""Seconds after which an answer counts as never coming."""


@dataclass
class Counts:
    """What became of the requests.

    Attributes:
        ok: Answered with 200 and the whole body.
        failed: Everything else but `unanswered`, in words: other answers, answers cut short,
            connections refused or lost, no answer in time. With a connection for each request
            also a connection that was closed without an answer.
        unanswered: Requests over a connection that had been idle after an earlier answer, and
            that the server closed without one byte of a response. It closed the connection while
            it was idle, as it may, and the request crossed that on the way: HTTP leaves the retry
            to the client, which sends it once more here. The retry has to be answered.
        closed_idle: Closes of an idle connection that were seen before the next request was sent.
    """

    ok: int = 0
    failed: list[str] = field(default_factory=list)
    unanswered: int = 0
    closed_idle: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.ok + other.ok,
            self.failed + other.failed,
            self.unanswered + other.unanswered,
            self.closed_idle + other.closed_idle,
        )


class _Client(threading.Thread):
    """Asks one thing after the other."""

    def __init__(self, url: str, *, keep_alive: bool, over: threading.Event) -> None:
        super().__init__(daemon=True)
        self.counts = Counts()
        self._parts = urlsplit(url)
        self._keep_alive = keep_alive
        self._over = over
        self._used = False
        self._connection = self._connect()

    def run(self) -> None:
        while not self._over.is_set():
            if self._used and self._was_closed():
                self.counts.closed_idle += 1
                self._reconnect()
            self._ask()
            if not self._keep_alive:
                self._reconnect()
        self._connection.close()

    def _ask(self) -> None:
        idle_before = self._used
        try:
            self._exchange()
        except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError) as error:
            # RemoteDisconnected: no byte of a response. A reset may come in the middle of one,
            # which shows only in `read`: see `_exchange`.
            self._reconnect()
            if idle_before:
                self.counts.unanswered += 1
                self._ask()
            else:
                self.counts.failed.append(repr(error))
        except (OSError, http.client.HTTPException) as error:
            self.counts.failed.append(repr(error))
            self._reconnect()

    def _exchange(self) -> None:
        connection = self._connection
        headers = {} if self._keep_alive else {"Connection": "close"}
        connection.request("GET", self._parts.path or "/", headers=headers)
        answer = connection.getresponse()
        try:
            body = answer.read()
        except OSError as error:
            raise http.client.HTTPException(f"cut short: {error!r}") from error
        if answer.status != 200 or not body:
            self.counts.failed.append(f"{answer.status} {body[:100]!r}")
        else:
            self.counts.ok += 1
        self._used = connection.sock is not None
        if not self._used:
            self._reconnect()

    def _was_closed(self) -> bool:
        # Nobody owes us anything: what can be read is the end.
        return bool(select.select([self._connection.sock], [], [], 0)[0])

    def _reconnect(self) -> None:
        self._connection.close()
        self._connection, self._used = self._connect(), False

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._parts.netloc, timeout=PATIENCE)


class CountingClient:
    """Some connections under load, for the length of a `with` block; then `counts` is there.

    Args:
        url: What they ask for, again and again.
        connections: How many at a time.
        keep_alive: Whether a connection serves more than one request.
    """

    def __init__(self, url: str, connections: int, *, keep_alive: bool) -> None:
        self.counts = Counts()
        self._over = threading.Event()
        self._clients = [
            _Client(url, keep_alive=keep_alive, over=self._over) for _ in range(connections)
        ]

    def __enter__(self) -> Self:
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._over.set()
        end = time.monotonic() + PATIENCE + 5
        for client in self._clients:
            client.join(max(0.0, end - time.monotonic()))
            self.counts += client.counts
            if client.is_alive():
                self.counts.failed.append("a client still waits")

    def so_far(self) -> int:
        """Return how many requests were answered until now."""
        return sum(client.counts.ok for client in self._clients)

    def failures(self) -> list[str]:
        """Return what failed until now."""
        return [line for client in self._clients for line in client.counts.failed]
