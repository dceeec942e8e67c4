"""Values as one run of bytes, and such a run cut into pieces. Pure.

A body, with integers in little-endian order::

    u32      number of values
    u64 ...  the length of each
    bytes    the values, one after the other
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

from hornbeam_state import codec
from hornbeam_state.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_COUNT: Final = struct.Struct("<I")
_LENGTH: Final = 8
_MOST_VALUES: Final = 2**16


class Body:
    """Encoded values.

    Args:
        values: The values. Arrays among them stay where they lie, and must not change meanwhile.

    Raises:
        CodecError: one cannot be encoded, or there are too many.

    Attributes:
        buffers: The bytes, in several pieces.
        size: How many they are.
    """

    __slots__ = ("buffers", "size")

    def __init__(self, values: Sequence[Any]) -> None:
        if len(values) > _MOST_VALUES:
            raise CodecError(f"{len(values)} values: {_MOST_VALUES} are the most in a message")
        parts = [codec.encode_parts(value) for value in values]
        lengths = [sum(map(len, buffers)) for buffers in parts]
        table = _COUNT.pack(len(lengths)) + struct.pack(f"<{len(lengths)}Q", *lengths)
        self.buffers = [table, *(one for buffers in parts for one in buffers)]
        self.size = sum(lengths) + len(table)

    def joined(self) -> bytes:
        """Return all of it at once."""
        return b"".join(self.buffers)

    def pieces(self, most: int) -> Iterator[bytes | memoryview]:
        """Yield it in pieces of so many bytes, the last one shorter. Most are not copied."""
        gathered: list[bytes | memoryview] = []
        room = most
        for buffer in self.buffers:
            rest = memoryview(buffer)
            while len(rest) >= room:
                piece, rest = rest[:room], rest[room:]
                yield piece if not gathered else b"".join((*gathered, piece))
                gathered, room = [], most
            if rest:
                gathered.append(rest)
                room -= len(rest)
        if gathered:
            yield b"".join(gathered)


def read_body(data: bytes | memoryview) -> list[Any]:
    """Return the values of a body.

    Raises:
        CodecError: it is damaged, or one of them cannot be decoded here.
    """
    body = memoryview(data)
    if len(body) < _COUNT.size:
        raise CodecError("damaged message: it is too short")
    (count,) = _COUNT.unpack_from(body)
    begin = _COUNT.size + _LENGTH * count
    if count > _MOST_VALUES or begin > len(body):
        raise CodecError("damaged message: it has too many values")
    lengths = struct.unpack_from(f"<{count}Q", body, _COUNT.size)
    if begin + sum(lengths) != len(body):
        raise CodecError("damaged message: its length is not that of its values")
    values = []
    for length in lengths:
        values.append(codec.decode(body[begin : begin + length]))
        begin += length
    return values
