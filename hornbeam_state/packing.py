"""MessagePack with extensions, so that every supported type comes back as it was.

MessagePack holds None, bool, int of 64 bits, float, str, bytes, list, and dict with str keys. All
else is an extension; the body of one is MessagePack again, a list, unless noted::

     0  int beyond 64 bits: two's complement, little-endian
     1  tuple                       2  set                  3  frozenset
     4  dict with other keys: keys and values by turns
     5  bytearray: its bytes
     6  datetime                    7  date                 8  time              9  timedelta
    10  Decimal: ASCII             11  UUID: 16 bytes
    12  numpy array or scalar, torch tensor: see `hornbeam_state.arrays`
    13  numpy.str_: UTF-8          14  numpy.bytes_: its bytes
    15  object of a class with fields: see `hornbeam_state.objects`
    16  object of a registered type: [name, value]

msgspec could write more types by itself, but would forget what they were: tuples as lists,
subclasses of str as str. So each value is first turned into what MessagePack holds, by its exact
type. The canonical form differs in two ways: dicts and sets are in the order of their keys and
items, of which the packed bytes stand in their place, and arrays are in C order.

The one state of the module is the registry behind `hornbeam_state.codec.register_codec`.
"""

from __future__ import annotations

import decimal
import threading
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
import numpy as np
from msgspec.msgpack import Ext

from hornbeam_state import arrays, objects
from hornbeam_state.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import tzinfo

INT_MIN, INT_MAX = -(2**63), 2**63 - 1

MAX_DEPTH: Final = 64
"""Containers deeper than this are refused, so that what was written can be read on any stack."""

_BIG_INT, _TUPLE, _SET, _FROZENSET, _DICT, _BYTEARRAY = range(6)
_DATETIME, _DATE, _TIME, _TIMEDELTA = range(6, 10)
_DECIMAL, _UUID, _ARRAY, _NUMPY_STR, _NUMPY_BYTES = range(10, 15)
_OBJECT, _REGISTERED = range(15, 17)

_NATIVE: Final = frozenset({type(None), bool, int, float, str, bytes})
_NATIVE_BUT_INT: Final = _NATIVE - {int}
_STR_ONLY: Final = frozenset({str})

_TOO_DEEP: Final = f"the value is nested deeper than {MAX_DEPTH} levels, or contains itself"
_SURROGATES: Final = "a str with lone surrogates has no UTF-8 form to store"

_encoder = msgspec.msgpack.Encoder()
_first = itemgetter(0)

# Whether str(Decimal) writes "E" or "e" depends on the thread's context; this one is fixed.
_decimal_context = decimal.Context(prec=decimal.MAX_PREC, capitals=1)


@dataclass(frozen=True)
class _Codec:
    type: type[Any]
    name: str
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


