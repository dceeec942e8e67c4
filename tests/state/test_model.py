"""A store against a dict: whatever is done in whatever order, both hold the same.

The operations come from two stores over one place, from sync methods and awaitable twins, and now
and then from a forked child; in between time passes, and stores are closed.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
import math
import shutil
import tempfile
import uuid
from decimal import Decimal
from functools import partial

import numpy as np
import pytest
from child_processes import Child
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from hornbeam_state import MISSING, CounterOverflow, Store, StoreConfig, WrongType
from hornbeam_state.backends.base import COUNTER_MAX, COUNTER_MIN, SPACES
from hornbeam_state.backends.embedded.backend import EmbeddedBackend
from hornbeam_state.backends.redis.backend import RedisBackend
from hornbeam_state.codec import canonical
from hornbeam_state.testing import ManualClock

LONG = "long/" * 120
KEYS = [
    *("a", "b", "ab", "a/1"),
    *("{tag}:*?[a-z]\\", "é\0\n", "\U0010ffff", "Ä" * 2048),
    *("k" * length for length in (447, 448, 449, 480, 481, 511, 512)),
    *(LONG + end for end in ("", "1", "2", "2/" + "x" * 3000)),
]
HOT_KEYS = ["a", "k" * 511, LONG + "1"]
PREFIXES = ["", "a", "a/", "{tag}:*", "é", "k" * 448, "k" * 449, "k" * 500, LONG, LONG + "2", "no"]


class Suit(enum.Enum):
    HEARTS = "hearts"


VALUES = [
    *(None, True, False, 0, 1, -1, 41, COUNTER_MAX, COUNTER_MIN, COUNTER_MAX + 1, -(10**40)),
    *(0.0, -0.0, 1.0, math.nan, math.inf, "", "1", "-1", "text", "é\0", b"", b"1", b"\x80\xff"),
    *([], [1, [2.0, None]], (), (1, (2,)), set(), {1, "1", (1, 2)}, frozenset({b"x"})),
    *({}, {1: "int", (1,): "tuple", None: {}}),
    *(dt.datetime(2024, 2, 29, tzinfo=dt.UTC), dt.date(1, 1, 1), dt.timedelta(days=-1)),
    *(Decimal("1.50"), uuid.UUID(int=7), bytearray(b"array"), Suit.HEARTS, np.float32(0.1)),
    *(np.arange(6, dtype="<i2").reshape(2, 3), np.zeros((0, 3)), np.array(5), np.array(["é"])),
    *(np.zeros(10_000), "é" * 40_000),
]
TRICKY_VALUES = [{"a": 1, "b": [2]}, {1: 2, "a": ()}, b"large" * 14_000]


def one_of(items):
    """Draw one, without hypothesis trying to print all of them."""
    return st.integers(0, len(items) - 1).map(lambda number: items[number])


callers = st.sampled_from(["one", "one awaited", "other", "other awaited"])
keys = one_of(KEYS) | one_of(HOT_KEYS)
values = one_of(VALUES) | one_of(TRICKY_VALUES) | st.integers(-3, 3)
ttls = st.none() | st.sampled_from([1, 2.5, 60])
mappings = st.dictionaries(keys, values, max_size=4)
deltas = st.sampled_from([0, 1, 2, -5, COUNTER_MAX, -COUNTER_MAX])


def same(one, other) -> bool:
    return canonical(one) == canonical(other)


class Model:
    """What a store should hold: values and when they expire, by a clock."""

    def __init__(self, clock) -> None:
        self.clock = clock
        self._entries = {}

    def put(self, key, value, ttl) -> None:
        self._entries[key] = (value, math.inf if ttl is None else self.clock() + ttl)

    def get(self, key, default=MISSING):
        value, expires = self._entries.get(key, (None, -math.inf))
        return value if expires > self.clock() else default

    def ttl(self, key) -> float | None:
        expires = self._entries[key][1]
        return None if expires == math.inf else expires - self.clock()

    def delete(self, key) -> bool:
        found = self.get(key) is not MISSING
        self._entries.pop(key, None)
        return found

    def keys(self, prefix="") -> list[str]:
        return sorted(key for key in self._entries if self.get(key) is not MISSING and key.startswith(prefix))  # fmt: skip

    def incr(self, key, delta, ttl):
        """Return the sum, or the type of error that it is."""
        old = self.get(key)
        if old is MISSING:
            self.put(key, delta, ttl)
            return delta
        if type(old) is not int or not COUNTER_MIN <= old <= COUNTER_MAX:
            return WrongType
        if not COUNTER_MIN <= old + delta <= COUNTER_MAX:
            return CounterOverflow
        self._entries[key] = (old + delta, self._entries[key][1])
        return old + delta


class StoreMachine(RuleBasedStateMachine):
    """Does the same to two stores over one place and to a model of them."""

    unit = 1
    """Seconds in a unit of the times to live that are drawn."""

    def __init__(self, space, make_backend, clock) -> None:
        super().__init__()
        self.model = Model(clock)
        self.runner = asyncio.Runner()
        config = StoreConfig.from_url("memory://")  # only names what is used
        self.stores = {
            name: Store(config, space=space, backend=make_backend()) for name in ("one", "other")
        }
        self.others = [self.stores["one"].space(name) for name in SPACES if name != space]

    @initialize()
    def fill_other_spaces(self) -> None:
        for other in self.others:
            other.set_multi({"a": "neighbour", LONG: "neighbour"})

    def call(self, caller, method, *args, **options):
        """Return what a method of a store returns, or the type of our error that it raises."""
        name, _, awaited = caller.partition(" ")
        store = self.stores[name]
        try:
            if not awaited:
                return getattr(store, method)(*args, **options)
            return self.runner.run(getattr(store, "a" + method)(*args, **options))
        except (WrongType, CounterOverflow, KeyError) as error:
            return type(error)

    def seconds(self, ttl) -> float | None:
        return None if ttl is None else ttl * self.unit

    # Values.

    @rule(caller=callers, key=keys, value=values, ttl=ttls)
    def set(self, caller, key, value, ttl):
        self.call(caller, "set", key, value, ttl=self.seconds(ttl))
        self.model.put(key, value, self.seconds(ttl))

    @rule(caller=callers, key=keys, default=values)
    def get(self, caller, key, default):
        assert same(self.call(caller, "get", key, default), self.model.get(key, default))

    @rule(caller=callers, key=keys, value=values, ttl=ttls)
    def add(self, caller, key, value, ttl):
        absent = self.model.get(key) is MISSING
        assert self.call(caller, "add", key, value, ttl=self.seconds(ttl)) is absent
        if absent:
            self.model.put(key, value, self.seconds(ttl))

    @rule(caller=callers, key=keys, expected=values | st.just(MISSING), value=values, ttl=ttls)
    def cas(self, caller, key, expected, value, ttl):
        present = self.model.get(key)
        either_absent = present is MISSING or expected is MISSING
        matches = present is expected if either_absent else same(present, expected)
        assert self.call(caller, "cas", key, expected, value, ttl=self.seconds(ttl)) is matches
        if matches:
            self.model.put(key, value, self.seconds(ttl))

    @rule(caller=callers, key=keys, value=values, ttl=ttls, alike=st.booleans())
    def cas_of_what_is_there(self, caller, key, value, ttl, alike):
        present = self.model.get(key)
        self.cas(caller, key, present if alike else look_alike(present), value, ttl)

    @rule(caller=callers, key=keys, default=values, ttl=ttls)
    def update(self, caller, key, default, ttl):
        new = self.call(caller, "update", key, one_more, default, ttl=self.seconds(ttl))
        expected = one_more(self.model.get(key, default))
        assert same(new, expected)
        self.model.put(key, expected, self.seconds(ttl))

    @rule(caller=callers, key=keys)
    def delete(self, caller, key):
        assert self.call(caller, "delete", key) is self.model.delete(key)

    # Counters.

    @rule(caller=callers, key=keys, delta=deltas, ttl=ttls)
    def incr(self, caller, key, delta, ttl):
        total = self.call(caller, "incr", key, delta, ttl=self.seconds(ttl))
        assert total == self.model.incr(key, delta, self.seconds(ttl))

    @rule(caller=callers, key=keys, delta=deltas, ttl=ttls)
    def decr(self, caller, key, delta, ttl):
        total = self.call(caller, "decr", key, delta, ttl=self.seconds(ttl))
        assert total == self.model.incr(key, -delta, self.seconds(ttl))

    # Many keys.

    @rule(caller=callers, mapping=mappings, ttl=ttls)
    def set_multi(self, caller, mapping, ttl):
        self.call(caller, "set_multi", mapping, ttl=self.seconds(ttl))
        for key, value in mapping.items():
            self.model.put(key, value, self.seconds(ttl))

    @rule(caller=callers, asked=st.lists(keys, max_size=5))
    def get_multi(self, caller, asked):
        expected = {key: self.model.get(key, None) for key in asked}
        assert same(self.call(caller, "get_multi", asked), expected)

    @rule(caller=callers, prefix=one_of(PREFIXES))
    def list_keys(self, caller, prefix):
        assert self.call(caller, "keys", prefix) == self.model.keys(prefix)

    @rule(caller=callers, prefix=one_of(PREFIXES))
    def clear(self, caller, prefix):
        gone = self.model.keys(prefix)
        assert self.call(caller, "clear", prefix) == len(gone)
        for key in gone:
            self.model.delete(key)

    @rule(caller=callers, key=keys)
    def ttl(self, caller, key):
        left = self.call(caller, "ttl", key)
        if self.model.get(key) is MISSING:
            assert left is KeyError
        else:
            assert left == pytest.approx(self.model.ttl(key), abs=self.unit / 100)

    # Around them.

    @rule(caller=callers)
    def close(self, caller):
        self.call(caller, "close")

    @rule(key=keys, value=values, delete=st.booleans())
    def set_or_delete_in_a_child(self, key, value, delete):
        store = self.stores["one"]
        if delete:
            assert Child(store.delete, key).value() is self.model.delete(key)
        else:
            Child(store.set, key, value).value()
            self.model.put(key, value, None)

    @invariant()
    def everything_is_there(self):
        expected = {key: self.model.get(key, None) for key in KEYS}
        for store in self.stores.values():
            assert same(store.get_multi(KEYS), expected)
        assert self.stores["one"].keys() == self.model.keys()

    def teardown(self):
        try:
            for other in self.others:
                assert other.get_multi(other.keys()) == {"a": "neighbour", LONG: "neighbour"}
        finally:
            for store in self.stores.values():
                self.runner.run(store.aclose())
                store.close()
            self.runner.close()


def one_more(old):
    """Make something of any value that shows what it was."""
    return old + 1 if type(old) is int else [type(old).__name__, 1]


def look_alike(value):
    """Return a value that is nearly the same, or the same in other words."""
    if isinstance(value, dict):
        return dict(reversed(value.items()))
    if isinstance(value, str | bytes):
        return value[:-1] + value[:1]
    return [value] if value is not MISSING else None


class EmbeddedMachine(StoreMachine):
    """Over LMDB in a directory, by a clock of its own."""

    def __init__(self, space) -> None:
        self.place = tempfile.mkdtemp(prefix="hb-model-")
        self.clock = ManualClock()
        config = StoreConfig.from_url(f"lmdb://{self.place}/store", timeout=10)
        super().__init__(space, lambda: EmbeddedBackend(config, clock=self.clock), self.clock)

    @rule(seconds=st.sampled_from([0.5, 1, 2, 30]))
    def elapse(self, seconds):
        self.clock.advance(seconds)

    @rule(name=st.sampled_from(["one", "other"]), most=st.integers(1, 3))
    def sweep(self, name, most):
        self.stores[name].backend.sweep(most)

    def teardown(self):
        try:
            super().teardown()
        finally:
            shutil.rmtree(self.place)


class ServerMachine(StoreMachine):
    """Over a server, by whose clock no time passes that matters."""

    unit = 100_000

    def __init__(self, space, server) -> None:
        with server.admin() as admin:
            admin.flushdb()
        # From near, one would see the other's writes a moment later than a dict does.
        config = StoreConfig.from_url(server.url, timeout=10, near_size=0)
        super().__init__(space, lambda: RedisBackend(config), ManualClock())


def run(machine, *, examples, steps) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    profile = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=checks,
    )
    run_state_machine_as_test(machine, settings=profile)


@pytest.mark.parametrize("space", ["app", "cache"])
def test_an_embedded_store_does_as_a_dict(space):
    """In a key space that never evicts, and in one that has room enough."""
    run(partial(EmbeddedMachine, space), examples=25, steps=40)


def test_a_server_does_as_a_dict(valkey):
    """The same machine over Valkey."""
    run(partial(ServerMachine, "app", valkey), examples=25, steps=40)


@pytest.mark.slow
@pytest.mark.parametrize("space", SPACES)
def test_an_embedded_store_does_as_a_dict_for_long(space):
    """Longer, and more often."""
    run(partial(EmbeddedMachine, space), examples=120, steps=100)


@pytest.mark.slow
@pytest.mark.parametrize("space", SPACES)
def test_a_server_does_as_a_dict_for_long(valkey, space):
    """Longer, and in every key space."""
    run(partial(ServerMachine, space, valkey), examples=60, steps=100)
