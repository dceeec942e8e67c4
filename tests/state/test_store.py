"""What every method of a store promises, called directly and through its awaitable twin."""

from __future__ import annotations

import asyncio
import datetime as dt
import math
import threading
import uuid
from decimal import Decimal

import numpy as np
import pytest

from hornbeam_state import (
    MISSING,
    CodecError,
    CounterOverflow,
    KeyTooLong,
    Store,
    StoreConfig,
    StoreError,
    WrongType,
    open_store,
)
from hornbeam_state.backends.embedded.backend import EmbeddedBackend
from hornbeam_state.testing import ManualClock

LARGEST = 2**63 - 1
SMALLEST = -(2**63)


class Direct:
    """Calls the methods of a store as they are."""

    def __init__(self, store: Store, runner: asyncio.Runner) -> None:
        self.store = store
        self.runner = runner

    def __getattr__(self, method):
        return getattr(self.store, method)

    def over(self, space):
        return type(self)(self.store.space(space), self.runner)


class Awaited(Direct):
    """Calls the awaitable twins of the methods, each to its end."""

    def __getattr__(self, method):
        twin = getattr(self.store, "a" + method)

        async def awaited(*args, **kwargs):
            return await twin(*args, **kwargs)

        return lambda *args, **kwargs: self.runner.run(awaited(*args, **kwargs))


@pytest.fixture(params=["sync", "async"])
def adapter(request):
    """Wrap a store so that its methods, or their twins, are called; close it at the end."""
    kind = Awaited if request.param == "async" else Direct
    made = []
    with asyncio.Runner() as runner:

        def wrap(store: Store):
            made.append(kind(store, runner))
            return made[-1]

        yield wrap
        for one in made:
            one.close()


@pytest.fixture(params=["lmdb", "memory"])
def url(request, tmp_path):
    # Its threads may be many, and any of them be kept waiting by a busy machine.
    place = f"lmdb://{tmp_path}/store" if request.param == "lmdb" else "memory://"
    return f"{place}?timeout=20"


@pytest.fixture
def store(adapter, request, tmp_path):
    """A store in a directory, called directly; one in memory, through the twins."""
    directly = request.node.callspec.params["adapter"] == "sync"
    return adapter(open_store(f"lmdb://{tmp_path}/store" if directly else "memory://"))


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def timed(adapter, tmp_path, clock):
    """A store whose time stands still."""
    config = StoreConfig.from_url(f"lmdb://{tmp_path}/timed")
    return adapter(Store(config, backend=EmbeddedBackend(config, clock=clock)))


# Values.


def test_get_of_an_absent_key_returns_the_default(store):
    """None when none is given, else the very object."""
    marker = object()
    assert store.get("k") is None
    assert store.get("k", marker) is marker
    assert store.get("k", default=MISSING) is MISSING
    assert store.keys() == [], "reading created a key"


def test_a_stored_none_is_a_value(store):
    """It is not confused with absence."""
    store.set("k", None)
    assert store.get("k", "default") is None
    assert store.keys() == ["k"]
    assert store.add("k", 1) is False
    assert store.cas("k", MISSING, 1) is False
    assert store.cas("k", None, 1) is True


