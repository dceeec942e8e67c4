"""Values come back from bytes exactly; bad bytes do no harm; canonical bytes tell values apart."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import functools
import itertools
import os
import random
import re
import struct
import subprocess
import sys
import threading
import tracemalloc
import typing
import uuid
import zoneinfo

import msgspec
import numpy as np
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hornbeam_state import arrays, packing
from hornbeam_state.codec import canonical, decode, encode, encode_parts, register_codec
from hornbeam_state.errors import CodecError

quick = settings(max_examples=150, deadline=None)

ZONES = [
    dt.UTC,
    dt.timezone(dt.timedelta(hours=5, minutes=45)),
    dt.timezone(-dt.timedelta(seconds=1), "odd"),
    *(
        zoneinfo.ZoneInfo(key)
        for key in ("Europe/Paris", "America/St_Johns")
        if key in zoneinfo.available_timezones()
    ),
]


# Classes that bytes name by module and qualified name.


class Colour(enum.Enum):
    RED = 1
    CRIMSON = 1  # noqa: PIE796 - an alias
    BLUE = "b"


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Level(enum.IntEnum):
    LOW = 1


class Word(enum.StrEnum):
    YES = "yes"


class Point(typing.NamedTuple):
    x: object
    y: object = None


@dataclasses.dataclass
class Plain:
    """Its __post_init__ must not run again: it would not leave `n` alone."""

    n: object
    items: list = dataclasses.field(default_factory=list)
    derived: object = dataclasses.field(default=None, init=False)

    def __post_init__(self):
        self.n = (self.n, "post")

    @functools.cached_property
    def cached(self):
        return "cached"


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    a: object
    b: object = 2


@dataclasses.dataclass
class Box(typing.Generic[typing.TypeVar("T")]):
    item: object


@dataclasses.dataclass
class Leaky:
    n: int

    def __post_init__(self):
        self.hidden = object()


@dataclasses.dataclass
class DictLike(dict):
    n: int = 0


@dataclasses.dataclass
class Failure(Exception):
    n: int = 0


class Struct(msgspec.Struct, rename="camel", tag="s"):
    first_name: object
    rest: object = 0


class FrozenStruct(msgspec.Struct, frozen=True, kw_only=True):
    a: object

    def __post_init__(self):
        msgspec.structs.force_setattr(self, "a", (self.a, "post"))


class StrictStruct(msgspec.Struct):
    n: int

    def __post_init__(self):
        if self.n < 0:
            raise ValueError


class DictStruct(msgspec.Struct, dict=True):
    a: int


class Model(pydantic.BaseModel):
    """Validation is not idempotent, aliases cross over, and there is private state."""

    model_config = pydantic.ConfigDict(extra="allow")

    a: int = pydantic.Field(alias="b")
    b: list[int] = pydantic.Field(default=[], alias="a")
    _secret: int = 7

    @pydantic.field_validator("a")
    @classmethod
    def double(cls, value):
        return value * 2

    def model_post_init(self, context, /):
        self._secret += 1


class Root(pydantic.RootModel[list[int]]):
    pass


class Outer:
    @dataclasses.dataclass
    class Inner:
        n: int


class MyStr(str):
    __slots__ = ()


class MyInt(int):
    pass


def fingerprint(value, *, exact=True):
    """Say what a value is, without the codec. `exact` counts order where `canonical` does not."""
    again = functools.partial(fingerprint, exact=exact)
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind is float:
        return name, struct.pack("<d", value)
    if kind is np.ndarray:
        order = value.flags.fnc if exact else None  # what is not contiguous is stored in C order
        return name, value.dtype.str, value.dtype.char, value.shape, order, value.tobytes()
    if kind in arrays.SCALARS:
        return name, value.dtype.str, value.tobytes()
    if kind in (list, tuple):
        return name, tuple(map(again, value))
    if kind in (set, frozenset):
        return name, tuple(sorted(map(again, value), key=repr))
    if kind is dict:
        pairs = [(again(key), again(item)) for key, item in value.items()]
        return name, tuple(pairs if exact else sorted(pairs, key=repr))
    if kind in (dt.datetime, dt.time):
        return name, value.replace(tzinfo=None).isoformat(), value.fold, zone_of(value.tzinfo)
    if isinstance(value, enum.Enum):
        return name, value.value
    if isinstance(value, tuple):
        return name, tuple(map(again, value))
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value)]
        return name, tuple((field, again(getattr(value, field))) for field in fields)
    if isinstance(value, msgspec.Struct):
        return name, tuple(again(getattr(value, field)) for field in kind.__struct_fields__)
    return name, str(value)


def zone_of(zone):
    if zone is None or isinstance(zone, zoneinfo.ZoneInfo):
        return str(zone)
    return zone.utcoffset(None), zone.tzname(None)


def assert_exact(value, back):
    assert fingerprint(back) == fingerprint(value)


# What hypothesis may draw.

floats = st.floats() | st.integers(0, 2**64 - 1).map(
    lambda bits: struct.unpack("<d", struct.pack("<Q", bits))[0]
)
times = st.tuples(st.times(), st.sampled_from([None, *ZONES]), st.integers(0, 1)).map(
    lambda parts: parts[0].replace(tzinfo=parts[1], fold=parts[2])
)
datetimes = st.tuples(st.datetimes(), st.sampled_from([None, *ZONES]), st.integers(0, 1)).map(
    lambda parts: parts[0].replace(tzinfo=parts[1], fold=parts[2])
)
dtypes = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(),
    hnp.unsigned_integer_dtypes(),
    hnp.floating_dtypes(sizes=(16, 32, 64)),
    hnp.complex_number_dtypes(sizes=(64, 128)),
    hnp.byte_string_dtypes(max_len=5),
    hnp.unicode_string_dtypes(max_len=5),
    hnp.datetime64_dtypes(),
    hnp.timedelta64_dtypes(),
    st.sampled_from(["q", ">Q", "<M8[25s]", "m8"]).map(np.dtype),
)


def raw_array(dtype, shape, order, step, seed):
    """Make an array of random bits, but for text, which must hold code points."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = rng.integers(0, 2 if dtype.kind == "b" else 256, size, np.uint8).tobytes()
    if dtype.kind == "U":
        raw = rng.integers(0, 0x110000, size // 4, np.uint32).astype(f"{dtype.str[0]}u4").tobytes()
    array = np.ndarray(shape, dtype, raw).copy(order)
    return array[::step] if shape else array


ndarrays = st.builds(
    raw_array,
    dtypes,
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    st.sampled_from("CF"),
    st.sampled_from([1, 2, -1]),
    st.integers(0, 2**32),
)
numpy_scalars = st.builds(
    lambda dtype, seed: raw_array(dtype.newbyteorder("="), (), "C", 1, seed)[()],
    dtypes.filter(lambda dtype: dtype.kind not in "SU"),
    st.integers(0, 2**32),
)
decimals = st.decimals() | st.sampled_from(
    [decimal.Decimal(text) for text in ("-0E+3", "sNaN12", "1E+999999", "-NaN", "1.50")]
)
hashable_leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(2**63 - 2, 2**64 + 1),
    floats,
    st.text(max_size=20),
    st.binary(max_size=20),
    datetimes,
    st.dates(),
    times,
    st.timedeltas(),
    decimals.filter(lambda value: not value.is_snan()),
    st.uuids(),
    st.text(max_size=5).map(np.str_),
    st.binary(max_size=5).map(np.bytes_),
    numpy_scalars.filter(lambda value: value.dtype.str[1:] != "m8"),  # these have no hash
    st.sampled_from([Colour.RED, Colour.BLUE, Access.READ | Access.WRITE, Level.LOW, Word.YES]),
)
leaves = (
    hashable_leaves | decimals | numpy_scalars | ndarrays | st.binary(max_size=9).map(bytearray)
)
hashables = st.recursive(
    hashable_leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(tuple),
        st.frozensets(inner, max_size=3),
        st.builds(Point, inner, inner),
        st.builds(Slotted, inner),
    ),
    max_leaves=5,
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.sets(hashables, max_size=4),
        st.frozensets(hashables, max_size=4),
        st.dictionaries(st.text(max_size=5), inner, max_size=4),
        st.dictionaries(hashables, inner, max_size=4),
        st.builds(Point, inner, inner),
        st.builds(Plain, inner),
        st.builds(Slotted, inner, inner),
        st.builds(Struct, inner, inner),
        st.builds(FrozenStruct, a=inner),
    ),
    max_leaves=12,
)
few = st.sampled_from(
    [0, 1, 1.0, -0.0, 0.0, True, False, "", "0", "1", b"", b"1", None, np.int64(1), 2**64]
)
small = st.recursive(
    few,
    lambda inner: st.one_of(
        st.lists(inner, max_size=2),
        st.lists(few, max_size=2).map(tuple),
        st.sets(few, max_size=2),
        st.dictionaries(few, inner, max_size=2),
        st.builds(Slotted, inner),
    ),
    max_leaves=4,
)

