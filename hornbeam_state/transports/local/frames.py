"""Frames: how calls and answers lie on a stream of bytes. Pure: no sockets here.

A frame, with integers in little-endian order::

    u8[4]    "hb", the version of this protocol, the version of the codec
    u8       kind
    zeros    3 bytes
    u32      number of parts
    u64      which call it belongs to; 0: none
    u64      length of all that follows
    u64 ...  the length of each part
    bytes    the parts, one after the other

The first eight bytes keep their meaning in later versions, so that either side can name both.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from hornbeam_state import codec
from hornbeam_state.errors import CodecError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PROTOCOL: Final = 1
MOST_BYTES: Final = 2**30
"""The largest frame, unless another limit is given."""

MOST_PARTS: Final = 2**16
"""The most parts of a frame: each takes some memory, however short it is."""

_PREFIX: Final = b"hb" + bytes((PROTOCOL, codec.VERSION))
_HEADER: Final = struct.Struct("<4sB3xIQQ")
_LENGTH: Final = 8
_BLOCK: Final = 2**16
_SMALL: Final = 2**13  # buffers up to this are copied into one: cheaper than to list them


class Received(NamedTuple):
    """A frame that arrived.

    Attributes:
        kind: What it says.
        call: Which call it belongs to.
        parts: Its content; to be used before more is read.
        size: Its length in bytes, without the header.
    """

    kind: int
    call: int
    parts: list[memoryview]
    size: int


class Frame:
    """A frame that waits to be sent.

    Args:
        kind: What it says.
        call: Which call it belongs to.
        parts: Its content, each part as buffers. They must not change until it is sent.

    Raises:
        CodecError: there are too many parts.

    Attributes:
        buffers: What is left of it.
        left: The bytes of that.
        size: The bytes of all of it, without the header.
        begun: Whether a byte of it was sent.
    """

    __slots__ = ("begun", "buffers", "left", "size")

    def __init__(
        self, kind: int, call: int, parts: Sequence[Sequence[bytes | memoryview]] = ()
    ) -> None:
        if len(parts) > MOST_PARTS:
            raise CodecError(f"{len(parts)} values: {MOST_PARTS} are the most in a message")
        lengths = [sum(map(len, buffers)) for buffers in parts]
        self.size = sum(lengths) + _LENGTH * len(lengths)
        header = _HEADER.pack(_PREFIX, kind, len(lengths), call, self.size)
        table = struct.pack(f"<{len(lengths)}Q", *lengths)
        self.buffers = _join_small((header + table, *(one for part in parts for one in part)))
        self.left = self.size + _HEADER.size
        self.begun = False

    def skip(self, count: int) -> None:
        """Note that so many bytes of it were sent, fewer than are left."""
        self.left -= count
        taken = 0
        while count >= len(self.buffers[taken]):
            count -= len(self.buffers[taken])
            taken += 1
        self.buffers[: taken + 1] = [memoryview(self.buffers[taken])[count:]]


def _join_small(buffers: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """Return the same bytes in fewer buffers."""
    joined: list[bytes | memoryview] = []
    run: list[bytes | memoryview] = []
    for one in buffers:
        if len(one) <= _SMALL:
            run.append(one)
            continue
        joined += (b"".join(run), one)
        run.clear()
    joined.append(b"".join(run))
    return [one for one in joined if one]


class FrameReader:
    """Takes bytes as they arrive and makes frames of them.

    Args:
        most_bytes: The largest frame. No memory is taken for one that announces more.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self._block = memoryview(bytearray(_BLOCK))
        self._start = 0  # what is not used yet of the block: from here
        self._end = 0  # to here
        self._large: _Large | None = None

    def buffer(self) -> memoryview:
        """Return where to put what arrives next; the frames that were read are used by now."""
        if self._large is not None:
            return self._large.rest
        if self._start:
            left = self._end - self._start
            self._block[:left] = self._block[self._start : self._end]
            self._start, self._end = 0, left
        return self._block[self._end :]

    def feed(self, count: int) -> Iterator[Received]:
        """Yield the frames that are complete with so many more bytes in the buffer.

        Raises:
            CodecError: these are no frames, or one is too large.
            ConfigError: the other side speaks another version; the message names both.
        """
        if self._large is None:
            self._end += count
        else:
            self._large.rest = self._large.rest[count:]
            if self._large.rest:
                return
            large, self._large = self._large, None
            yield _take_apart(large.kind, large.parts, large.call, large.body)
        while (frame := self._next()) is not None:
            yield frame

    def _next(self) -> Received | None:
        available = self._end - self._start
        if available < _HEADER.size:
            if available:
                _check_prefix(bytes(self._block[self._start : self._start + min(available, 4)]))
            return None
        prefix, kind, parts, call, size = _HEADER.unpack_from(self._block, self._start)
        if prefix != _PREFIX:
            _check_prefix(prefix)
        if size > self.most_bytes:
            raise CodecError(f"a frame of {size} bytes, and {self.most_bytes} are the most")
        if parts > MOST_PARTS or parts * _LENGTH > size:
            raise CodecError("damaged frame: it has too many parts")
        begin = self._start + _HEADER.size
        if available - _HEADER.size >= size:
            self._start = begin + size
            return _take_apart(kind, parts, call, self._block[begin : self._start])
        if size > _BLOCK - _HEADER.size:
            self._large = _Large(kind, parts, call, size, self._block[begin : self._end])
            self._start = self._end = 0
        return None


class _Large:
    """A frame that does not fit into the block, in memory of its own."""

    def __init__(self, kind: int, parts: int, call: int, size: int, begin: memoryview) -> None:
        self.kind = kind
        self.parts = parts
        self.call = call
        self.body = np.empty(size, np.uint8).data  # unlike a bytearray it is not filled first
        self.body[: len(begin)] = begin
        self.rest = self.body[len(begin) :]


def _take_apart(kind: int, count: int, call: int, body: memoryview) -> Received:
    lengths = struct.unpack_from(f"<{count}Q", body)
    begin = _LENGTH * count
    if begin + sum(lengths) != len(body):
        raise CodecError("damaged frame: its length is not that of its parts")
    parts = []
    for length in lengths:
        parts.append(body[begin : begin + length])
        begin += length
    return Received(kind, call, parts, len(body))


def _check_prefix(found: bytes) -> None:
    """Say what is wrong with the first bytes of a frame, if anything is."""
    if not _PREFIX.startswith(found[:2]):
        raise CodecError("what arrived is no frame of hornbeam")
    if len(found) == len(_PREFIX) and found != _PREFIX:
        raise ConfigError(
            f"the other side speaks version {found[2]} of the local protocol with version "
            f"{found[3]} of the codec, this process {PROTOCOL} with {codec.VERSION}: run the same "
            f"hornbeam on both"
        )