VALUES = [
    pytest.param(None, id="none"),
    pytest.param(True, id="true"),
    pytest.param(False, id="false"),
    pytest.param(0, id="zero"),
    pytest.param(-1, id="negative"),
    pytest.param(LARGEST, id="largest-64-bit"),
    pytest.param(SMALLEST, id="smallest-64-bit"),
    pytest.param(LARGEST + 1, id="beyond-64-bit"),
    pytest.param(-(10**400), id="huge-int"),
    pytest.param(1.0, id="float"),
    pytest.param(-0.0, id="negative-zero"),
    pytest.param(math.inf, id="inf"),
    pytest.param(5e-324, id="subnormal"),
    pytest.param("", id="empty-str"),
    pytest.param("5", id="digit-str"),
    pytest.param("Hainbuche \U0001f333\0\n", id="str"),
    pytest.param(b"", id="empty-bytes"),
    pytest.param(b"-5", id="digit-bytes"),
    pytest.param(bytes(range(256)) * 300, id="bytes"),
    pytest.param([], id="empty-list"),
    pytest.param((), id="empty-tuple"),
    pytest.param({}, id="empty-dict"),
    pytest.param(set(), id="empty-set"),
    pytest.param([1, 1.0, True, "1", b"1", None, (1,), [1], {1}, frozenset({1})], id="mixed-list"),
    pytest.param({1: "int", "1": "str", (1, 2): "tuple", None: 0, 1.5: [{}]}, id="dict-of-odd-keys"),
    pytest.param({frozenset({1, 2}), "a", 2}, id="set"),
    pytest.param(dt.datetime(2024, 2, 29, 23, 59, 59, 999999), id="naive-datetime"),
    pytest.param(dt.datetime(2024, 2, 29, tzinfo=dt.UTC), id="aware-datetime"),
    pytest.param(dt.date(1, 1, 1), id="date"),
    pytest.param(dt.time(1, 2, 3, 4), id="time"),
    pytest.param(dt.timedelta(days=-1, microseconds=1), id="timedelta"),
    pytest.param(Decimal("1.10"), id="decimal"),
    pytest.param(uuid.UUID(int=5), id="uuid"),
    pytest.param(np.float32(1.5), id="numpy-scalar"),
    pytest.param(np.int64(5), id="numpy-int"),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
def test_a_value_comes_back_as_exactly_what_it_was(store, value):
    """Type and content survive `set`, `add`, `cas`, `set_multi` and `update` alike."""
    store.set("set", value)
    assert store.add("add", value) is True
    assert store.cas("cas", MISSING, value) is True
    store.set_multi({"multi": value})
    seen = []
    assert store.update("update", lambda old: seen.append(old) or value, value) is value
    store.update("update", lambda old: seen.append(old) or old)
    read = [*seen, store.get("set"), *store.get_multi(["add", "cas", "multi", "update"]).values()]
    assert len(read) == 7
    for found in read:
        assert type(found) is type(value)
        assert repr(found) == repr(value) or found == value
        assert not isinstance(value, float) or math.copysign(1, found) == math.copysign(1, value)


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(np.arange(6, dtype="<f4").reshape(2, 3), id="float32"),
        pytest.param(np.zeros((0, 384), dtype="f4"), id="no-rows"),
        pytest.param(np.array(5, dtype="i2"), id="no-dimension"),
        pytest.param(np.arange(12, dtype=">i8").reshape(3, 4).T, id="big-endian-transposed"),
        pytest.param(np.array([True, False]), id="bool"),
        pytest.param(np.array(["a", "é"]), id="text"),
        pytest.param(np.array(["2024-01-01"], dtype="M8[D]"), id="datetime"),
    ],
)  # fmt: skip
def test_an_array_keeps_dtype_and_shape(store, array):
    """What a model returned is what the next worker reads."""
    store.set("a", array)
    found = store.get("a")
    assert type(found) is np.ndarray
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert np.array_equal(found, array)


def test_what_was_stored_is_nobodys_to_change(store):
    """Neither the writer's object nor a reader's is the store's."""
    value = {"list": [1, 2]}
    store.set("k", value)
    value["list"].append(3)
    first = store.get("k")
    first["list"].append(4)
    assert store.get("k") == {"list": [1, 2]}


def test_a_large_value_is_a_value(store):
    """Megabytes come back whole."""
    value = np.random.default_rng(1).bytes(5_000_000)
    store.set("k", value)
    assert store.get("k") == value
    store.set("k", b"")
    assert store.get("k") == b""


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(object(), id="object"),
        pytest.param(lambda: 1, id="function"),
        pytest.param([object()], id="nested"),
        pytest.param(MISSING, id="missing"),
        pytest.param(np.array([object()]), id="object-array"),
        pytest.param("\ud800", id="lone-surrogate"),
    ],
)  # fmt: skip
def test_an_unknown_type_is_refused_and_changes_nothing(store, value):
    """Every writing method says `CodecError` and leaves the old value and its expiry."""
    store.set("k", "old", ttl=100)
    for write in (
        lambda: store.set("k", value),
        lambda: store.add("new", value),
        lambda: store.cas("k", "old", value),
        lambda: store.set_multi({"new": 1, "k": value}),
        lambda: store.update("k", lambda _: value),
    ):
        with pytest.raises(CodecError) as caught:
            write()
        assert isinstance(caught.value, StoreError)
        assert isinstance(caught.value, TypeError)
    assert store.keys() == ["k"]
    assert store.get("k") == "old"
    assert 0 < store.ttl("k") <= 100


def test_set_replaces_value_type_and_expiry(timed, clock):
    """Without `ttl` the expiry is cleared, with one it starts anew."""
    timed.set("k", 1, ttl=10)
    timed.set("k", "text")
    assert timed.ttl("k") is None
    clock.advance(11)
    assert timed.get("k") == "text"
    timed.set("k", [3], ttl=10)
    clock.advance(9)
    timed.set("k", [4], ttl=10)
    clock.advance(9)
    assert timed.get("k") == [4]
    clock.advance(2)
    assert timed.get("k") is None


