"""Arrays, numpy scalars and torch tensors as a header and the raw buffer.

The layout, with integers in little-endian order::

    u8       length of the header, in units of 8 bytes
    u8       kind: 0 array in C order, 1 array in Fortran order, 2 numpy scalar, 3 torch tensor
    u8       number of dimensions
    u8       length of the element type
    ASCII    element type: numpy's `dtype.str` ("<f4", ">U5", "<M8[25s]"), with "<q8" and "<Q8"
             for C's long long, which numpy keeps apart from int64; or a torch dtype ("bfloat16")
    zeros    up to a multiple of 8 bytes
    u64 ...  the shape, one per dimension
    bytes    the elements: exactly product(shape) * itemsize bytes, to the end

Element types are an allow-list. Extended floats are not on it: their size and their padding
differ between machines.
"""

from __future__ import annotations

import math
import re
import struct
import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from hornbeam_state.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Callable

_C_ORDER, _F_ORDER, _SCALAR, _TENSOR = range(4)
_MAX_DIMENSIONS: Final = 64
_START: Final = struct.Struct("<BBBB")

_FIXED: Final = tuple(
    np.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("longlong", "ulonglong", "float16", "float32", "float64", "complex64", "complex128"),
        *("M8[s]", "m8[s]"),
    )
)
_DTYPES: Final = frozenset(map(type, (*_FIXED, np.dtype("S1"), np.dtype("U1"))))

SCALARS: Final = frozenset(dtype.type for dtype in _FIXED)
"""The numpy scalar types that `dump_scalar` takes."""

_LONG_LONG: Final = {"q": "longlong", "Q": "ulonglong"}

_ELEMENT: Final = re.compile(
    r"(?P<order>[<>|])(?:b1|[iu][1248]|(?P<long>[qQ])8|f[248]|c8|c16|[SU]\d{1,10}"
    r"|[mM]8(?:\[\d{0,10}(?:[YMWDhms]|[munpfa]s)\])?)",
    re.ASCII,
)