SAMPLES = [
    pytest.param(None, "84", id="none"),
    pytest.param(True, "85", id="true"),
    pytest.param(False, "86", id="false"),
    pytest.param(0, b"0".hex(), id="zero"),
    pytest.param(-12, b"-12".hex(), id="negative"),
    pytest.param(2**63 - 1, b"9223372036854775807".hex(), id="largest counter"),
    pytest.param(-(2**63), b"-9223372036854775808".hex(), id="smallest counter"),
    pytest.param(2**63, "80cf8000000000000000", id="just over a counter"),
    pytest.param(2**64, "80c70900000000000000000001", id="over 64 bits"),
    pytest.param(-(2**63) - 1, "80c70900ffffffffffffff7fff", id="under 64 bits"),
    pytest.param(1.5, "873ff8000000000000", id="float"),
    pytest.param("5", "8135", id="str"),
    pytest.param("", "81", id="empty str"),
    pytest.param(b"5", "8235", id="bytes"),
    pytest.param([1, "a"], "809201a161", id="list"),
    pytest.param((1,), "80d5019101", id="tuple"),
    pytest.param({1}, "80d5029101", id="set"),
    pytest.param(frozenset(), "80d40390", id="frozenset"),
    pytest.param({"a": 1}, "8081a16101", id="dict"),
    pytest.param({1: 2}, "80c70304920102", id="dict of int"),
    pytest.param(bytearray(b"x"), "80d40578", id="bytearray"),
    pytest.param(dt.date(2020, 1, 2), "80c7060793cd07e40102", id="date"),
    pytest.param(decimal.Decimal("1.50"), "80d60a312e3530", id="decimal"),
    pytest.param(np.array([1], "<i2"), "83020001033c69320001000000000000000100", id="array"),
    pytest.param(np.float32(1), "8301020003" + b"<f4".hex() + "000000803f", id="numpy scalar"),
]