def test_add_stores_once(timed, clock):
    """The first wins and keeps its value and expiry; after it expired there is a new first."""
    assert timed.add("k", "first", ttl=10) is True
    assert timed.add("k", "second", ttl=1000) is False
    assert timed.add("k", "third") is False
    assert (timed.get("k"), timed.ttl("k")) == ("first", pytest.approx(10))
    clock.advance(10.001)
    assert timed.add("k", "fourth") is True
    assert (timed.get("k"), timed.ttl("k")) == ("fourth", None)


def test_delete_says_whether_it_was_there(timed, clock):
    """An expired key was not."""
    timed.set("k", None)
    assert timed.delete("k") is True
    assert timed.delete("k") is False
    timed.set("k", 1, ttl=1)
    clock.advance(1.001)
    assert timed.delete("k") is False
    assert timed.keys() == []


# Compare and set.


@pytest.mark.parametrize(
    ("present", "expected", "stored"),
    [
        pytest.param(1, 1, True, id="equal"),
        pytest.param(1, 1.0, False, id="int-is-no-float"),
        pytest.param(1.0, 1, False, id="float-is-no-int"),
        pytest.param(1, True, False, id="int-is-no-bool"),
        pytest.param(True, 1, False, id="bool-is-no-int"),
        pytest.param("1", 1, False, id="str-is-no-int"),
        pytest.param("1", b"1", False, id="str-is-no-bytes"),
        pytest.param((1,), [1], False, id="tuple-is-no-list"),
        pytest.param(0.0, -0.0, False, id="signed-zeros"),
        pytest.param(math.nan, math.nan, True, id="nan"),
        pytest.param(None, None, True, id="none"),
        pytest.param(None, MISSING, False, id="none-is-not-absent"),
        pytest.param(MISSING, None, False, id="absent-is-not-none"),
        pytest.param(MISSING, MISSING, True, id="absent"),
        pytest.param(MISSING, 0, False, id="absent-is-not-zero"),
        pytest.param({"a": 1, "b": [2]}, {"b": [2], "a": 1}, True, id="dict-in-another-order"),
        pytest.param({"x": {"a": 1, "b": 2}}, {"x": {"b": 2, "a": 1}}, True, id="inner-dict-in-another-order"),
        pytest.param({"a": 1, "b": 2}, {"a": 1, "b": 2.0}, False, id="dict-with-another-type"),
        pytest.param({"a": 1}, {"a": 1, "b": 2}, False, id="larger-dict"),
        pytest.param({8, 16, 0}, {0, 16, 8}, True, id="set-in-another-order"),
        pytest.param({1}, frozenset({1}), False, id="set-is-no-frozenset"),
        pytest.param([1, 2], [2, 1], False, id="list-in-another-order"),
        pytest.param(np.arange(3), np.arange(3), True, id="array"),
        pytest.param(np.arange(3), np.arange(3, dtype="i4"), False, id="array-of-another-dtype"),
        pytest.param(np.ones((2, 3)), np.ones((2, 3), order="F"), True, id="array-in-another-order"),
        pytest.param(np.int64(1), 1, False, id="numpy-int-is-no-int"),
        pytest.param(Decimal("1.0"), Decimal("1.00"), False, id="decimals"),
    ],
)  # fmt: skip
def test_cas_compares_what_values_are(store, present, expected, stored):
    """Types count, the order of dicts and sets does not; where it fails nothing changes."""
    if present is not MISSING:
        store.set("k", present, ttl=100)
    assert store.cas("k", expected, "new") is stored
    if stored:
        assert store.get("k") == "new"
        assert store.ttl("k") is None
    elif present is MISSING:
        assert store.keys() == []
    else:
        assert repr(store.get("k")) == repr(present)
        assert 0 < store.ttl("k") <= 100


def test_cas_replaces_the_expiry(timed, clock):
    """`ttl=None` clears it; an expired value is absent."""
    timed.set("k", 1, ttl=10)
    assert timed.cas("k", 1, 2, ttl=20)
    assert timed.ttl("k") == pytest.approx(20)
    assert timed.cas("k", 2, 3)
    assert timed.ttl("k") is None
    assert timed.cas("k", 3, 4, ttl=5)
    clock.advance(5.001)
    assert timed.cas("k", 4, 5) is False
    assert timed.cas("k", MISSING, 6, ttl=7)
    assert timed.ttl("k") == pytest.approx(7)


