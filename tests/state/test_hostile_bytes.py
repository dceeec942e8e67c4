"""Attacks on the decoder: whatever the bytes are, a value or a `CodecError` comes of them.

They run in forked children, so that a crash, an endless loop or a gigabyte is a failure of the
test and not the end of all tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import decimal
import enum
import gc
import random
import resource
import struct
import sys
import threading
import time
import tracemalloc
import typing
import uuid
import zoneinfo
from pathlib import Path

import msgspec
import numpy as np
import pydantic
import pytest
from child_processes import Child

from hornbeam_state.codec import canonical, decode, encode, register_codec
from hornbeam_state.errors import CodecError
from hornbeam_state.packing import MAX_DEPTH

OBJECT = 15  # the code of its extension
CODES = range(17)


@dataclasses.dataclass
class Plain:
    n: object
    items: object = None


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    n: object


class Struct(msgspec.Struct, frozen=True):
    n: object


class Model(pydantic.BaseModel):
    n: object
    extra: dict = {}


class Point(typing.NamedTuple):
    x: object
    y: object


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Registered:
    def __init__(self, n) -> None:
        self.n = n


register_codec(Registered, "tests.hostile", lambda value: value.n, Registered)

SAMPLES = [
    *(None, True, 0, -12, 2**63, 1.5, "text", "", b"bytes", bytearray(b"x"), 10**30),
    *([1, "a", None], (1, (2.5, b"")), {1, "b"}, frozenset({(1,), (2,)}), {"a": [1], "b": {}}),
    *({1: "int", (2,): {3}}, uuid.UUID(int=5), decimal.Decimal("-1.50E+9")),
    *(dt.datetime(2020, 1, 2, 3, tzinfo=dt.UTC), dt.date(1, 1, 1), dt.time(1, 2, fold=1)),
    *(dt.timedelta(1, 2, 3), dt.time(1, tzinfo=dt.timezone(dt.timedelta(hours=1), "odd"))),
    *(np.float32(1), np.int64(5), np.str_("é"), np.bytes_(b"x"), np.datetime64("2020", "D")),
    *(np.arange(6).reshape(2, 3), np.asfortranarray(np.eye(3)), np.array(["é"]), np.zeros((0, 2))),
    *(np.array(5, "<f2"), np.array([b"ab"]), np.array(["2020"], "<M8[25s]")),
    *(Plain(1, [2]), Slotted((1,)), Struct("a"), Model(n=1), Point(1, Point(2, 3)), Access.READ),
    *(Access(3), Registered([1, {2}])),
]


def ext(code: int, body: bytes) -> bytes:
    """Write an extension with the longest header, which may lie about the length."""
    return b"\xc9" + struct.pack(">IB", len(body), code) + body


def nested(code: int, levels: int) -> bytes:
    """Nest an extension, or lists for code -1, as deep as asked."""
    if code == -1:
        return b"\x80" + b"\x91" * levels + b"\x90"
    heads, size = [], 1
    for _ in range(levels):
        heads.append(b"\xc9" + struct.pack(">IB", size + 2, code) + b"\x92\x01")
        size += len(heads[-1])
    return b"\x80" + b"".join(reversed(heads)) + b"\x90"


def filled(item: bytes, size: int) -> bytes:
    """Return a list of so many of an item that it takes about `size` bytes."""
    count = size // len(item)
    return b"\x80\xdd" + struct.pack(">I", count) + item * count


def object_bytes(module, qualname, *state) -> bytes:
    return b"\x80" + ext(OBJECT, encode([module, qualname, *state])[1:])


def outcome(data: bytes) -> str:
    """Return what comes of decoding: "value", or the message of a CodecError."""
    try:
        value = decode(data)
    except CodecError as error:
        return str(error)
    try:
        again = encode(value)
    except CodecError:  # deeper than what may be written
        return "value"
    assert canonical(decode(again)) == canonical(value)
    return "value"


# Mutations of what is valid.


class Mutator:
    """Makes bytes that are nearly right."""

    lies = (
        b"\xff\xff\xff\xff",
        b"\x7f\xff\xff\xff",
        bytes(4),
        b"\xdd\xff\xff\xff",
        b"\xc9\0\0\xff",
    )

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.valid = [encode(value) for value in SAMPLES]
        self.valid += [encode([value, value]) for value in SAMPLES]

    def __call__(self) -> bytes:
        data = bytearray(self.random.choice(self.valid))
        for _ in range(self.random.choice((1, 1, 2, 3, 8))):
            self.mutate(data, self.random.randrange(len(data) + 1))
        if self.random.random() < 0.2:
            for _ in range(self.random.randint(1, 3)):
                data[:] = b"\x80" + ext(self.random.choice(CODES), bytes(data[1:]))
        return bytes(data)

    def mutate(self, data: bytearray, at: int) -> None:
        numbers = self.random
        match numbers.randrange(7):
            case 0:
                del data[at : at + numbers.randint(1, 4)]
            case 1:
                data[at : at + numbers.randrange(2)] = numbers.randbytes(numbers.randint(1, 4))
            case 2 if at < len(data):
                data[at] ^= 1 << numbers.randrange(8)
            case 3:
                other = numbers.choice(self.valid)
                start = numbers.randrange(len(other))
                data[at:at] = other[start : start + numbers.randint(1, 40)]
            case 4:
                data[at : at + 4] = numbers.choice(self.lies)
            case 5:
                data[at:at] = bytes(
                    (numbers.choice((0xC7, *range(0xD4, 0xD9))), numbers.choice(CODES))
                )
            case _:
                del data[at:]


def mutate_for(seconds: float, seed: int) -> dict[str, int]:
    """Decode mutated values; return how many there were, and how many of them were values."""
    limit_memory(512)
    mutator = Mutator(seed)
    count = values = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end or values <= 100:
        data = mutator()
        count += 1
        try:
            values += outcome(data) == "value"
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__} of {data.hex()}, seed {seed}") from error
    return {"count": count, "values": values}


def limit_memory(megabytes: int) -> None:
    """Let this process take so much more than it has by now."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = taken + megabytes * 1024 * 1024
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def test_mutated_values_are_values_or_codec_errors():
    """Bits flipped, parts swapped in, cut off and nested, lengths that lie."""
    found = Child(mutate_for, 1.5, 1).value()
    assert 100 < found["values"] < found["count"]