class TestRoundTrip:
    @quick
    @given(values)
    def test_every_value_comes_back_exactly(self, value):
        """Value, exact types, dtypes, shapes and orders survive, at every depth."""
        assert_exact(value, decode(encode(value)))

    @quick
    @given(values)
    def test_decoding_a_view_of_a_larger_buffer(self, value):
        """A memoryview does as well as bytes, and is not kept."""
        data = encode(value)
        buffer = bytearray(b"??" + data + b"??")
        back = decode(memoryview(buffer)[2:-2])
        buffer[:] = bytes(len(buffer))
        assert_exact(value, back)

    @quick
    @given(values)
    def test_only_counters_start_like_numbers(self, value):
        """Backends count with what looks like an int of 64 bits, so nothing else may."""
        data = encode(value)
        if type(value) is int and -(2**63) <= value < 2**63:
            assert data == str(value).encode()
        else:
            assert data[0] >= 0x80

    @quick
    @given(values)
    def test_encoding_again_makes_the_same_bytes(self, value):
        """Of the same object always; of an equal one, but for the order of sets, as well."""
        data = encode(value)
        assert encode(value) == data
        back = decode(data)
        assert len(encode(back)) == len(data)
        assert canonical(back) == canonical(value)

    @quick
    @given(values)
    def test_the_parts_of_a_value_make_its_bytes(self, value):
        assert b"".join(encode_parts(value)) == encode(value)

    @pytest.mark.parametrize("array", [np.ones((9, 9)), np.ones((9, 9), order="F"), np.ones(0)])
    def test_the_last_part_of_an_array_is_its_own_memory(self, array):
        header, elements = encode_parts(array)
        assert header + bytes(elements) == encode(array)
        assert np.shares_memory(np.frombuffer(elements), array) or not array.size

    @pytest.mark.parametrize("wrap", [lambda v: v, lambda v: [v], lambda v: (v,)])
    @pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8", "<c8", ">c16"])
    def test_the_bits_of_nans_are_kept(self, dtype, wrap):
        """Quiet and signalling ones, of either sign, with any payload."""
        unit = np.dtype(dtype).newbyteorder("=").type(0).real.dtype
        ones = {2: 0x7C00, 4: 0x7F800000, 8: 0x7FF0000000000000}[unit.itemsize]
        bits = [
            ones | payload | sign << (8 * unit.itemsize - 1)
            for payload in (1, 2, 0x2AA)
            for sign in (0, 1)
        ]
        array = np.array(bits, f"{dtype[0]}u{unit.itemsize}").view(dtype)
        assert np.isnan(array).all()
        (back,) = decode(encode([wrap(array)]))
        assert fingerprint(back) == fingerprint(wrap(array))
        numbers = [
            struct.unpack("<d", struct.pack("<Q", 0x7FF0000000000001 | n))[0] for n in (0, 5)
        ]
        assert fingerprint(decode(encode(wrap(numbers)))) == fingerprint(wrap(numbers))

    @pytest.mark.parametrize(("value", "data"), SAMPLES)
    def test_format_stays_as_it_is(self, value, data):
        """Stored values outlive the program: these bytes must be read for ever."""
        assert encode(value).hex() == data
        assert_exact(value, decode(bytes.fromhex(data)))

    @pytest.mark.parametrize(
        "array",
        [
            pytest.param(np.asfortranarray(np.arange(6.0).reshape(2, 3)), id="fortran"),
            pytest.param(np.arange(24).reshape(2, 3, 4).T, id="fortran 3-d"),
            pytest.param(np.arange(6).astype(">i4"), id="other byte order"),
            pytest.param(np.array(5.0), id="0-d"),
            pytest.param(np.zeros((0, 7), "f2"), id="empty"),
            pytest.param(np.array(["NaT", "2020"], "M8[D]"), id="datetime64"),
            pytest.param(np.array(["é", "\ud800", ""]), id="text with a lone surrogate"),
            pytest.param(np.array([b"a\0b", b""]), id="bytes"),
            pytest.param(np.zeros(3, "longlong"), id="long long"),
            pytest.param(np.zeros((1,) * 64), id="64 dimensions"),
        ],
    )
    @pytest.mark.parametrize("wrap", [lambda a: a, lambda a: [a, a]], ids=["bare", "in a list"])
    def test_arrays_come_back_exactly_and_own_their_memory(self, array, wrap):
        """Also where hypothesis seldom looks."""
        back = decode(encode(wrap(array)))
        assert_exact(wrap(array), back)
        back = back[0] if isinstance(back, list) else back
        assert back.flags.writeable
        assert back.flags.owndata

    @pytest.mark.parametrize("wrap", [lambda a: a, lambda a: [a]], ids=["bare", "in a list"])
    def test_changing_a_decoded_array_changes_nobody_elses(self, wrap):
        """Two readers of the same bytes get two arrays."""
        data = encode(wrap(np.arange(4)))
        first = decode(data)
        (first if isinstance(first, np.ndarray) else first[0])[:] = 9
        assert_exact(wrap(np.arange(4)), decode(data))

    def test_read_only_and_strided_arrays_are_stored_by_content(self):
        """What cannot be kept, strides and the read-only flag, is normal again after."""
        array = np.arange(12).reshape(3, 4)[:, ::2]
        array.flags.writeable = False
        back = decode(encode(array))
        assert back.tolist() == array.tolist()
        assert back.flags.c_contiguous
        assert back.flags.writeable

    def test_ints_of_any_size_do_not_meet_pythons_digit_limit(self):
        """Large ints travel in binary."""
        assert decode(encode([10**5000, -(10**5000)])) == [10**5000, -(10**5000)]

    def test_decimals_do_not_depend_on_the_context(self):
        """Precision and letter case of the thread's context do not show."""
        value = decimal.Decimal("1.2345678901234567890E+50")
        plain = encode(value)
        with decimal.localcontext(decimal.Context(prec=3, capitals=0)):
            assert encode(value) == plain
            assert str(decode(plain)) == "1.2345678901234567890e+50"

    def test_dicts_keep_insertion_order(self):
        """Also those whose keys are not str."""
        for value in ({"b": 1, "a": 2}, {(2,): 1, None: 2, b"": 3, 1.5: 4}):
            assert list(decode(encode(value)).items()) == list(value.items())

    def test_utc_comes_back_as_the_one_utc(self):
        """Code asks `tz is UTC`."""
        assert decode(encode(dt.datetime(2020, 1, 1, tzinfo=dt.UTC))).tzinfo is dt.UTC

    def test_threads_may_share_the_codec(self):
        """Nested decoding in many threads at once does not mix values up."""
        data = [encode([(i, {i: (i,)})] * 50) for i in range(4)]
        failures = []

        def work(i):
            for _ in range(50):
                if decode(data[i]) != [(i, {i: (i,)})] * 50:
                    failures.append(i)

        run_threads(work, 4)
        assert not failures