def test_cas_wins_while_the_value_keeps_its_meaning(tmp_path):
    """Others who only reorder the dict meanwhile do not make it fail."""
    store = open_store(f"lmdb://{tmp_path}/store")
    one, other = {"a": 1, "b": 2}, {"b": 2, "a": 1}
    keyspace = store._keyspace
    reads = []

    class Racing:
        def cas(self, *args):
            return keyspace.cas(*args)

        def get(self, key):
            if not reads:
                reads.append(key)
                store.space("app").set("k", one)  # a writer comes between
            return keyspace.get(key)

    store.set("k", other)
    racing = Store(store.config, backend=store.backend)
    racing._keyspace = Racing()
    assert racing.cas("k", one, "new") is True
    assert store.get("k") == "new"
    store.close()


def test_one_of_many_wins_a_cas(url):
    """Of threads that all expect the same, exactly one stores."""
    store = open_store(url)
    store.set("turn", 0)
    wins = []

    def compete(name: int) -> None:
        for turn in range(50):
            if store.cas("turn", turn, turn + 1):
                wins.append((turn, name))

    in_threads(8, compete)
    assert len({turn for turn, _ in wins}) == len(wins) == store.get("turn")
    store.close()


# Update.


def test_update_replaces_by_what_the_function_makes(store):
    """It gets the old value, or the default, and its result is stored and returned."""
    assert store.update("k", lambda old: [old]) == [None]
    assert store.update("k", lambda old: [*old, 2]) == [None, 2]
    assert store.update("new", lambda old: old + 1, 10) == 11
    assert store.update("new", lambda old: old + 1, 10) == 12
    assert store.get_multi(["k", "new"]) == {"k": [None, 2], "new": 12}
    assert store.incr("new") == 13


def test_update_replaces_the_expiry(timed, clock):
    """As `set` does."""
    timed.set("k", 1, ttl=10)
    timed.update("k", lambda old: old + 1, ttl=20)
    assert timed.ttl("k") == pytest.approx(20)
    timed.update("k", lambda old: old + 1)
    assert timed.ttl("k") is None
    timed.update("k", lambda old: old, ttl=5)
    clock.advance(5.001)
    assert timed.update("k", lambda old: old, "default") == "default"


def test_an_update_whose_function_fails_changes_nothing(store):
    """Its exception comes out as it is, and the store goes on."""
    store.set("k", 1, ttl=100)

    def fail(old):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.update("k", fail)
    with pytest.raises(ZeroDivisionError):
        store.update("absent", fail)
    assert store.get("k") == 1
    assert store.ttl("k") is not None
    assert store.keys() == ["k"]
    assert store.incr("k") == 2


def test_an_update_may_use_the_store(url):
    """Nothing is held while the function runs: it can read, write, and lose to its own write."""
    store = open_store(url)
    store.set("k", 1)
    calls = []

    def interfering(old):
        calls.append(old)
        if len(calls) < 3:
            store.set("k", old + 10)
        return old * 2

    assert store.update("k", interfering) == 42
    assert calls == [1, 11, 21]
    store.close()


def test_updates_of_threads_all_count(url):
    """Each of them is applied once, whatever came between."""
    store = open_store(url)

    def append(name: int) -> None:
        for number in range(30):
            step = (name, number)
            store.update("list", lambda old, step=step: [*old, step], [])
            store.update("dict", lambda old, step=step: {**old, step[0]: step[1]}, {})

    in_threads(8, append)
    found = store.get("list")
    assert len(found) == len(set(found)) == 8 * 30
    for name in range(8):
        assert [number for owner, number in found if owner == name] == list(range(30))
    assert store.get("dict") == dict.fromkeys(range(8), 29)
    store.close()


async def test_updates_of_tasks_and_threads_all_count(url):
    """Awaited and direct updates mix."""
    store = open_store(url)

    async def task() -> None:
        for _ in range(20):
            await store.aupdate("n", lambda old: [old[0] + 1], [0])
            await asyncio.sleep(0)

    def thread() -> None:
        for _ in range(20):
            store.update("n", lambda old: [old[0] + 1], [0])

    await asyncio.gather(
        *(task() for _ in range(8)), *(asyncio.to_thread(thread) for _ in range(4))
    )
    assert store.get("n") == [12 * 20]
    await store.aclose()


# Counters.


def test_a_counter_counts_from_zero(store):
    """By any delta, up and down; `get` sees an int and `set` starts it anywhere."""
    assert store.incr("n") == 1
    assert store.incr("n", 10) == 11
    assert store.incr("n", delta=-20) == -9
    assert store.decr("n") == -10
    assert store.decr("n", -15) == 5
    assert store.incr("n", 0) == 5
    assert store.get("n") == 5
    assert type(store.get("n")) is int
    assert store.decr("other") == -1
    store.set("n", 5)
    assert store.incr("n") == 6
    assert store.get("n") == 6
    assert store.cas("n", 6, 7)
    assert store.incr("n") == 8
    assert store.update("n", lambda old: old * 2) == 16
    assert store.incr("n") == 17