@pytest.mark.slow
def test_mutated_values_are_values_or_codec_errors_for_long():
    """A million and more, of other numbers each time."""
    children = [Child(mutate_for, 45, random.randrange(2**32)) for _ in range(2)]
    for child in children:
        found = child.value()
        assert 100 < found["values"] < found["count"]


# Depth.


@pytest.mark.parametrize("code", [-1, *CODES])
def test_deep_nesting_overruns_no_stack(code):
    """On a stack of half a megabyte as well."""

    def attempt() -> list[str]:
        outcomes = []
        threading.stack_size(512 * 1024)
        data = [nested(code, levels) for levels in (MAX_DEPTH + 2, 300, 1000, 100_000)]
        thread = threading.Thread(target=lambda: outcomes.extend(map(outcome, data)))
        thread.start()
        thread.join()
        return outcomes

    outcomes = Child(attempt).value()
    assert len(outcomes) == 4
    if code in (1, 4):
        assert outcomes == ["damaged value: nested too deep"] * 4


@pytest.mark.parametrize(
    "leaf",
    [
        pytest.param(dt.datetime(2020, 1, 1, tzinfo=dt.UTC), id="datetime"),
        pytest.param(2**70, id="big int"),
        pytest.param(np.int8(1), id="numpy scalar"),
    ],
)
def test_the_deepest_value_may_end_in_a_leaf_with_parts(leaf):
    """What is written is read, to the last level."""
    for wrap in (lambda v: (v,), lambda v: {1: v}, Slotted, Struct, lambda v: Point(v, 1)):
        value = leaf
        for _ in range(MAX_DEPTH):
            value = wrap(value)
        assert canonical(decode(encode(value))) == canonical(value)
        with pytest.raises(CodecError, match="deeper"):
            encode(wrap(value))


# Memory and time.

ITEMS = {
    "None": b"\xc0",
    "list": b"\x90",
    "dict": b"\x80",
    "dict of one": b"\x81\xa0\xc0",
    "tuple": b"\xd4\x01\x90",
    "set": b"\xd4\x02\x90",
    "frozenset": b"\xd4\x03\x90",
    "dict of other keys": b"\xd4\x04\x90",
    "bytearray": b"\xc7\x00\x05",
    "numpy str": b"\xc7\x00\x0d",
    "decimal": encode([decimal.Decimal(1)])[2:],
    "uuid": encode([uuid.UUID(int=1)])[2:],
    "datetime": encode([dt.datetime(2020, 1, 1)])[2:],
    "numpy scalar": encode([np.int8(1)])[2:],
    "empty array": encode([np.zeros(0)])[2:],
    "array of 64 dimensions": encode([np.zeros((0,) * 64)])[2:],
    "dataclass": encode([Plain(None)])[2:],
    "struct": encode([Struct(None)])[2:],
    "model": encode([Model(n=None)])[2:],
    "named tuple": encode([Point(None, None)])[2:],
    "flag": encode([Access(3)])[2:],
    "registered": encode([Registered(None)])[2:],
}