def run_threads(work, count):
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class TestObjects:
    @pytest.mark.parametrize(
        "value",
        [
            pytest.param(Plain(1, [2]), id="dataclass"),
            pytest.param(Slotted((1,), {2}), id="frozen dataclass with slots"),
            pytest.param(Box[int](3), id="generic dataclass"),
            pytest.param(Outer.Inner(4), id="nested class"),
            pytest.param(Struct("a", rest=b"b"), id="struct"),
            pytest.param(FrozenStruct(a=1), id="frozen struct"),
            pytest.param(Point(1, "y"), id="named tuple"),
            pytest.param(Colour.CRIMSON, id="enum by an alias"),
            pytest.param(Access.READ | Access.WRITE, id="combined flags"),
            pytest.param(Access(0), id="no flags"),
            pytest.param(Level.LOW, id="int enum"),
            pytest.param(Word.YES, id="str enum"),
        ],
    )
    def test_objects_of_importable_classes_come_back(self, value):
        """Without running their constructors: what those did is in the fields already."""
        back = decode(encode(value))
        assert_exact(value, back)
        assert back == value

    @pytest.mark.parametrize(
        "model",
        [
            pytest.param(Model(b=1), id="default left alone"),
            pytest.param(Model(b=1, a=[2], other=(3,)), id="extra"),
            pytest.param(Model.model_construct(a="not an int", b=None), id="unvalidated"),
            pytest.param(Root([1, 2]), id="root"),
        ],
    )
    def test_models_come_back_with_all_their_state(self, model):
        """Fields, extras, private attributes and what was set, with no validator run again."""
        back = decode(encode(model))
        assert type(back) is type(model)
        assert back == model
        assert back.__dict__ == model.__dict__
        assert back.model_fields_set == model.model_fields_set
        assert back.model_extra == model.model_extra
        assert back.__pydantic_private__ == model.__pydantic_private__

    def test_cached_properties_are_computed_again(self):
        """They are no state of their own, so they do not stand in the way either."""
        value = Plain(1)
        bare = encode(value)
        assert value.cached
        assert encode(value) == bare
        assert decode(bare).cached == "cached"

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            pytest.param(Leaky(1), "attribute that is not a field", id="extra attribute"),
            pytest.param(DictLike(n=1), "register_codec", id="dataclass that is a dict"),
            pytest.param(Failure(1), "register_codec", id="dataclass that is an exception"),
            pytest.param(
                dataclasses.make_dataclass("Lost", ["n"])(1), "found again", id="unfindable class"
            ),
            pytest.param(
                typing.NamedTuple("Lost", [("n", int)])(1),
                "found again",
                id="unfindable named tuple",
            ),
        ],
    )
    def test_objects_that_would_lose_something_are_refused(self, value, message):
        """Better an error when writing than another value when reading."""
        with pytest.raises(CodecError, match=message):
            encode(value)

    def test_struct_with_other_attributes_is_refused(self):
        """`dict=True` lets structs carry more than their fields."""
        value = DictStruct(1)
        assert decode(encode(value)) == value
        value.more = 2
        with pytest.raises(CodecError, match="DictStruct"):
            encode(value)

    def test_a_struct_that_refuses_its_fields_is_a_codec_error(self):
        """msgspec runs `__post_init__` whatever we do, so its error is passed on as the cause."""
        value = StrictStruct(1)
        assert decode(encode(value)) == value
        value.n = -1
        with pytest.raises(CodecError, match=r"StrictStruct\.__post_init__") as info:
            decode(encode(value))
        assert isinstance(info.value.__cause__, ValueError)

    def test_object_that_lacks_a_field_is_refused(self):
        """A deleted attribute cannot be stored."""
        value = Slotted(1)
        object.__delattr__(value, "a")
        with pytest.raises(CodecError, match="Slotted object that lacks"):
            encode(value)

    def test_changed_fields_are_refused(self):
        """Bytes of an older class are not squeezed into the newer one."""
        data = encode(Outer.Inner(1))
        assert data.count(b"\xa1n") == 1
        with pytest.raises(CodecError, match=r"Outer\.Inner has other fields"):
            decode(data.replace(b"\xa1n", b"\xa1m"))

    @pytest.mark.parametrize(
        ("module", "qualname"),
        [
            pytest.param("antigravity", "Geo", id="module not imported"),
            pytest.param("subprocess", "Popen", id="class without fields"),
            pytest.param("os", "system", id="function"),
            pytest.param("os", "path", id="module"),
            pytest.param(__name__, "Outer", id="plain class"),
            pytest.param(__name__, "Missing", id="missing class"),
            pytest.param(__name__, "Point.x", id="attribute of a class"),
            pytest.param(__name__, "typing.NamedTuple", id="through another module"),
            pytest.param("", "", id="no names"),
        ],
    )
    def test_bytes_can_only_name_known_classes_with_fields(self, module, qualname):
        """Nothing is imported and nothing called, and the message says what to do."""
        data = object_bytes(module, qualname, {"n": 1})
        with pytest.raises(CodecError, match="import its module"):
            decode(data)
        assert "antigravity" not in sys.modules

    def test_modules_that_import_lazily_are_not_woken(self, monkeypatch):
        """Looking a class up does not go through `__getattr__` of its module."""
        lazy = type(sys)("hb_lazy")
        lazy.__getattr__ = lambda name: pytest.fail(f"asked for {name}")
        monkeypatch.setitem(sys.modules, "hb_lazy", lazy)
        with pytest.raises(CodecError, match=r"hb_lazy\.Thing"):
            decode(object_bytes("hb_lazy", "Thing", {}))

    @pytest.mark.parametrize(
        "state",
        [
            pytest.param([{"a": 1, "b": []}], id="too short"),
            pytest.param([{"a": 1, "b": []}, [], None, None], id="fields set not a set"),
            pytest.param([{"a": 1, "b": []}, {"a"}, 5, None], id="extra not a dict"),
            pytest.param([{"a": 1, "b": []}, {"a"}, {}, {"__class__": 1}], id="foreign private"),
            pytest.param([{"a": 1}, {"a"}, None, None], id="missing field"),
        ],
    )
    def test_damaged_model_state_is_refused(self, state):
        """Only what `encode` writes becomes a model."""
        with pytest.raises(CodecError):
            decode(object_bytes(__name__, "Model", *state))

    def test_a_store_without_pydantic_reads_and_writes_without_it(self):
        """Nothing of ours imports pydantic or torch, not even to look at a value of unknown type."""
        script = """
            import sys
            from hornbeam_state.codec import CodecError, decode, encode
            decode(encode([1, (2,), {3: 4}]))
            try:
                encode(object())
            except CodecError:
                print(not {"pydantic", "torch"} & sys.modules.keys())
        """
        assert run_script(script) == "True"


def object_bytes(module, qualname, *state):
    body = encode([module, qualname, *state])[1:]
    return b"\x80" + msgspec.msgpack.encode(msgspec.msgpack.Ext(15, body))


def run_script(text, **environment):
    lines = [line.removeprefix(" " * 12) for line in text.splitlines()]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()


class TestRefused:
    @pytest.mark.parametrize(
        "value",
        [
            pytest.param(object(), id="object"),
            pytest.param(1 + 2j, id="complex"),
            pytest.param(range(3), id="range"),
            pytest.param(memoryview(b"x"), id="memoryview"),
            pytest.param(int, id="class"),
            pytest.param(len, id="function"),
            pytest.param(MyStr("x"), id="str subclass"),
            pytest.param(MyInt(1), id="int subclass"),
            pytest.param(collections.OrderedDict(a=1), id="OrderedDict"),
            pytest.param(collections.defaultdict(list), id="defaultdict"),
            pytest.param(collections.Counter("a"), id="Counter"),
            pytest.param(np.arange(4).reshape(2, 2).view(np.matrix), id="matrix"),
            pytest.param(np.ma.array([1], mask=[True]), id="masked array"),
            pytest.param(np.rec.array([(1,)]), id="record array"),
            pytest.param(np.zeros(2, "i4,f4"), id="structured"),
            pytest.param(np.zeros(2, "i4,f4")[0], id="structured scalar"),
            pytest.param(np.array([None]), id="object array"),
            pytest.param(np.zeros(2, "longdouble"), id="long double"),
            pytest.param(np.longdouble(1), id="long double scalar"),
            pytest.param(np.array(["a"], np.dtypes.StringDType()), id="variable-width strings"),
            pytest.param(np.ndarray((2,), "U0"), id="text of width 0"),
            pytest.param(
                dt.datetime(2020, 1, 1, tzinfo=type("Z", (dt.tzinfo,), {})()), id="tzinfo"
            ),
        ],
    )
    @pytest.mark.parametrize("function", [encode, canonical])
    @pytest.mark.parametrize("wrap", [lambda v: v, lambda v: {"k": [v]}], ids=["bare", "nested"])
    def test_what_would_not_come_back_exactly_is_refused(self, value, function, wrap):
        """Never silently made into a value of another type."""
        with pytest.raises(CodecError):
            function(wrap(value))

    def test_the_message_names_the_type_and_the_way_out(self):
        """Whoever meets it knows what to do."""
        with pytest.raises(CodecError, match=r"collections\.OrderedDict .*register_codec"):
            encode({"k": collections.OrderedDict(a="payload")})

    @pytest.mark.parametrize(
        "value",
        [
            pytest.param("a\ud800", id="str"),
            pytest.param(["a\ud800"], id="in a list"),
            pytest.param({"a\ud800": 1}, id="key"),
            pytest.param({("a\ud800",): 1}, id="in a key"),
            pytest.param(np.str_("a\ud800"), id="numpy"),
            pytest.param(Slotted("a\ud800"), id="field"),
            pytest.param(
                dt.time(1, tzinfo=dt.timezone(dt.timedelta(0), "a\ud800")), id="zone name"
            ),
        ],
    )
    @pytest.mark.parametrize("function", [encode, canonical])
    def test_lone_surrogates_are_refused_clearly(self, value, function):
        """And without a traceback that quotes the text."""
        with pytest.raises(CodecError, match="lone surrogates") as info:
            function(value)
        assert info.value.__cause__ is None
        assert info.value.__suppress_context__

    def nested(self, wrap, depth):
        value = 1
        for _ in range(depth):
            value = wrap(value)
        return value

    @pytest.mark.parametrize(
        "wrap",
        [
            pytest.param(lambda v: [v], id="list"),
            pytest.param(lambda v: (v,), id="tuple"),
            pytest.param(lambda v: {"k": v}, id="dict"),
            pytest.param(lambda v: {1: v}, id="dict of int"),
            pytest.param(lambda v: frozenset([v]), id="frozenset"),
            pytest.param(Slotted, id="dataclass"),
            pytest.param(Point, id="named tuple"),
        ],
    )
    @pytest.mark.parametrize("function", [encode, canonical])
    def test_depth_is_bounded(self, wrap, function):
        """What can be written can be read, also from a deep stack; what is deeper is refused."""
        function(self.nested(wrap, packing.MAX_DEPTH))
        for depth in (packing.MAX_DEPTH + 1, 5_000):
            with pytest.raises(CodecError, match="nested deeper"):
                function(self.nested(wrap, depth))

    def test_deepest_values_are_read_on_a_deep_stack(self):
        """Web frameworks take some hundred frames before the app runs."""

        def at(frames, call):
            return call() if not frames else at(frames - 1, call)

        value = self.nested(Point, packing.MAX_DEPTH)
        assert at(300, lambda: decode(encode(value)) == value)

    @pytest.mark.parametrize("function", [encode, canonical])
    def test_values_that_contain_themselves_are_refused(self, function):
        """With an error, not a RecursionError."""
        loop = []
        loop.append({"loop": loop})
        with pytest.raises(CodecError, match="contains itself"):
            function(loop)

    def test_a_stack_without_room_is_a_codec_error(self):
        """Wherever the recursion limit strikes."""
        value = self.nested(lambda v: (v,), packing.MAX_DEPTH)
        data = encode(value)

        def deepest(call):
            try:
                return deepest(call)
            except RecursionError:
                return call()

        for call in (lambda: encode(value), lambda: decode(data)):
            with pytest.raises((CodecError, RecursionError)):
                deepest(call)