def test_a_counter_reaches_both_ends_of_64_bits(store):
    """And goes no further: `CounterOverflow`, also an OverflowError, leaves it as it was."""
    store.set("n", LARGEST - 1, ttl=100)
    assert store.incr("n") == LARGEST
    with pytest.raises(CounterOverflow):
        store.incr("n", ttl=1000)
    with pytest.raises(OverflowError):
        store.incr("n", LARGEST)
    assert store.get("n") == LARGEST
    assert 0 < store.ttl("n") <= 100
    store.set("n", SMALLEST + 1)
    assert store.decr("n") == SMALLEST
    with pytest.raises(CounterOverflow):
        store.decr("n")
    assert store.get("n") == SMALLEST
    assert store.incr("n", LARGEST) == -1


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("5", id="str"),
        pytest.param(b"5", id="bytes"),
        pytest.param(5.0, id="float"),
        pytest.param(True, id="bool"),
        pytest.param(None, id="none"),
        pytest.param(LARGEST + 1, id="int-beyond-64-bits"),
        pytest.param(SMALLEST - 1, id="int-below-64-bits"),
        pytest.param([5], id="list"),
        pytest.param(np.int64(5), id="numpy-int"),
        pytest.param(np.arange(3), id="array"),
        pytest.param(Decimal(5), id="decimal"),
    ],
)  # fmt: skip
def test_what_is_no_counter_is_not_counted(store, value):
    """`WrongType`, and the value and its expiry stay."""
    store.set("k", value, ttl=100)
    for count in (store.incr, store.decr):
        with pytest.raises(WrongType) as caught:
            count("k", ttl=1000)
        assert isinstance(caught.value, TypeError)
    assert type(store.get("k")) is type(value)
    assert np.array_equal(store.get("k"), value)
    assert 0 < store.ttl("k") <= 100


def test_a_window_closes_however_often_it_is_counted(timed, clock):
    """`ttl` applies only where the counter is created, by `incr` and by `decr`."""
    assert timed.incr("up", ttl=60) == 1
    assert timed.decr("down", ttl=60) == -1
    clock.advance(30)
    assert timed.incr("up", ttl=60) == 2
    assert timed.incr("up") == 3
    assert timed.decr("down", ttl=60) == -2
    assert timed.ttl("up") == timed.ttl("down") == pytest.approx(30)
    clock.advance(30.001)
    assert timed.get("up") is None
    assert timed.incr("up", 5, ttl=10) == 5
    assert timed.ttl("up") == pytest.approx(10)
    assert timed.decr("down") == -1
    assert timed.ttl("down") is None


def test_a_lasting_counter_gets_no_expiry_later(timed, clock):
    """It was created without one."""
    timed.incr("total")
    timed.incr("total", ttl=1)
    timed.set("set", 5)
    timed.incr("set", ttl=1)
    clock.advance(2)
    assert timed.get_multi(["total", "set"]) == {"total": 2, "set": 6}


@pytest.mark.parametrize(
    ("delta", "error"),
    [
        pytest.param("1", TypeError, id="str"),
        pytest.param(1.0, TypeError, id="float"),
        pytest.param(True, TypeError, id="bool"),
        pytest.param(None, TypeError, id="none"),
        pytest.param(2**64, (ValueError, CounterOverflow), id="beyond-64-bits"),
        pytest.param(-(10**40), (ValueError, CounterOverflow), id="far-below"),
    ],
)  # fmt: skip
def test_a_bad_delta_is_refused(store, delta, error):
    """And the counter is not touched, or made."""
    store.set("n", 5)
    for name in ("n", "absent"):
        for count in (store.incr, store.decr):
            with pytest.raises(error):
                count(name, delta)
    assert store.get_multi(["n", "absent"]) == {"n": 5, "absent": None}
    assert store.keys() == ["n"]


def test_increments_of_threads_all_count(url):
    """Every one gets a number of its own."""
    store = open_store(url)
    seen = [[] for _ in range(8)]

    def count(name: int) -> None:
        seen[name].extend(store.incr("n") for _ in range(300))

    in_threads(8, count)
    assert sorted(number for one in seen for number in one) == list(range(1, 2401))
    assert all(one == sorted(one) for one in seen)
    store.close()


