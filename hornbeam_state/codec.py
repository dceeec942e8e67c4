"""Values to bytes and back, exactly: same value, same type, same dtype, shape and order.

Never pickle. Reading bytes, whoever wrote them, imports no module and calls no function that they
name, and takes memory in proportion to their length only. They can make objects of classes that
are there already; `hornbeam_state.objects` says what of a class may run then.

The first byte says what follows::

    0-9 -   an int of 64 bits, in ASCII decimal: what backends treat as a counter
    0x80    MessagePack with extensions: see `hornbeam_state.packing`
    0x81    str: UTF-8 to the end
    0x82    bytes: to the end
    0x83    numpy array or scalar, torch tensor: see `hornbeam_state.arrays`
    0x84    None
    0x85    True
    0x86    False
    0x87    float: IEEE 754 binary64, big-endian

The high four bits of a tag are the version of the format: 8 for now, 9 for the next.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from hornbeam_state import arrays, packing
from hornbeam_state.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_LONGEST_INT = len(str(packing.INT_MIN))

VERSION: Final = 8
"""The version of the format: the high four bits of every tag."""

_TAGS = [bytes([VERSION << 4 | kind]) for kind in range(8)]
_PACKED, _STR, _BYTES, _BUFFER, _NONE, _TRUE, _FALSE, _FLOAT = _TAGS


def encode(value: Any) -> bytes:
    """Return the bytes from which `decode` makes the same value, of exactly the same type.

    A plain int of 64 bits becomes its ASCII decimal, so that a backend can count with it; the
    bytes of nothing else start with a digit or ``-``. The bytes of equal values may differ
    (sets, insertion order of dicts): compare with `canonical`.

    Raises:
        CodecError: a value in it is of a type that is not supported, would not come back exactly,
            is nested deeper than `packing.MAX_DEPTH`, or is larger than 4 GiB within a container.
            The message names the type, never the content.
    """
    dump = _ENCODERS.get(type(value))
    return _encode_other(value) if dump is None else dump(value)


def encode_parts(value: Any) -> list[bytes | memoryview]:
    """Return buffers that are the bytes of `encode` when they are joined.

    The elements of an array, and bytes, are not copied when they are contiguous: the last buffer
    is the memory of the value itself. So the value must not change while the buffers are in use.

    Raises:
        CodecError: as `encode`.
    """
    if type(value) is np.ndarray:
        return list(arrays.dump_parts(value, _BUFFER))
    if type(value) is bytes:
        return [_BYTES, memoryview(value)]
    return [encode(value)]


def decode(data: bytes | memoryview) -> Any:
    """Return the value that `encode` was given. It shares no memory with `data`.

    Any bytes at all are safe to decode. A class that is named in them must have been imported, or
    registered with `register_codec`, before.

    Raises:
        CodecError: these are no bytes of `encode`, those of a later version of it, or those of a
            class that is unknown here or has changed.
    """
    if type(data) is not bytes:
        data = memoryview(data).cast("B")
    load = _DECODERS.get(data[0]) if data else None
    if load is None:
        raise CodecError("not written by hornbeam, or by a later version of it")
    try:
        return load(data)
    except (CodecError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - damaged bytes make numpy and others raise anything
        problem = type(error).__name__
    # Outside the handler, to leave out the cause: such errors quote the bytes.
    raise CodecError(f"damaged value ({problem})")


def canonical(value: Any) -> bytes:
    """Return bytes that are equal for two values exactly when they are the same value.

    The same value: same types, same content, bit by bit, at every level. ``1``, ``1.0``,
    ``True``, ``"1"``, ``[1]``, ``(1,)`` and ``numpy.int64(1)`` are seven values; ``0.0`` and
    ``-0.0`` are two; a NaN is the same value as itself. The insertion order of dicts, the order
    of sets and the memory order of arrays do not matter. The bytes are the same in every process
    and delimit themselves: those of several values may be joined.

    Raises:
        CodecError: as `encode`.
    """
    return packing.pack(value, canonical=True)


def register_codec(
    type: type[T],
    name: str,
    encode: Callable[[T], Any],
    decode: Callable[[Any], T],
) -> None:
    """Teach the codec a type: exactly this one, not its subclasses. Thread-safe, and for good.

    Call it wherever values of the type are written or read, best where the type is defined. It
    goes before the codec's own way with dataclasses, structs, models and tensors.

    Args:
        type: The type.
        name: What names it in the bytes. Keep it when the class moves.
        encode: Makes of an object a value that the codec knows. What it raises is not caught.
        decode: Makes the object again. Damaged or hostile bytes may hand it any value; what it
            raises becomes the cause of a `CodecError`.

    Raises:
        ValueError: the type or the name is registered with something else, or the codec knows
            the type by itself. Registering the same again does nothing.
        TypeError: an argument is of the wrong type.
    """
    packing.register(type, name, encode, decode)


def _encode_other(value: Any) -> bytes:
    if arrays.is_tensor(value) and not packing.is_registered(type(value)):
        return arrays.dump_tensor(value, _BUFFER)
    return _PACKED + packing.pack(value)


def _encode_int(value: int) -> bytes:
    if packing.INT_MIN <= value <= packing.INT_MAX:
        return b"%d" % value
    return _encode_other(value)


_ENCODERS: dict[type[Any], Callable[[Any], bytes]] = {
    int: _encode_int,
    str: lambda value: _STR + packing.utf8(value),
    bytes: _BYTES.__add__,
    np.ndarray: lambda value: arrays.dump(value, _BUFFER),
    type(None): lambda _: _NONE,
    bool: lambda value: _TRUE if value else _FALSE,
    float: lambda value: struct.pack(">cd", _FLOAT, value),
    **dict.fromkeys(arrays.SCALARS, lambda value: arrays.dump_scalar(value, _BUFFER)),
}


def _decode_int(data: bytes | memoryview) -> int:
    text = bytes(data[: _LONGEST_INT + 1])
    value = int(text)
    # int() takes spaces, underscores and leading zeros as well.
    if b"%d" % value != text or not packing.INT_MIN <= value <= packing.INT_MAX:
        raise CodecError("damaged value: not an int of 64 bits")
    return value


def _decode_constant(data: bytes | memoryview) -> bool | None:
    return _CONSTANTS[bytes(data[:2])]


_CONSTANTS = {_NONE: None, _TRUE: True, _FALSE: False}

_DECODERS: dict[int, Callable[[Any], Any]] = {
    **dict.fromkeys(b"-0123456789", _decode_int),
    **dict.fromkeys((_NONE[0], _TRUE[0], _FALSE[0]), _decode_constant),
    _PACKED[0]: lambda data: packing.unpack(memoryview(data)[1:]),
    _STR[0]: lambda data: str(data[1:], "utf-8"),
    _BYTES[0]: lambda data: bytes(data[1:]),
    _BUFFER[0]: lambda data: arrays.load(data, 1),
    _FLOAT[0]: lambda data: struct.unpack(">xd", data)[0],
}