class TestTorch:
    @pytest.fixture
    def torch(self):
        return pytest.importorskip("torch")

    @pytest.mark.parametrize(
        "name",
        ["bool", "uint8", "int64", "float16", "bfloat16", "float32", "float64", "complex64"],
    )
    @pytest.mark.parametrize("shape", [(), (0, 3), (2, 3), (2, 1, 2)], ids=str)
    @pytest.mark.parametrize("wrap", [lambda v: v, lambda v: [v]], ids=["bare", "nested"])
    def test_cpu_tensors_come_back_exactly(self, torch, name, shape, wrap):
        """Also in the types that numpy lacks."""
        tensor = (
            (torch.arange(12)[: int(np.prod(shape))] % 3).reshape(shape).to(getattr(torch, name))
        )
        back = decode(encode(wrap(tensor)))
        back = back[0] if isinstance(back, list) else back
        assert type(back) is torch.Tensor
        assert back.dtype is tensor.dtype
        assert back.shape == tensor.shape
        assert torch.equal(back, tensor)
        assert canonical(back) == canonical(tensor)

    def test_views_are_stored_by_content(self, torch):
        """Transposed, strided and conjugated tensors keep their values and become dense."""
        tensor = torch.arange(12).reshape(3, 4) * 1j
        for view in (tensor.T, tensor[:, ::2], tensor.conj()):
            assert torch.equal(decode(encode(view)), view)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            pytest.param(lambda t: t.zeros(2, requires_grad=True), r"\.detach\(\)", id="grad"),
            pytest.param(lambda t: t.nn.Parameter(t.zeros(2)), r"\.detach\(\)", id="parameter"),
            pytest.param(
                lambda t: t.nn.Parameter(t.zeros(2), requires_grad=False),
                r"\.detach\(\)",
                id="frozen parameter",
            ),
            pytest.param(lambda t: t.zeros(2, device="meta"), r"\.cpu\(\)", id="elsewhere"),
            pytest.param(lambda t: t.zeros(2).to_sparse(), "sparse", id="sparse"),
        ],
    )
    def test_other_tensors_are_refused_with_what_to_call(self, torch, make, message):
        """A store keeps dense values, not graphs or device memory."""
        with pytest.raises(CodecError, match=message):
            encode(make(torch))

    def test_changing_a_decoded_tensor_changes_nobody_elses(self, torch):
        """It owns its memory."""
        data = encode(torch.zeros(3))
        decode(data).fill_(1)
        assert decode(data).sum() == 0

    def test_damaged_tensors_are_refused(self, torch):
        """By their size and type, before anything is allocated."""
        data = encode(torch.zeros(3))
        for bad in (data[:-1], data + b"\0", data.replace(b"float32", b"storage")):
            with pytest.raises(CodecError):
                decode(bad)

    def test_without_torch_a_stored_tensor_is_a_codec_error(self, torch, monkeypatch):
        """A process that has no torch is told so."""
        data = encode(torch.zeros(3))
        monkeypatch.setitem(sys.modules, "torch", None)
        with pytest.raises(CodecError, match="torch is not installed"):
            decode(data)


class Celsius:
    def __init__(self, degrees):
        self.degrees = degrees


def make_celsius(degrees):
    return Celsius(degrees)


def degrees_of(celsius):
    return celsius.degrees


