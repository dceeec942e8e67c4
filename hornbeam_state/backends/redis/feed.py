"""A connection on which a server tells what changes in the cache, and whether it is still there.

`CLIENT TRACKING` in broadcast mode, on a connection of its own: the server names every entry that
anyone writes, whatever connection it was read over. In its other mode a server remembers what
each connection has read and forgets it with the connection, so that what is near would hang on
each connection of each pool. Broadcasting costs it about 2 microseconds for each key written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from redis.exceptions import ResponseError

from hornbeam_state.backends.redis.steps import names

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hornbeam_state.backends.redis.connections import SyncConnection

T = TypeVar("T")

PING_EVERY: Final = 1.0

_AT_A_TIME: Final = 256  # messages, before it is another connection's turn
_PREFIXES: Final = names(b"c:")
_SKIP: Final = len(_PREFIXES[0])
_TRACK: Final = (
    *(b"CLIENT", b"TRACKING", b"ON", b"BCAST"),
    *(word for prefix in _PREFIXES for word in (b"PREFIX", prefix)),
)


class Pulse:
    """Decides when to ask a server whether it is there, and when it is not. Takes the time.

    Args:
        timeout: Seconds in which it answers.
        now: When it was last heard.
    """

    def __init__(self, timeout: float, now: float) -> None:
        self._timeout = timeout
        self._asked: float | None = None
        self._due = now + PING_EVERY

    def next(self) -> float:
        """Return when there is something to do."""
        return self._due if self._asked is None else self._asked + self._timeout

    def must_ask(self, now: float) -> bool:
        """Return whether it is time to ask, which the caller then does."""
        if self._asked is not None or now < self._due:
            return False
        self._asked = now
        return True

    def heard(self, now: float) -> None:
        """Note that the server said something, be it not the answer: it is there."""
        if self._asked is not None:
            self._asked = None
            self._due = now + PING_EVERY

    def is_silent(self, now: float) -> bool:
        """Return whether the server was asked and has not answered in time."""
        return self._asked is not None and now >= self._asked + self._timeout


class Feed:
    """What a server tells about the cache. Every method may raise what a connection raises.

    Args:
        connection: One of the caller's own, of RESP version 3, which it closes in the end.
        timeout: Seconds in which the server answers.
        now: The time.

    Raises:
        ResponseError: the server does not offer this, or not to this user.
    """

    def __init__(self, connection: SyncConnection, timeout: float, now: float) -> None:
        self._connection = connection
        self._pulse = Pulse(timeout, now)
        self.behind = False
        driver = cast("Any", connection)
        # Left alone, the parser would swallow these messages.
        driver._parser.set_invalidation_push_handler(_untouched)  # noqa: SLF001 - no other way
        self._descriptor: int = driver._sock.fileno()  # noqa: SLF001 - likewise
        self._send(*_TRACK)
        connection.read_response()

    def fileno(self) -> int:
        """Return the descriptor that is readable when the server said something.

        What it said may lie in the connection already: see `behind`.
        """
        return self._descriptor

    def next(self) -> float:
        """Return when to call `keep_up` at the latest."""
        return self._pulse.next()

    def keep_up(self, now: float) -> None:
        """Ask the server whether it is there, if it is time.

        Raises:
            TimeoutError: it did not answer in time.
        """
        if self._pulse.is_silent(now):
            raise TimeoutError("the server does not answer")
        if self._pulse.must_ask(now):
            self._send(b"PING")

    def changes(self, now: float) -> Iterator[list[bytes] | None]:
        """Yield the keys that have changed, None if it was all of them.

        To be called when there is something to read. `behind` tells after it whether there is more.
        """
        self._pulse.heard(now)
        for _ in range(_AT_A_TIME):
            message = self._read()
            if isinstance(message, list) and message[0] == b"invalidate":
                yield None if message[1] is None else [name[_SKIP:] for name in message[1]]
            self.behind = self._connection.can_read()
            if not self.behind:
                return

    def _read(self) -> Any:
        try:
            return self._connection.read_response(push_request=True)
        except ResponseError as error:  # to a PING: also an answer
            return error

    def _send(self, *words: bytes) -> None:
        data = self._connection.pack_command(*words)
        self._connection.send_packed_command(data, check_health=False)


def _untouched(message: T) -> T:
    return message
