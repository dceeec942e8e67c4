"""What frames mean: greetings, calls and their answers."""

from __future__ import annotations

from enum import IntEnum
from math import inf
from typing import TYPE_CHECKING, Any, Final

from hornbeam_state import codec
from hornbeam_state.errors import CodecError
from hornbeam_state.transports.base import Request
from hornbeam_state.transports.failures import dump_failure, load_failure
from hornbeam_state.transports.local.frames import Frame

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hornbeam_state.transports.local.frames import Received

MOST_GREETING_BYTES: Final = 2**16
"""The largest frame before the greetings are over."""


class Kind(IntEnum):
    """What a frame says."""

    HELLO = 1  # by the client: the largest frame it takes, what it says of itself
    CALL = 2  # target, method, options and timeout; then the values
    STREAM = 3  # the same
    CANCEL = 4  # nothing more
    WELCOME = 16  # by the server: as HELLO
    REFUSAL = 17  # an error in place of a WELCOME
    NOTE = 18  # a value for every client
    RESULTS = 19  # of a CALL
    CHUNK = 20  # of a STREAM
    END = 21  # of a STREAM; nothing more
    FAILURE = 22  # an error: the end of a CALL or STREAM
    GOODBYE = 23  # what was not answered has not begun and never will; nothing follows


def greeting(kind: Kind, most_bytes: int, words: Mapping[str, Any]) -> Frame:
    """Return a HELLO or WELCOME.

    Raises:
        CodecError: it cannot be encoded, or is too large.
    """
    frame = Frame(kind, 0, ([codec.encode(most_bytes)], [codec.encode(dict(words))]))
    if frame.size > MOST_GREETING_BYTES:
        raise CodecError(f"a greeting of {frame.size} bytes: {MOST_GREETING_BYTES} are the most")
    return frame


def read_greeting(frame: Received) -> tuple[int, dict[str, Any]]:
    """Return what a HELLO or WELCOME says: the largest frame, and the words.

    Raises:
        CodecError: it is damaged.
    """
    values = [codec.decode(part) for part in frame.parts]
    match values:
        case [int(most_bytes), dict(words)]:
            return most_bytes, words
    raise CodecError("damaged frame: it is no greeting")


def call(kind: Kind, number: int, request: Request) -> Frame:
    """Return a CALL or STREAM.

    Raises:
        CodecError: an argument cannot be encoded.
    """
    timeout = None if request.timeout == inf else float(request.timeout)
    head = codec.encode([request.target, request.method, dict(request.options), timeout])
    return Frame(kind, number, [[head], *map(codec.encode_parts, request.values)])


def read_call(frame: Received) -> Request:
    """Return what a CALL or STREAM asks for.

    Raises:
        CodecError: a value cannot be decoded here.
    """
    if not frame.parts:
        raise CodecError("damaged frame: it is no call")
    head, *values = [codec.decode(part) for part in frame.parts]
    match head:
        case [str(target), str(method), dict(options), (float() | None) as timeout]:
            timeout = inf if timeout is None else timeout
            return Request(
                target=target, method=method, values=values, options=options, timeout=timeout
            )
    raise CodecError("damaged frame: it is no call")


def results(number: int, values: Sequence[Any]) -> Frame:
    """Return a RESULTS.

    Raises:
        CodecError: a result cannot be encoded.
    """
    return Frame(Kind.RESULTS, number, [*map(codec.encode_parts, values)])


def value(kind: Kind, number: int, content: Any) -> Frame:
    """Return a NOTE or CHUNK.

    Raises:
        CodecError: the value cannot be encoded.
    """
    return Frame(kind, number, [codec.encode_parts(content)])


def end(number: int) -> Frame:
    """Return an END."""
    return Frame(Kind.END, number)


def failure(kind: Kind, number: int, error: BaseException) -> Frame:
    """Return a REFUSAL or FAILURE."""
    return Frame(kind, number, [[dump_failure(error)]])


def read_values(frame: Received) -> list[Any]:
    """Return the values of a RESULTS, NOTE or CHUNK.

    Raises:
        CodecError: one cannot be decoded here.
    """
    return [codec.decode(part) for part in frame.parts]


def read_failure(frame: Received) -> Exception:
    """Return the error of a REFUSAL or FAILURE.

    Raises:
        CodecError: it is damaged.
    """
    if len(frame.parts) != 1:
        raise CodecError("damaged frame: it is no error")
    return load_failure(frame.parts[0])