class TestRegister:
    def test_a_registered_type_comes_back(self):
        """Through its functions, at any depth, canonically too."""
        register_codec(Celsius, "tests.celsius", degrees_of, make_celsius)
        for degrees in (20, 2**70, (20.5, [b"x"]), Celsius(1)):
            back = decode(encode({"t": [Celsius(degrees)]}))["t"][0]
            assert type(back) is Celsius
            assert canonical(back) == canonical(Celsius(degrees)) != canonical(degrees)

    def test_registering_the_same_again_does_nothing(self):
        """Modules may be imported in any order and register what they need."""
        for _ in range(2):
            register_codec(Celsius, "tests.celsius", degrees_of, make_celsius)

    def test_registering_something_else_is_an_error(self):
        """Neither a type nor a name may mean two things."""
        register_codec(Celsius, "tests.celsius", degrees_of, make_celsius)
        other = type("Other", (), {})
        for args in (
            (Celsius, "tests.other", degrees_of, make_celsius),
            (Celsius, "tests.celsius", degrees_of, str),
            (other, "tests.celsius", degrees_of, make_celsius),
        ):
            with pytest.raises(ValueError, match="registered"):
                register_codec(*args)
        with pytest.raises(CodecError):
            encode(other())

    @pytest.mark.parametrize("known", [int, str, type(None), dict, tuple, np.ndarray, np.float32])
    def test_what_the_codec_knows_cannot_be_replaced(self, known):
        """Else one program would read another's values differently."""
        with pytest.raises(ValueError, match="by itself"):
            register_codec(known, "tests.known", str, str)

    @pytest.mark.parametrize(
        "args",
        [
            pytest.param(("Celsius", "tests.bad", str, str), id="type"),
            pytest.param((MyStr, b"tests.bad", str, str), id="name"),
            pytest.param((MyStr, "tests.bad", None, str), id="encode"),
            pytest.param((MyStr, "tests.bad", str, None), id="decode"),
        ],
    )
    def test_wrong_arguments_are_type_errors(self, args):
        """At the call, not at the first value."""
        with pytest.raises(TypeError):
            register_codec(*args)

    def test_subclasses_and_dataclasses_can_be_registered(self):
        """Exactly that type: a subclass of it is another."""

        class kind(typing.NamedTuple):
            a: int
            b: object

        register_codec(kind, "tests.local", tuple, kind._make)
        assert_exact(kind(1, (2,)), decode(encode(kind(1, (2,)))))
        with pytest.raises(CodecError):
            encode(type("Sub", (kind,), {})(1, 2))

    def test_an_endless_encode_function_is_stopped(self):
        """One that returns what it was given, say."""
        kind = type("Endless", (), {})
        register_codec(kind, "tests.endless", lambda value: [value], make_celsius)
        with pytest.raises(CodecError, match="nested deeper"):
            encode(kind())

    def test_errors_of_the_functions_are_told_apart(self):
        """Encoding raises the function's own error, decoding a CodecError caused by it."""
        kind = type("Failing", (), {"ok": True})

        def dump(value):
            return None if value.ok else 1 / 0

        def load(_):
            raise LookupError

        register_codec(kind, "tests.failing", dump, load)
        value = kind()
        with pytest.raises(CodecError, match=r"tests\.failing") as info:
            decode(encode(value))
        assert isinstance(info.value.__cause__, LookupError)
        value.ok = False
        with pytest.raises(ZeroDivisionError):
            encode(value)

    def test_an_unregistered_name_is_a_codec_error(self):
        """A process that lacks the codec is told its name."""
        register_codec(Celsius, "tests.celsius", degrees_of, make_celsius)
        data = encode(Celsius(1)).replace(b"tests.celsius", b"tests.missing")
        with pytest.raises(CodecError, match=r"'tests\.missing' here: call register_codec"):
            decode(data)

    def test_of_threads_that_register_one_name_one_wins(self):
        """The registry never holds half of two registrations."""
        kinds = [type(f"Racer{i}", (), {}) for i in range(8)]
        won, lost = [], []
        start = threading.Barrier(8)

        def work(i):
            start.wait()
            try:
                register_codec(kinds[i], "tests.racer", lambda _: None, lambda _: None)
                won.append(kinds[i])
            except ValueError:
                lost.append(kinds[i])

        run_threads(work, 8)
        assert (len(won), len(lost)) == (1, 7)
        assert encode(won[0]())