@pytest.mark.parametrize("size", [1000, 100_000])
@pytest.mark.parametrize("item", ITEMS.values(), ids=ITEMS.keys())
def test_memory_is_in_proportion_to_the_length(item, size):
    """The smallest of each kind, as many as there is room for."""
    data = filled(item, size)
    assert peak_memory(data) < 100 * len(data) + 50_000


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"\xdd\x00\x00\xff\xff", id="lists"),
        pytest.param(b"\xdf\x00\x00\xff\xff\xa0", id="dicts"),
        pytest.param(b"\xc9\x00\x00\xff\xff\x01\xdd\x00\x00\xff\xff", id="tuples"),
    ],
)
def test_lengths_that_lie_at_every_level_take_no_memory(head):
    """Each container claims as many items as there are bytes left."""
    data = b"\x80" + head * 250 + b"\xc0" * 66_000
    assert peak_memory(data) < 100 * len(data)


def peak_memory(data: bytes) -> int:
    """Return the most bytes that decoding takes at a time."""
    outcome(data)  # what is imported and cached once is not counted
    gc.collect()
    tracemalloc.start()
    try:
        with contextlib.suppress(CodecError):
            decode(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_all_zones_at_once_take_some_megabytes():
    """A key names a file of the system; each is read once."""
    zones = [zoneinfo.ZoneInfo(key) for key in sorted(zoneinfo.available_timezones())]
    data = encode([dt.datetime(2020, 1, 1, tzinfo=zone) for zone in zones])
    zoneinfo.ZoneInfo.clear_cache()
    del zones
    assert peak_memory(data) < 50_000_000


# Code.


class Noted:
    """Notes what was run."""

    ran: typing.ClassVar[list[str]] = []


class Watchful(type):
    """A metaclass that notes when its classes are looked at."""

    def __getattribute__(cls, name):
        Noted.ran.append(f"__getattribute__ {name}")
        return super().__getattribute__(name)

    def __getattr__(cls, name):
        Noted.ran.append(f"__getattr__ {name}")
        raise AttributeError(name)

    def __hash__(cls):
        Noted.ran.append("__hash__")
        return 1


class Watched(metaclass=Watchful):
    pass


@dataclasses.dataclass
class Careless:
    path: object

    def __init__(self, path) -> None:
        Noted.ran.append("__init__")

    def __new__(cls, *args):
        Noted.ran.append("__new__")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        Noted.ran.append("__post_init__")

    def __setattr__(self, name, value) -> None:
        Noted.ran.append("__setattr__")

    def __getattribute__(self, name):
        Noted.ran.append("__getattribute__")
        return super().__getattribute__(name)

    def __setstate__(self, state) -> None:
        Noted.ran.append("__setstate__")

    def __reduce__(self):
        Noted.ran.append("__reduce__")
        return str, ()

    def __init_subclass__(cls) -> None:
        Noted.ran.append("__init_subclass__")


class CarelessModel(pydantic.BaseModel):
    path: object

    def model_post_init(self, context) -> None:
        Noted.ran.append("model_post_init")

    @pydantic.field_validator("path")
    @classmethod
    def validate_path(cls, path):
        Noted.ran.append("validator")
        return path

    def __setstate__(self, state) -> None:
        Noted.ran.append("__setstate__")

    def __setattr__(self, name, value) -> None:
        Noted.ran.append("__setattr__")


class CarelessPair(typing.NamedTuple):
    path: object

    def __reduce__(self):
        Noted.ran.append("__reduce__")
        return str, ()


@dataclasses.dataclass
class Finalized:
    path: object

    def __del__(self) -> None:
        Noted.ran.append(f"__del__ with {self.path}")


class FinalizedStruct(msgspec.Struct):
    path: object

    def __del__(self) -> None:
        Noted.ran.append(f"__del__ with {self.path}")


@dataclasses.dataclass
class Guarded:
    path: object


Guarded.path = property(
    lambda self: Noted.ran.append("getter"), lambda self, value: Noted.ran.append("setter")
)


@pytest.mark.parametrize(
    ("cls", "state"),
    [
        pytest.param(Careless, [{"path": "evil"}], id="dataclass"),
        pytest.param(CarelessModel, [{"path": "evil"}, {"path"}, None, None], id="model"),
        pytest.param(CarelessPair, [{"path": "evil"}], id="named tuple"),
        pytest.param(Finalized, [{"path": "evil"}], id="finalizer"),
        pytest.param(FinalizedStruct, [{"path": "evil"}], id="finalizer of a struct"),
        pytest.param(Guarded, [{"path": "evil"}], id="setter"),
        pytest.param(Watched, [{"path": "evil"}], id="metaclass"),
    ],
)
def test_reading_runs_no_code_of_a_class(cls, state):
    """Neither what makes its objects, nor what changes, restores or ends them."""
    Noted.ran.clear()
    data = object_bytes(__name__, type.__getattribute__(cls, "__qualname__"), *state)
    try:
        value = decode(data)
    except CodecError:
        pass
    else:
        assert type(value) is cls
        del value
    gc.collect()
    assert Noted.ran == []


@pytest.mark.parametrize("value", [Finalized("p"), FinalizedStruct("p"), Guarded("p")])
def test_what_would_run_code_when_read_is_not_written(value):
    """The message says what to do instead."""
    with pytest.raises(CodecError, match="register_codec"):
        encode(value)


def test_a_module_that_is_not_there_stays_away(tmp_path, monkeypatch):
    """Not even one that could be imported, by any of its names."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hb_bomb.py").write_text(
        "import dataclasses\n"
        "@dataclasses.dataclass\n"
        "class Bomb:\n"
        "    n: object\n"
        "    def __post_init__(self): raise SystemExit\n"
        "raise SystemExit('imported')\n"
    )
    for module, name in [("hb_bomb", "Bomb"), ("hb_bomb.Bomb", "n"), ("importlib", "hb_bomb.Bomb")]:
        with pytest.raises(CodecError, match="no class"):
            decode(object_bytes(module, name, {"n": 1}))
    assert "hb_bomb" not in sys.modules


def build_everything() -> dict[str, object]:
    """Have bytes name every class of every module there is, with an auditor watching."""
    named = {
        (module.__name__, name)
        for module in list(sys.modules.values())
        if isinstance(module, type(sys))
        for name, item in list(vars(module).items())
        if issubclass(type(item), type)
    }
    attacks = [object_bytes(*name, *state) for name in named for state in ([{}], [["A"]])]
    attacks += [object_bytes(*name, fields) for name, fields in with_their_fields()]
    events, built, watching = [], 0, False

    def audit(event, args) -> None:
        if watching and event not in ("object.__getattr__", "object.__setattr__"):
            events.append(f"{event} {args!r}"[:200])

    sys.addaudithook(audit)
    watching = True
    sys.audit("is watching")
    for data in attacks:
        with contextlib.suppress(CodecError):
            decode(data)
            built += 1
    watching = False
    return {"classes": len(named), "built": built, "events": events[:20]}


def with_their_fields():
    """Yield every dataclass, struct and named tuple there is, with something in all its fields."""
    for module in list(sys.modules.values()):
        for item in list(vars(module).values()) if isinstance(module, type(sys)) else ():
            for holder in ("__dataclass_fields__", "__struct_fields__", "_fields"):
                fields = vars(item).get(holder) if issubclass(type(item), type) else None
                if isinstance(fields, dict | tuple) and fields:
                    yield (item.__module__, item.__qualname__), dict.fromkeys(fields, "evil")


def test_no_class_that_is_loaded_does_anything_when_it_is_named():
    """Python's own auditing sees no import, no file, no process, no socket, no compiling."""
    found = Child(build_everything).value()
    assert found["classes"] > 1000
    assert found["built"] > 50
    assert found["events"] == ["is watching ()"]


def test_a_name_of_a_time_zone_is_a_text():
    """It may be of a type derived from `str` where it is written, and is none where it is read."""
    zone = dt.timezone(dt.timedelta(hours=1), np.str_("é"))
    read = decode(encode(dt.time(1, tzinfo=zone)))
    assert read.tzinfo.tzname(None) == "é"
    assert type(read.tzinfo.tzname(None)) is str
    with pytest.raises(CodecError, match="time zone"):
        decode(bytes.fromhex("8092d50dc3a9d8089601000000009400cd0e1000d50dc3a9"))