# Many keys.


def test_get_multi_has_every_key_that_was_asked(store):
    """A missing one maps to None; order is that of asking; duplicates are one."""
    store.set_multi({"a": 1, "b": None, "c": "3"})
    asked = ["c", "x", "a", "c", "b"]
    assert list(store.get_multi(asked).items()) == [("c", "3"), ("x", None), ("a", 1), ("b", None)]
    assert store.get_multi([]) == {}
    assert store.get_multi(name for name in "ac") == {"a": 1, "c": "3"}
    assert store.get_multi({"a": 0}) == {"a": 1}
    assert store.get_multi(("x", "x")) == {"x": None}


def test_get_multi_hands_out_separate_values(store):
    """Two keys with equal values are two objects."""
    store.set_multi({"a": [1], "b": [1]})
    found = store.get_multi(["a", "b"])
    found["a"].append(2)
    assert found["b"] == [1]


def test_set_multi_replaces_values_and_expiries(timed, clock):
    """All of them, as `set` does."""
    timed.set("a", "old", ttl=10)
    timed.set("b", "old")
    timed.set_multi({"a": 1, "c": [3]})
    assert timed.ttl("a") is None
    timed.set_multi({"a": 1, "b": 2, "c": 3}, ttl=20)
    assert [timed.ttl(key) for key in "abc"] == [pytest.approx(20)] * 3
    clock.advance(20.001)
    assert timed.get_multi("abc") == {"a": None, "b": None, "c": None}
    timed.set_multi({})
    assert timed.keys() == []


@pytest.mark.parametrize(
    ("mapping", "error"),
    [
        pytest.param({"a": 1, "": 2}, ValueError, id="empty-key"),
        pytest.param({"a": 1, 5: 2}, TypeError, id="int-key"),
        pytest.param({"a": 1, "x" * 4097: 2}, KeyTooLong, id="long-key"),
        pytest.param({"a": 1, "b": object()}, CodecError, id="bad-value"),
    ],
)  # fmt: skip
def test_set_multi_stores_all_or_nothing(store, mapping, error):
    """One bad item and none is stored."""
    with pytest.raises(error):
        store.set_multi(mapping)
    assert store.keys() == []


def test_keys_are_sorted_and_under_their_prefix(store):
    """In the order of their text, whatever the order of storing and the alphabet."""
    names = ["b", "a", "ab", "a/1", "a/2", "a*", "ä", "äö", "\U0001f333", "z", "Z", "a\0b", "\uffff", "10", "9"]  # fmt: skip
    for name in names:
        store.set(name, name)
    assert store.keys() == sorted(names)
    for prefix in ["a", "a/", "ä", "\U0001f333", "a*", "a\0", "\uffff", "Z", "x", "1", "ab" * 300]:
        assert store.keys(prefix) == sorted(name for name in names if name.startswith(prefix))
    assert store.keys(prefix="b") == ["b"]
    assert type(store.keys()) is list
    assert set(map(type, store.keys())) == {str}


def test_an_expired_key_is_absent_everywhere(timed, clock):
    """From the moment its time is up, before anything removed it."""
    for name in "abcdefg":
        timed.set(name, 1, ttl=10)
    timed.set("lasting", 1)
    clock.advance(9.99)
    assert timed.get("a") == 1
    clock.advance(0.011)
    assert timed.get("a", "default") == "default"
    assert timed.get_multi(["a", "lasting"]) == {"a": None, "lasting": 1}
    assert timed.keys() == ["lasting"]
    with pytest.raises(KeyError):
        timed.ttl("a")
    assert timed.add("b", 2) is True
    assert timed.cas("c", 1, 2) is False
    assert timed.incr("d", 5) == 5
    assert timed.delete("e") is False
    assert timed.update("f", lambda old: old, "anew") == "anew"
    assert timed.clear("g") == 0
    assert timed.keys() == ["b", "d", "f", "lasting"]


def test_ttl_tells_the_seconds_left(timed, clock):
    """None where there is no expiry, KeyError (with the key) where there is no key."""
    timed.set("k", 1, ttl=10)
    assert timed.ttl("k") == pytest.approx(10, abs=0.002)
    clock.advance(3.5)
    assert timed.ttl("k") == pytest.approx(6.5, abs=0.002)
    assert type(timed.ttl("k")) is float
    timed.set("lasting", 1)
    assert timed.ttl("lasting") is None
    with pytest.raises(KeyError, match="nothing"):
        timed.ttl("nothing")