class TestHostileBytes:
    @pytest.mark.parametrize(
        "data",
        [
            pytest.param(b"", id="nothing"),
            pytest.param(b"-", id="sign alone"),
            pytest.param(b"-0", id="minus zero"),
            pytest.param(b"05", id="leading zero"),
            pytest.param(b"-05", id="negative leading zero"),
            pytest.param(b"+5", id="plus"),
            pytest.param(b"1_000", id="underscore"),
            pytest.param(b"5 ", id="trailing space"),
            pytest.param(b"5\n", id="newline"),
            pytest.param(b" 5", id="leading space"),
            pytest.param(b"5.0", id="fraction"),
            pytest.param(b"9223372036854775808", id="over 64 bits"),
            pytest.param(b"-9223372036854775809", id="under 64 bits"),
            pytest.param(b"1" * 10_000_000, id="endless digits"),
            pytest.param("\u0665".encode(), id="other digits"),
            pytest.param(b"hello", id="text"),
            pytest.param(b"\x00", id="zero byte"),
            pytest.param(b"\x90", id="later version"),
            pytest.param(b"\x88", id="unknown tag"),
            pytest.param(b"\x84\x00", id="more than None"),
            pytest.param(b"\x87\x00", id="short float"),
            pytest.param(b"\x87" + bytes(9), id="long float"),
            pytest.param(b"\x81\xff", id="no UTF-8"),
            pytest.param(b"\x80", id="no msgpack"),
            pytest.param(b"\x80\x01\x02", id="trailing bytes"),
            pytest.param(b"\x80\xd4\x7f\x00", id="unknown extension"),
            pytest.param(b"\x80\xd4\x01\x01", id="tuple of no list"),
            pytest.param(b"\x80\xd5\x04\x91\x01", id="half a pair"),
            pytest.param(b"\x80\xc7\x03\x04\x92\x90\x01", id="list as a key"),
            pytest.param(b"\x80\xd5\x02\x91\x90", id="list in a set"),
            pytest.param(b"\x80\xd6\x0a 1.5", id="decimal with a space"),
            pytest.param(b"\x80\xd6\x0a1_00", id="decimal with an underscore"),
            pytest.param(b"\x80\xd6\x0aabcd", id="no decimal"),
            pytest.param(b"\x80\xc7\x07\x07\x91\xc4\x04\x07\xe4\x01\xff", id="date of a pickle"),
            pytest.param(b"\x80" + b"\x91" * 100_000, id="deep lists"),
            pytest.param(b"\x80" + b"\x81\xa1a" * 100_000, id="deep dicts"),
            pytest.param(b"\x83", id="no array"),
            pytest.param(b"\x83\x00\x00", id="array without header"),
            pytest.param(b"\x83\xff\x00\x00", id="array with half a header"),
        ],
    )
    def test_damaged_bytes_are_codec_errors(self, data):
        """Strictly: only what `encode` may have written is read."""
        for form in (data, memoryview(data)):
            with pytest.raises(CodecError):
                decode(form)

    @pytest.mark.parametrize(
        ("element", "shape", "size"),
        [
            pytest.param(b"<f8", (2**40,), 8, id="huge"),
            pytest.param(b"<f8", (2**61,), 0, id="wraps to 0 bytes"),
            pytest.param(b"<f8", (2**32, 2**32), 0, id="product wraps to 0"),
            pytest.param(b"<f8", (2**63, 2), 0, id="negative when signed"),
            pytest.param(b"<f8", (0, 2**63), 0, id="empty but huge"),
            pytest.param(b"<f8", (2,), 8, id="short"),
            pytest.param(b"<f8", (1,), 9, id="long"),
            pytest.param(b"|S9999999999", (1,), 8, id="huge element"),
            pytest.param(b"<U0", (3,), 0, id="width 0"),
            pytest.param(b"|O", (1,), 8, id="object"),
            pytest.param(b"O8", (1,), 8, id="object in other words"),
            pytest.param(b"|V8", (1,), 8, id="void"),
            pytest.param(b"<f16", (1,), 16, id="long double"),
            pytest.param(b"|f8", (1,), 8, id="float without byte order"),
            pytest.param(b"double", (1,), 8, id="by name"),
            pytest.param(b"<M8[7D/3]", (1,), 8, id="odd unit"),
            pytest.param(b"<f8,<f8", (1,), 16, id="structured"),
            pytest.param(b"(2,)<f4", (1,), 8, id="subarray"),
            pytest.param(b"", (1,), 8, id="none"),
        ],
    )
    @pytest.mark.parametrize("kind", range(5))
    def test_array_headers_that_lie_are_refused_before_allocating(self, element, shape, size, kind):
        """Bytes of a few words cannot ask for gigabytes."""
        start = 4 + len(element)
        head = element + bytes(-start % 8) + struct.pack(f"<{len(shape)}Q", *shape)
        units = (4 + len(head)) // 8
        data = bytes([0x83, units, kind, len(shape), len(element)]) + head + bytes(size)
        assert_harmless(data)
        with pytest.raises(CodecError):
            decode(data)

    def test_text_arrays_hold_code_points(self):
        """numpy itself would raise a SystemError on first use."""
        data = encode(np.array(["a"], "<U1"))
        with pytest.raises(CodecError, match="code points"):
            decode(data[:-4] + b"\xff\xff\xff\xff")

    @pytest.mark.parametrize("key", ["../../etc/passwd", "/etc/passwd", "No/Where", "", "a\0b"])
    def test_zone_keys_lead_nowhere(self, key):
        """A zone is looked for among the zones, and only there."""
        body = msgspec.msgpack.encode([2020, 1, 1, 0, 0, 0, 0, 0, key])
        with pytest.raises(CodecError):
            decode(b"\x80" + msgspec.msgpack.encode(msgspec.msgpack.Ext(6, body)))

    @pytest.mark.parametrize(
        "data",
        [
            pytest.param(b"\x80\xdd\xff\xff\xff\xff", id="list"),
            pytest.param(b"\x80\xdf\xff\xff\xff\xff", id="dict"),
            pytest.param(b"\x80\xc6\xff\xff\xff\xff", id="bytes"),
            pytest.param(b"\x80\xdb\xff\xff\xff\xff", id="str"),
            pytest.param(b"\x80\xc9\xff\xff\xff\xff\x01", id="extension"),
            pytest.param(b"\x80" + b"\xdd\x00\x00\xff\xff" * 300 + b"\xc0" * 66_000, id="lists"),
        ],
    )
    def test_lengths_that_lie_take_no_memory(self, data):
        """Nothing is allocated for items that are not there."""
        assert_harmless(data)

    def test_long_numbers_take_linear_time(self):
        """Millions of digits are read in a moment; converting ints from decimal would take hours."""
        number = b"9" * 3_000_000
        for code in (0, 10):
            decode(b"\x80" + msgspec.msgpack.encode(msgspec.msgpack.Ext(code, number)))

    @quick
    @given(st.binary(max_size=200), st.sampled_from([b"", b"\x80", b"\x80\xc7\x20", b"\x83", b"5"]))
    def test_random_bytes_do_no_harm(self, data, prefix):
        """A value or a CodecError, nothing else."""
        decode_or_refuse(prefix + data)

    @settings(max_examples=150, deadline=None)
    @given(st.integers(0, 16), st.recursive(leaves, st.lists, max_leaves=8))
    def test_extensions_with_foreign_bodies_do_no_harm(self, code, value):
        """As above, further in."""
        body = encode(value)[1:]
        decode_or_refuse(b"\x80" + msgspec.msgpack.encode(msgspec.msgpack.Ext(code, body)))

    def test_mutated_values_do_no_harm(self):
        """As above, with bytes that are nearly right."""
        register_codec(Celsius, "tests.celsius", degrees_of, make_celsius)
        rng = random.Random(20)
        valid = [encode(value) for value in varied_values()]
        for _ in range(6_000):
            data = bytearray(rng.choice(valid))
            for _ in range(rng.randint(1, 3)):
                at = rng.randrange(len(data) + 1)
                action = rng.randrange(4)
                if action == 0:
                    del data[at : at + rng.randint(1, 4)]
                elif action == 1:
                    data[at:at] = rng.randbytes(rng.randint(1, 4))
                elif action == 2:
                    data[at : at + 1] = rng.randbytes(1)
                elif at < len(data):
                    data[at] ^= 1 << rng.randrange(8)
            decode_or_refuse(bytes(data))

    def test_errors_do_not_quote_the_bytes(self):
        """Payloads never reach logs, not through causes either."""
        for data in (b"\x81payload\xff", b"\x80\xa8payload\xff", b"5payload", b"\x80\xd6\x0aload"):
            with pytest.raises(CodecError) as info:
                decode(data)
            error = info.value
            assert "load" not in str(error)
            assert error.__cause__ is None
            assert error.__context__ is None or error.__suppress_context__

    def test_names_of_unknown_classes_are_shown_short_and_clean(self):
        """A class name from hostile bytes cannot forge log lines."""
        with pytest.raises(CodecError) as info:
            decode(object_bytes("evil\n2025 INFO", "x" * 10_000, {}))
        assert "\n" not in str(info.value)
        assert len(str(info.value)) < 400

    def test_what_is_not_bytes_is_a_type_error(self):
        """That is misuse, not damage."""
        with pytest.raises(TypeError):
            decode("5")


def varied_values():
    return [
        *(sample.values[0] for sample in SAMPLES),
        {"a": [1, (2.5, None), {3: b"x"}], "b": {4, "5"}, "c": np.arange(3)},
        [np.float32(1), np.str_("é"), np.array(["é"]), np.array(["2020"], "M8[D]")],
        [dt.datetime(2020, 1, 1, tzinfo=zone) for zone in ZONES],
        [dt.time(1, 2, fold=1), dt.timedelta(1, 2, 3), uuid.UUID(int=5), decimal.Decimal("-1E+9")],
        [Plain(1), Slotted(2), Struct(3), Point(4), Colour.RED, Access.READ | Access.WRITE],
        [Model(b=1, other=2), Root([1]), Celsius(20), 10**30],
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    ]


def decode_or_refuse(data):
    try:
        decode(data)
    except CodecError:
        return


def assert_harmless(data):
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


