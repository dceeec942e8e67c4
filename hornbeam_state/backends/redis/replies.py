"""The wire format, RESP2: commands as bytes, and replies from bytes that arrive in pieces.

redis-py's own parsers read from a socket and wait for the rest of a reply; here one thread reads
many sockets and must not wait for any. `quick_replies` uses hiredis where it is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

from redis.exceptions import InvalidResponse, ResponseError

try:
    import hiredis
except ImportError:
    hiredis = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Sequence

_SIMPLE, _ERROR, _INTEGER, _BULK, _ARRAY = b"+-:$*"
_END: Final = b"\r\n"


def command(*words: bytes) -> bytes:
    """Return the bytes of a command."""
    if hiredis is not None:
        return hiredis.pack_command(words)  # type: ignore[no-any-return, arg-type]
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in words)


class Replies:
    """Takes replies apart: `bytes`, `int`, None, lists of these, and `ResponseError` as a value."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self._needed = 0

    def feed(self, data: bytes) -> list[Any]:
        """Take bytes that arrived; return the replies that they complete.

        Raises:
            InvalidResponse: this is not RESP2.
        """
        self._parts.append(data)
        self._size += len(data)
        if self._size < self._needed:  # a large reply is put together once
            return []
        buffer = b"".join(self._parts)
        replies, at = [], 0
        try:
            while at < len(buffer):
                reply, at = _reply(buffer, at)
                replies.append(reply)
            self._needed = 0
        except _IncompleteError as incomplete:
            self._needed = incomplete.needed - at
        self._parts = [buffer[at:]]
        self._size = len(buffer) - at
        return replies


class Feed(Protocol):
    """What takes replies apart."""

    def feed(self, data: bytes) -> list[Any]:
        """Take bytes that arrived; return the replies that they complete; see `Replies.feed`."""
        ...


class HiredisReplies:
    """The same as `Replies`, by hiredis."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader(protocolError=InvalidResponse, replyError=ResponseError)

    def feed(self, data: bytes) -> list[Any]:
        """See `Replies.feed`."""
        self._reader.feed(data)
        replies = []
        while (reply := self._reader.gets()) is not False:  # which RESP2 does not have
            replies.append(reply)
        return replies


def quick_replies() -> Feed:
    """Return what takes replies apart fastest here."""
    return Replies() if hiredis is None else HiredisReplies()


class _IncompleteError(Exception):
    """The reply ends beyond what has arrived: after `needed` bytes at the earliest."""

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


def _reply(buffer: bytes, at: int) -> tuple[Any, int]:
    """Return the reply that begins at `at`, and where the next one does."""
    end = buffer.find(_END, at)
    if end < 0:
        raise _IncompleteError(len(buffer) + 1)
    kind, line, after = buffer[at], buffer[at + 1 : end], end + len(_END)
    if kind == _SIMPLE:
        return line, after
    if kind == _ERROR:
        return ResponseError(line.decode("utf-8", "replace")), after
    number = _number(line)
    if kind == _INTEGER:
        return number, after
    if kind == _BULK:
        return _bulk(buffer, after, number)
    if kind == _ARRAY:
        return _array(buffer, after, number)
    raise InvalidResponse("Protocol Error: not a reply")


def _bulk(buffer: bytes, at: int, length: int) -> tuple[bytes | None, int]:
    if length < 0:
        return None, at
    after = at + length + len(_END)
    if len(buffer) < after:
        raise _IncompleteError(after)
    return buffer[at : at + length], after


def _array(buffer: bytes, at: int, length: int) -> tuple[Sequence[Any] | None, int]:
    if length < 0:
        return None, at
    values = []
    for _ in range(length):
        value, at = _reply(buffer, at)
        values.append(value)
    return values, at


def _number(line: bytes) -> int:
    try:
        return int(line)
    except ValueError:
        raise InvalidResponse("Protocol Error: a number was expected") from None