@pytest.mark.parametrize("ttl", [0.001, 0.01, 1e-9, 5e-324])
def test_a_tiny_ttl_expires_soon(timed, clock, ttl):
    """It is never taken for "no expiry"."""
    timed.set("k", 1, ttl=ttl)
    clock.advance(0.02)
    assert timed.get("k") is None
    assert timed.keys() == []


def test_ttl_never_tells_less_than_nothing(adapter, tmp_path):
    """A key that expires while it is asked for has time left, or is absent."""
    moments = iter([0.0, 0.5, 1.5, 2.5, 3.5, 4.5])
    config = StoreConfig.from_url(f"lmdb://{tmp_path}/store")
    backend = EmbeddedBackend(config, clock=lambda: 1000 + next(moments))
    store = adapter(Store(config, backend=backend))
    store.set("k", 1, ttl=1)
    try:
        left = store.ttl("k")
    except KeyError:
        return
    assert left > 0


@pytest.mark.parametrize(
    "ttl", [10**9, 1e12, 1e15, 1e17, 1e18, 1e300, pytest.param(10**400, id="beyond-floats")]
)
def test_a_huge_ttl_is_kept_or_refused(store, ttl):
    """An age of the universe may be too long, but it does not break the store."""
    for write in (
        lambda: store.set("k", 5, ttl=ttl),
        lambda: store.incr("n", 5, ttl=ttl),
        lambda: store.set_multi({"m": 5}, ttl=ttl),
    ):
        try:
            write()
        except ValueError:
            assert ttl >= 1e12, "a thousand years are refused"
    present = store.keys()
    assert store.get_multi(present) == dict.fromkeys(present, 5)
    assert all(store.ttl(name) > 1e8 for name in present)


def test_clear_removes_what_is_under_the_prefix(timed, clock):
    """It counts what was there, not what had expired, and leaves the rest."""
    timed.set_multi({"a/1": 1, "a/2": 2, "a": 3, "b": 4, "ä": 5})
    timed.set("a/old", 1, ttl=1)
    clock.advance(2)
    assert timed.clear("a/") == 2
    assert timed.keys() == ["a", "b", "ä"]
    assert timed.clear("nothing") == 0
    assert timed.clear() == 3
    assert timed.clear() == 0
    assert timed.keys() == []


@pytest.mark.parametrize("prefix", [None, 0, b"", [], 5, b"a"])
def test_a_prefix_that_is_no_text_clears_nothing(store, prefix):
    """`clear(settings.get("prefix"))` with nothing set must not empty the store."""
    store.set("a", 1)
    with pytest.raises(TypeError):
        store.clear(prefix)
    with pytest.raises(TypeError):
        store.keys(prefix)
    assert store.get("a") == 1


# Bad arguments.

WITH_A_KEY = {
    "get": lambda store, key: store.get(key),
    "set": lambda store, key: store.set(key, 1),
    "add": lambda store, key: store.add(key, 1),
    "cas": lambda store, key: store.cas(key, 1, 2),
    "cas-missing": lambda store, key: store.cas(key, MISSING, 2),
    "update": lambda store, key: store.update(key, lambda old: 1),
    "delete": lambda store, key: store.delete(key),
    "incr": lambda store, key: store.incr(key),
    "decr": lambda store, key: store.decr(key),
    "get_multi": lambda store, key: store.get_multi(["a", key]),
    "set_multi": lambda store, key: store.set_multi({"a": 1, key: 1}),
    "ttl": lambda store, key: store.ttl(key),
}


@pytest.mark.parametrize(
    "method", [pytest.param(call, id=name) for name, call in WITH_A_KEY.items()]
)
def test_a_bad_key_is_refused_by_every_method(store, method):
    """And nothing is stored under anything like it."""
    for key in (b"k", 5, None, 1.5, ("k",)):
        with pytest.raises(TypeError):
            method(store, key)
    for key in ("", "\ud800", "a\udfff"):
        with pytest.raises(ValueError, match="key"):
            method(store, key)
    for key in ("k" * 4097, "é" * 2049, "\U0001f333" * 1025):
        with pytest.raises(KeyTooLong) as caught:
            method(store, key)
        assert isinstance(caught.value, ValueError)
        assert (
            "4097" in str(caught.value)
            or "4098" in str(caught.value)
            or "4100" in str(caught.value)
        )
    assert store.keys() == []