class TestCanonical:
    def test_values_that_look_alike_differ(self):
        """Type, shape and structure are all part of a value."""
        alike = [
            1, 1.0, True, "1", b"1", bytearray(b"1"), [1], (1,), {1}, frozenset([1]), {1: None},
            {"1": None}, [[1]], [(1,)], decimal.Decimal(1), decimal.Decimal("1.0"), 49, Level.LOW,
            np.int64(1), np.int32(1), np.longlong(1), np.float64(1), np.bool_(True), np.str_("1"),
            np.bytes_(b"1"), np.array(1), np.array([1]), np.array([[1]]), np.array([1], ">i8"),
            np.array([1], "longlong"), np.array([1.0]), 0.0, -0.0, 0, False, None, "", b"", [], (),
            {}, set(), frozenset(), np.zeros(0), np.zeros((0, 1)), float("nan"), [None], ["ab", "c"],
            ["a", "bc"], [["ab"], "c"], {"a": 1, "b": 2}, {"a": 2, "b": 1}, [["a", 1], ["b", 2]],
            2**64, -(2**64), str(2**64), dt.date(2020, 1, 1), dt.datetime(2020, 1, 1),
            dt.datetime(2020, 1, 1, fold=1), dt.datetime(2020, 1, 1, tzinfo=dt.UTC), dt.time(0),
            dt.timedelta(0), dt.timedelta(1), uuid.UUID(int=1), Point(1), Slotted(1), Struct(1),
            (1, None), {"x": 1, "y": None}, Box(1), Colour.RED, np.datetime64(1, "s"),
            np.datetime64(1, "ms"), np.timedelta64(1, "s"), "1\0", ["1", None], {None: "1"},
        ]  # fmt: skip
        assert len({canonical(value) for value in alike}) == len(alike)

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            pytest.param({"a": 1, "b": 2}, {"b": 2, "a": 1}, id="dict"),
            pytest.param({1: "a", "1": "b", None: 3}, {None: 3, "1": "b", 1: "a"}, id="mixed keys"),
            pytest.param({(1, 2): {"y": 1, "x": 2}}, {(1, 2): {"x": 2, "y": 1}}, id="nested"),
            pytest.param({8, 16, 24, 0}, {0, 24, 16, 8}, id="set"),
            pytest.param(
                np.arange(6).reshape(2, 3),
                np.asfortranarray(np.arange(6).reshape(2, 3)),
                id="order",
            ),
            pytest.param(np.arange(10)[::2], np.array([0, 2, 4, 6, 8]), id="strides"),
            pytest.param(float("nan"), float("nan"), id="nan"),
            pytest.param([np.float32("nan")], [np.float32("nan")], id="numpy nan"),
            pytest.param(Slotted({"a": 1, "b": 2}), Slotted({"b": 2, "a": 1}), id="in a field"),
            pytest.param(Model(b=1, x=1, y=2), Model(b=1, y=2, x=1), id="extras of a model"),
            pytest.param(Colour.RED, Colour.CRIMSON, id="alias"),
        ],
    )
    def test_order_that_is_no_part_of_a_value_does_not_matter(self, one, other):
        """Nor does which object holds it."""
        assert canonical(one) == canonical(other)

    @quick
    @given(values, st.randoms(use_true_random=False))
    def test_order_does_not_matter_at_any_depth(self, value, numbers):
        """Of dicts, of sets, and of arrays in memory."""
        assert canonical(reordered(value, numbers)) == canonical(value)

    def test_what_was_set_is_part_of_a_model(self):
        """`model_dump(exclude_unset=True)` tells such models apart, and so do we."""
        one, other = Model(b=1), Model(b=1, a=[])
        assert one == other
        assert canonical(one) != canonical(other)

    @settings(max_examples=300, deadline=None)
    @given(small, small)
    def test_bytes_are_equal_exactly_when_values_are(self, one, other):
        """Compared with a description of values that knows nothing of the codec."""
        same = fingerprint(one, exact=False) == fingerprint(other, exact=False)
        assert (canonical(one) == canonical(other)) == same

    @quick
    @given(values)
    def test_a_decoded_value_is_the_same_value(self, value):
        """So a compare-and-set against a stored value works for every type."""
        assert canonical(decode(encode(value))) == canonical(value)

    @quick
    @given(st.lists(values, max_size=3), st.lists(values, max_size=3))
    def test_joined_bytes_do_not_run_into_each_other(self, ones, others):
        """Keys are made of several values."""
        joined = b"".join(map(canonical, ones)) == b"".join(map(canonical, others))
        assert joined == (canonical(ones) == canonical(others))

    def test_no_value_is_a_prefix_of_another(self):
        """The reason why they can be joined."""
        encoded = sorted(canonical(value) for value in varied_values())
        for one, other in itertools.pairwise(encoded):
            assert one == other or not other.startswith(one)

    def test_long_long_and_int64_do_not_share_a_header(self):
        """numpy calls the two dtypes equal, so a cache could mix them up."""
        for first, second in (("l", "q"), ("q", "l")):
            arrays._header.cache_clear()
            assert canonical(np.zeros(3, first)) != canonical(np.zeros(3, second))
            assert decode(encode(np.zeros(3, second))).dtype.char == second

    def test_bytes_do_not_depend_on_the_hash_seed(self):
        """Every process makes the same key of the same value."""
        script = """
            import decimal, hashlib
            from hornbeam_state.codec import canonical
            words = [f"word{i}" for i in range(50)]
            value = [
                set(words), frozenset(map(str.encode, words)), {w: {w, w.upper()} for w in words},
                {(w, None): w for w in set(words)}, {frozenset(words), decimal.Decimal(1), 1.5},
                dict.fromkeys(set(words)),
            ]
            print(list(set(words))[:5], hashlib.blake2b(canonical(value)).hexdigest())
        """
        outputs = [run_script(script, PYTHONHASHSEED=seed).rsplit(" ", 1) for seed in "12"]
        assert outputs[0][0] != outputs[1][0]
        assert outputs[0][1] == outputs[1][1]


def reordered(value, numbers):
    """Return the same value with everything in another order that has none."""
    again = functools.partial(reordered, numbers=numbers)
    kind = type(value)
    if kind in (list, tuple):
        return kind(map(again, value))
    if kind in (set, frozenset):
        items = list(value)
        numbers.shuffle(items)
        return kind(items)
    if kind is dict:
        pairs = [(key, again(item)) for key, item in value.items()]
        numbers.shuffle(pairs)
        return dict(pairs)
    if kind is np.ndarray:
        return np.repeat(value, 2, axis=0)[::2] if value.ndim == 1 else value.copy("F")
    if kind in (Plain, Slotted, Point):
        back = decode(encode(value))
        return type(back)._make(map(again, back)) if kind is Point else back
    return value


def test_format_tables_name_every_tag_and_extension():
    """The docstrings are the specification of the format."""
    from hornbeam_state import codec

    tags = set(re.findall(r"0x8\d", codec.__doc__))
    assert tags == {f"0x{tag:x}" for tag in codec._DECODERS if tag >= 0x80}
    codes = re.findall(r"^ {4}( \d|\d\d)  |  ( \d|\d\d)  ", packing.__doc__, re.MULTILINE)
    assert {int(a or b) for a, b in codes} == {
        *packing._LEAF_DECODERS,
        *packing._PARTS_DECODERS,
    }