class _Registry:
    """The registered codecs. Writers share a lock; readers only look into one dict."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.by_type: dict[type[Any], _Codec] = {}
        self.by_name: dict[str, _Codec] = {}

    def add(self, codec: _Codec) -> None:
        with self._lock:
            for present in (self.by_type.get(codec.type), self.by_name.get(codec.name)):
                if present not in (None, codec):
                    raise ValueError(
                        f"{_name_of(codec.type)} or the name {codec.name!r} is registered with"
                        " something else"
                    )
            # By name first: what one thread may write, all must be able to read.
            self.by_name[codec.name] = codec
            self.by_type[codec.type] = codec


_registry = _Registry()


def register(
    kind: type[Any], name: str, encode: Callable[[Any], Any], decode: Callable[[Any], Any]
) -> None:
    """Do what `hornbeam_state.codec.register_codec` says."""
    if not (isinstance(kind, type) and isinstance(name, str)):
        raise TypeError("register_codec takes a type, a str that names it, and two functions")
    if not (callable(encode) and callable(decode)):
        raise TypeError("register_codec takes a type, a str that names it, and two functions")
    if kind in _NATIVE or kind in _LEAVES or kind in _CONTAINERS:
        raise ValueError(f"the codec knows {_name_of(kind)} by itself")
    utf8(name)
    _registry.add(_Codec(kind, str(name), encode, decode))


def is_registered(kind: type[Any]) -> bool:
    """Tell whether objects of exactly this type have a registered codec."""
    return kind in _registry.by_type


def pack(value: Any, *, canonical: bool = False) -> bytes:
    """Return a value in MessagePack, or in the canonical form of it.

    Raises:
        CodecError: the value cannot be written.
    """
    quick, careful = _CANONICAL_WALKS if canonical else _WALKS
    try:
        try:
            return _write(quick.plain(value, 0))
        except OverflowError:
            # Somewhere an int is beyond 64 bits. That is rare, so ints are looked at only now.
            return _write(careful.plain(value, 0))
    except RecursionError:
        raise CodecError(_TOO_DEEP) from None


def utf8(text: str) -> bytes:
    """Return the text in UTF-8.

    Raises:
        CodecError: it has lone surrogates.
    """
    try:
        return text.encode()
    except UnicodeEncodeError:
        # Without the cause, which quotes the text.
        raise CodecError(_SURROGATES) from None


def _write(plain: Any) -> bytes:
    try:
        return _encoder.encode(plain)
    except UnicodeEncodeError:
        raise CodecError(_SURROGATES) from None
    except ValueError:
        raise CodecError("a value within a container is larger than 4 GiB") from None


class _Walk:
    """A way to turn values into what msgspec writes natively.

    Attributes:
        canonical: Whether to write the canonical form.
        native: The types that msgspec may be handed as they are.
    """

    __slots__ = ("canonical", "native")

    def __init__(self, *, canonical: bool, native: frozenset[type[Any]]) -> None:
        self.canonical = canonical
        self.native = native

    def plain(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind in self.native:
            return value
        leaf = _LEAVES.get(kind)
        if leaf is not None:
            return leaf(value)
        if depth >= MAX_DEPTH:
            raise CodecError(_TOO_DEEP)
        container = _CONTAINERS.get(kind)
        if container is not None:
            return container(self, value, depth + 1)
        codec = _registry.by_type.get(kind)
        if codec is not None:
            return self.ext(_REGISTERED, [codec.name, codec.encode(value)], depth + 1)
        return self.other(value, depth)

    def other(self, value: Any, depth: int) -> Ext:
        parts = objects.take_apart(value)
        if parts is not None:
            # The dict of fields counts as the level of the object.
            return self.ext(_OBJECT, parts, depth)
        if arrays.is_tensor(value):
            return Ext(_ARRAY, arrays.dump_tensor(value))
        raise CodecError(
            f"values of type {_name_of(type(value))} cannot be stored: convert them, or teach the"
            " codec with register_codec"
        )

    def ext(self, code: int, items: Any, depth: int) -> Ext:
        return Ext(code, _write(self.items(items, depth)))

    def items(self, items: Any, depth: int) -> Any:
        if self.native.issuperset(map(type, items)):
            return items
        return [self.plain(item, depth) for item in items]

    def mapping(self, value: dict[Any, Any], depth: int) -> Any:
        if not _STR_ONLY.issuperset(map(type, value)):
            return self.pairs(value.items(), depth)
        if self.canonical:
            value = dict(sorted(value.items(), key=_first))
        if self.native.issuperset(map(type, value.values())):
            return value
        return {key: self.plain(item, depth) for key, item in value.items()}

    def pairs(self, pairs: Any, depth: int) -> Ext:
        if self.canonical:
            packed = ((_write(self.plain(key, depth)), item) for key, item in pairs)
            pairs = sorted(packed, key=_first)
        return self.ext(_DICT, [part for pair in pairs for part in pair], depth)

    def members(self, code: int, items: Any, depth: int) -> Ext:
        if self.canonical:
            items = sorted(_write(self.plain(item, depth)) for item in items)
        return self.ext(code, list(items), depth)

    def array(self, value: Any, _depth: int) -> Ext:
        return Ext(_ARRAY, arrays.dump(value, keep_order=not self.canonical))


_WALKS = tuple(_Walk(canonical=False, native=native) for native in (_NATIVE, _NATIVE_BUT_INT))
_CANONICAL_WALKS = tuple(
    _Walk(canonical=True, native=native) for native in (_NATIVE, _NATIVE_BUT_INT)
)

_CONTAINERS: dict[type[Any], Callable[[_Walk, Any, int], Any]] = {
    list: _Walk.items,
    dict: _Walk.mapping,
    tuple: lambda walk, value, depth: walk.ext(_TUPLE, value, depth),
    set: lambda walk, value, depth: walk.members(_SET, value, depth),
    frozenset: lambda walk, value, depth: walk.members(_FROZENSET, value, depth),
    np.ndarray: _Walk.array,
}


def _plain_int(value: int) -> int | Ext:
    if INT_MIN <= value <= INT_MAX:
        return value
    return Ext(_BIG_INT, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))


def _plain_datetime(value: datetime) -> Ext:
    day = (value.year, value.month, value.day)
    return Ext(_DATETIME, _write((*day, *_clock(value))))


def _clock(value: datetime | time) -> tuple[Any, ...]:
    clock = (value.hour, value.minute, value.second, value.microsecond)
    return (*clock, value.fold, _plain_zone(value.tzinfo))


def _plain_zone(zone: tzinfo | None) -> Any:
    """Return None, the key of a ZoneInfo, or days, seconds, microseconds and name of an offset."""
    if zone is None:
        return None
    if type(zone) is ZoneInfo and zone.key is not None:
        return zone.key
    if type(zone) is timezone:
        offset, name = zone.utcoffset(None), zone.tzname(None)
        named = name != timezone(offset).tzname(None)
        return (offset.days, offset.seconds, offset.microseconds, *([name] if named else []))
    raise CodecError(
        f"a time zone of type {_name_of(type(zone))} cannot be stored: use zoneinfo.ZoneInfo(key)"
        " or datetime.timezone"
    )


def _plain_decimal(value: decimal.Decimal) -> Ext:
    return Ext(_DECIMAL, _decimal_context.to_sci_string(value).encode("ascii"))


_LEAVES: dict[type[Any], Callable[[Any], Any]] = {
    int: _plain_int,
    bytearray: lambda value: Ext(_BYTEARRAY, bytes(value)),
    datetime: _plain_datetime,
    date: lambda value: Ext(_DATE, _write((value.year, value.month, value.day))),
    time: lambda value: Ext(_TIME, _write(_clock(value))),
    timedelta: lambda v: Ext(_TIMEDELTA, _write((v.days, v.seconds, v.microseconds))),
    decimal.Decimal: _plain_decimal,
    UUID: lambda value: Ext(_UUID, value.bytes),
    np.str_: lambda value: Ext(_NUMPY_STR, utf8(value)),
    np.bytes_: lambda value: Ext(_NUMPY_BYTES, bytes(value)),
    **dict.fromkeys(arrays.SCALARS, lambda value: Ext(_ARRAY, arrays.dump_scalar(value))),
}


def unpack(data: memoryview) -> Any:
    """Return the value that `pack` wrote; it shares no memory with `data`.

    Raises:
        CodecError: a class or codec is unknown here, or the bytes are damaged.
        Exception: other damage; what the constructors and decoders below make of it.
    """
    return _decoder.decode(data)


def _load_ext(depth: int, code: int, data: memoryview) -> Any:
    load = _LEAF_DECODERS.get(code)
    if load is not None:
        return load(data)
    build = _PARTS_DECODERS.get(code)
    if build is None:
        raise CodecError("damaged value, or written by a later version of hornbeam")
    if depth > MAX_DEPTH:  # what `pack` wrote is never deeper: a leaf may have parts as well
        raise CodecError("damaged value: nested too deep")
    parts = _decoders[depth + 1].decode(data)
    if type(parts) is not list:
        raise CodecError("damaged value: not the parts of one")
    return build(parts)


# One for each level of extensions, which tells the hook how deep it is: left to Python's limit,
# bytes that nest them thousands deep could overrun the stack of a thread that has a small one.
_decoders = tuple(
    msgspec.msgpack.Decoder(ext_hook=partial(_load_ext, depth)) for depth in range(MAX_DEPTH + 2)
)
_decoder = _decoders[0]


def _load_dict(parts: list[Any]) -> dict[Any, Any]:
    turns = iter(parts)
    return dict(zip(turns, turns, strict=True))


# The parts are spelled out: given bytes, the constructors of datetime take them for the state of
# a pickle, and hardly check it.


def _load_datetime(parts: list[Any]) -> datetime:
    year, month, day, hour, minute, second, microsecond, fold, zone = parts
    tz = _load_zone(zone)
    return datetime(year, month, day, hour, minute, second, microsecond, tz, fold=fold)


def _load_date(parts: list[Any]) -> date:
    year, month, day = parts
    return date(year, month, day)


def _load_time(parts: list[Any]) -> time:
    hour, minute, second, microsecond, fold, zone = parts
    return time(hour, minute, second, microsecond, _load_zone(zone), fold=fold)


def _load_timedelta(parts: list[Any]) -> timedelta:
    days, seconds, microseconds = parts
    return timedelta(days, seconds, microseconds)


def _load_zone(zone: Any) -> tzinfo | None:
    if zone is None:
        return None
    if type(zone) is list:
        days, seconds, microseconds, *name = zone
        return timezone(timedelta(days, seconds, microseconds), *name)
    try:
        # ZoneInfo looks for the key in the zone files of the system and of tzdata, nowhere else.
        return ZoneInfo(zone)
    except ZoneInfoNotFoundError:
        raise CodecError("a time zone is not known on this machine: install tzdata") from None


def _load_decimal(data: memoryview) -> decimal.Decimal:
    text = str(data, "ascii")
    value = decimal.Decimal(text)
    # Decimal() takes spaces and underscores as well, and with its traps off makes NaN of anything.
    if _decimal_context.to_sci_string(value) != text:
        raise CodecError("damaged value: not a Decimal")
    return value


def _load_registered(parts: list[Any]) -> Any:
    name, value = parts
    if type(name) is not str:
        raise CodecError("damaged value: it has no codec")
    codec = _registry.by_name.get(name)
    if codec is None:
        raise CodecError(f"no codec {ascii(name)[:200]} here: call register_codec before reading")
    try:
        return codec.decode(value)
    except Exception as error:
        raise CodecError(f"the decode function of codec {codec.name!r} failed") from error


_LEAF_DECODERS: dict[int, Callable[[memoryview], Any]] = {
    _BIG_INT: lambda data: int.from_bytes(data, "little", signed=True),
    _BYTEARRAY: bytearray,
    _DECIMAL: _load_decimal,
    _UUID: lambda data: UUID(bytes=bytes(data)),
    _ARRAY: lambda data: arrays.load(data, 0),
    _NUMPY_STR: lambda data: np.str_(str(data, "utf-8")),
    _NUMPY_BYTES: lambda data: np.bytes_(bytes(data)),
}

_PARTS_DECODERS: dict[int, Callable[[list[Any]], Any]] = {
    _TUPLE: tuple,
    _SET: set,
    _FROZENSET: frozenset,
    _DICT: _load_dict,
    _DATETIME: _load_datetime,
    _DATE: _load_date,
    _TIME: _load_time,
    _TIMEDELTA: _load_timedelta,
    _OBJECT: objects.put_together,
    _REGISTERED: _load_registered,
}


def _name_of(kind: type[Any]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