_TENSOR_ITEMSIZES: Final = {
    **dict.fromkeys(("bool", "uint8", "int8", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64", "complex64"), 8),
    "complex128": 16,
}


# What a header says: the size of the elements in bytes, the shape, the numpy dtype or the name of a
# torch dtype, the order, and a function for what is not simply an array to copy. A plain tuple: a
# named one takes longer to unpack.
_Layout = tuple[int, tuple[int, ...], Any, Literal["C", "F"], "Callable[..., Any] | None"]


def dump(array: np.ndarray[Any, Any], prefix: bytes = b"", *, keep_order: bool = True) -> bytes:
    """Return `prefix`, the header and the elements of an array, copied once.

    Args:
        array: Of exactly the type `numpy.ndarray`.
        prefix: Bytes to put first.
        keep_order: Store a Fortran-ordered array as it lies; else, and when the elements are not
            contiguous, they are stored in C order.

    Raises:
        CodecError: the element type is structured, `object`, or another that is not supported.
    """
    kind, data = _in_order(array, keep_order=keep_order)
    dtype = array.dtype
    return b"".join((prefix, _header(kind, dtype.num, dtype, array.shape), data))


def dump_parts(array: np.ndarray[Any, Any], prefix: bytes = b"") -> tuple[bytes, memoryview]:
    """Return what `dump` returns in two parts, the second of which is the elements.

    They are not copied when they are contiguous, and so must not change while the part is in use.

    Raises:
        CodecError: as `dump`.
    """
    kind, data = _in_order(array, keep_order=True)
    dtype = array.dtype
    header = prefix + _header(kind, dtype.num, dtype, array.shape)
    # As bytes: some element types have no buffers of their own.
    return header, data.reshape(-1).view(np.uint8).data


def _in_order(array: np.ndarray[Any, Any], *, keep_order: bool) -> tuple[int, Any]:
    """Return the kind of an array, and one in C order with the same elements in memory."""
    # Any: numpy's stubs hide that an array is a buffer.
    flags = array.flags
    if flags.c_contiguous:
        return _C_ORDER, array
    if keep_order and flags.f_contiguous:
        return _F_ORDER, array.T
    return _C_ORDER, np.ascontiguousarray(array)


def dump_scalar(scalar: np.generic, prefix: bytes = b"") -> bytes:
    """Return `prefix`, the header and the bytes of a numpy scalar of one of `SCALARS`."""
    dtype = scalar.dtype
    return b"".join((prefix, _header(_SCALAR, dtype.num, dtype, ()), scalar.tobytes()))


def is_tensor(value: object) -> bool:
    """Tell whether the value is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    # An import of torch may be under way in another thread: then there are no tensors yet.
    tensor = None if torch is None else vars(torch).get("Tensor")
    return tensor is not None and isinstance(value, tensor)


def dump_tensor(tensor: Any, prefix: bytes = b"") -> bytes:
    """Return `prefix`, the header and the elements of a torch tensor, in C order.

    Raises:
        CodecError: the tensor is not a plain, dense one on the CPU; the message says what to call.
    """
    _check_tensor(tensor)
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in _TENSOR_ITEMSIZES:
        raise CodecError(f"torch tensors of dtype {name} are not supported")
    torch = sys.modules["torch"]
    # numpy has no bfloat16 and knows no conjugated views, but it can show the bytes of any tensor.
    dense = tensor.resolve_conj().resolve_neg().contiguous()
    data = dense.reshape(-1).view(torch.uint8).numpy()
    return b"".join((prefix, _pack_header(_TENSOR, name, tuple(tensor.shape)), data))


def load(data: bytes | memoryview, start: int) -> Any:
    """Return the array, scalar or tensor whose header begins at `start` and that ends with `data`.

    The result is writable and shares no memory with `data`. Nothing is allocated before the sizes
    are known to agree.

    Raises:
        CodecError: the bytes are damaged, or hold a tensor where torch is not installed.
        Exception: numpy and torch refuse some damaged bytes with errors of their own.
    """
    end = start + 8 * data[start]
    nbytes, shape, dtype, order, load_other = _parse_header(bytes(data[start:end]))
    if len(data) - end != nbytes:
        raise CodecError("damaged array: its size and the length of its data differ")
    if load_other is not None:
        return load_other(shape, dtype, data, end, None, order)
    return np.ndarray(shape, dtype, data, end, None, order).copy(order)


def _load_scalar(*args: Any) -> Any:
    return np.ndarray(*args)[()]


def _load_text(*args: Any) -> Any:
    """Load text only if Python could make a str of it: numpy would fail on use, obscurely."""
    array: Any = np.ndarray(*args).copy(args[-1])
    if array.nbytes:
        units = array.reshape(-1, order="A").view(np.dtype("u4").newbyteorder(array.dtype.str[0]))
        if units.max() > sys.maxunicode:
            raise CodecError("damaged array: its text holds no valid code points")
    return array


def _check_tensor(tensor: Any) -> None:
    torch = sys.modules["torch"]
    if tensor.device.type != "cpu":
        raise CodecError(f"a tensor on {tensor.device.type} is not stored: call .cpu() first")
    if tensor.requires_grad:
        raise CodecError("a tensor that requires grad is not stored: call .detach() first")
    if type(tensor) is not torch.Tensor:
        raise CodecError(f"{type(tensor).__qualname__} is not a plain tensor: use .detach()")
    if tensor.layout is not torch.strided:
        raise CodecError("a sparse tensor is not stored: call .to_dense() first")


@lru_cache(maxsize=1024)
def _header(kind: int, number: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return the header of an array.

    `number` only tells long long from int64 in the cache's key: numpy calls the two dtypes equal.
    """
    del number
    return _pack_header(kind, _element_of(dtype), shape)


def _pack_header(kind: int, element: str, shape: tuple[int, ...]) -> bytes:
    if len(shape) > _MAX_DIMENSIONS:
        raise CodecError(f"arrays of more than {_MAX_DIMENSIONS} dimensions are not supported")
    start = _START.size + len(element)
    padding = -start % 8
    rest = struct.pack(f"<{padding}x{len(shape)}Q", *shape)
    units = (start + len(rest)) // 8
    return _START.pack(units, kind, len(shape), len(element)) + element.encode("ascii") + rest


@lru_cache(maxsize=1024)
def _parse_header(header: bytes) -> _Layout:
    _, kind, dimensions, size = _START.unpack_from(header)
    element = header[_START.size : _START.size + size].decode("ascii")
    shape = struct.unpack(f"<{dimensions}Q", header[len(header) - 8 * dimensions :])
    # Its own bytes again, or it is damaged, be it only in the padding.
    if (
        kind > _TENSOR
        or (shape and kind == _SCALAR)
        or _pack_header(kind, element, shape) != header
    ):
        raise CodecError("damaged array: its header makes no sense")
    if kind == _TENSOR:
        itemsize = _TENSOR_ITEMSIZES.get(element)
        if itemsize is None:
            raise CodecError("damaged tensor: its dtype is not one of those supported")
        return math.prod(shape) * itemsize, shape, element, "C", _load_tensor
    dtype = _dtype_of(element)
    other = _load_scalar if kind == _SCALAR else _load_text if dtype.kind == "U" else None
    order: Literal["C", "F"] = "F" if kind == _F_ORDER else "C"
    return math.prod(shape) * dtype.itemsize, shape, dtype, order, other


def _element_of(dtype: np.dtype[Any]) -> str:
    if type(dtype) not in _DTYPES:
        raise CodecError(f"arrays of {type(dtype).__name__} are not supported")
    if not dtype.itemsize:
        raise CodecError("arrays of text or bytes of width 0 are not supported: numpy widens them")
    text = dtype.str
    return f"{text[0]}{dtype.char}8" if dtype.char in _LONG_LONG else text


def _dtype_of(element: str) -> np.dtype[Any]:
    match = _ELEMENT.fullmatch(element)
    if match is None:
        raise CodecError("damaged array: its dtype is not one of those supported")
    if match["long"]:
        dtype = np.dtype(_LONG_LONG[match["long"]]).newbyteorder(match["order"])  # type: ignore[arg-type]
    else:
        dtype = np.dtype(element)
    if _element_of(dtype) != element:
        raise CodecError("damaged array: its dtype is not written as hornbeam writes it")
    return dtype


def _load_tensor(
    shape: tuple[int, ...], name: str, data: bytes | memoryview, start: int, *_: Any
) -> Any:
    try:
        import torch  # here, since most processes never see a tensor, and it takes 300 MB
    except ImportError as error:
        raise CodecError("the value is a torch tensor, and torch is not installed") from error
    tensor = torch.empty(shape, dtype=getattr(torch, name), device="cpu")
    if tensor.numel():
        tensor.view(-1).view(torch.uint8).numpy()[:] = np.frombuffer(data, np.uint8, offset=start)
    return tensor