@pytest.mark.parametrize(
    "key", ["k" * 4096, "é" * 2048, "\U0001f333" * 1024, "\0", " ", "k" * 511, "k" * 512]
)
def test_any_key_of_4096_bytes_is_a_key(store, key):
    """Bytes of UTF-8 are what counts."""
    store.set(key, 1)
    assert store.incr(key) == 2
    assert store.add(key, 5) is False
    assert store.cas(key, 2, 3)
    assert store.update(key, lambda old: old + 1) == 4
    assert store.get_multi([key]) == {key: 4}
    assert store.ttl(key) is None
    assert store.keys() == store.keys(key) == store.keys(key[:-1]) == [key]
    assert store.delete(key)
    store.set_multi({key: 1})
    assert store.clear(key) == 1


WITH_A_TTL = {
    "set": lambda store, ttl: store.set("k", 1, ttl=ttl),
    "add": lambda store, ttl: store.add("new", 1, ttl=ttl),
    "cas": lambda store, ttl: store.cas("k", 5, 1, ttl=ttl),
    "cas-missing": lambda store, ttl: store.cas("new", MISSING, 1, ttl=ttl),
    "update": lambda store, ttl: store.update("k", lambda old: 1, ttl=ttl),
    "incr": lambda store, ttl: store.incr("k", ttl=ttl),
    "decr": lambda store, ttl: store.decr("k", ttl=ttl),
    "set_multi": lambda store, ttl: store.set_multi({"k": 1}, ttl=ttl),
}


@pytest.mark.parametrize(
    "method", [pytest.param(call, id=name) for name, call in WITH_A_TTL.items()]
)
@pytest.mark.parametrize(
    ("ttl", "error"),
    [
        pytest.param(0, ValueError, id="zero"),
        pytest.param(-1, ValueError, id="negative"),
        pytest.param(-0.0, ValueError, id="negative-zero"),
        pytest.param(math.nan, ValueError, id="nan"),
        pytest.param(math.inf, ValueError, id="inf"),
        pytest.param(True, TypeError, id="bool"),
        pytest.param("60", TypeError, id="str"),
        pytest.param(dt.timedelta(seconds=1), TypeError, id="timedelta"),
    ],
)  # fmt: skip
def test_a_bad_ttl_is_refused_by_every_method(store, method, ttl, error):
    """And nothing is stored."""
    store.set("k", 5)
    with pytest.raises(error):
        method(store, ttl)
    assert store.get_multi(["k", "new"]) == {"k": 5, "new": None}
    assert store.ttl("k") is None


# Spaces, threads, backends.


def test_spaces_never_meet(store):
    """The app's, hornbeam's and the cache's keys are apart in every operation."""
    spaces = {name: store.over(name) for name in ("app", "sys", "cache")}
    for name, space in spaces.items():
        assert space.add("k", name)
        space.incr(name)
    for name, space in spaces.items():
        assert space.get("k") == name
        assert space.keys() == sorted(["k", name])
    assert spaces["app"].get_multi(["sys", "cache"]) == {"sys": None, "cache": None}
    assert spaces["cache"].clear() == 2
    assert spaces["sys"].delete("k")
    assert store.keys() == ["app", "k"]
    assert spaces["sys"].keys() == ["sys"]


def test_two_memory_stores_are_two_stores():
    """Each is its own."""
    one, other = open_store("memory://"), open_store("memory://")
    one.set("k", 1)
    assert other.get("k") is None
    one.close()
    other.close()


def test_a_store_shows_what_it_is_over(tmp_path):
    """Config and backend are there to be asked."""
    config = StoreConfig.from_url(f"lmdb://{tmp_path}/store")
    backend = EmbeddedBackend(config)
    store = Store(config, backend=backend)
    assert store.config is config
    assert store.backend is backend
    assert store.space("cache").backend is backend
    store.check()
    assert backend.directory == tmp_path / "store"
    store.close()


def test_readers_see_whole_values_while_they_change(url):
    """A value is the old one or the new one, and many set at once are of one moment."""
    store = open_store(url)
    store.set_multi({"a": [0] * 300, "b": [0] * 300})
    done = threading.Event()
    wrong = []

    def read(_: int) -> None:
        while not done.is_set():
            found = store.get_multi(["a", "b"])
            if len(set(found["a"] + found["b"])) != 1:
                wrong.append(found)
            if len(set(store.get("a"))) != 1:
                wrong.append("get")

    def write(_: int) -> None:
        for number in range(400):
            store.set_multi({"a": [number] * 300, "b": [number] * 300})
        done.set()

    in_threads(4, lambda name: write(name) if name == 0 else read(name))
    assert wrong == []
    store.close()


def in_threads(count: int, work) -> None:
    """Run `work(0)` to `work(count - 1)` at once; raise what one of them raised."""
    start = threading.Barrier(count)
    errors = []

    def run(name: int) -> None:
        start.wait()
        try:
            work(name)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]
