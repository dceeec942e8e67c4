"""The contract of key spaces."""
# ruff: noqa: PLR2004, S101 - a test states what it expects

from __future__ import annotations

import time
from typing import Final

import pytest

from hornbeam_state.backends.base import COUNTER_MAX, COUNTER_MIN, SPACES, Backend
from hornbeam_state.contract.driving import Contract, Driven, Driver
from hornbeam_state.errors import CounterOverflow, WrongType

_SHARED: Final = b"shared/" * 580
_KEYS: Final = (
    pytest.param(b"k", id="1-byte"),
    pytest.param(b"k" * 511, id="511-bytes"),
    pytest.param(b"k" * 512, id="512-bytes"),
    pytest.param(b"k" * 4096, id="4096-bytes"),
    pytest.param("\N{SNOWMAN}\U0001f333 Hainbuche é".encode(), id="multi-byte"),
    pytest.param("é".encode() * 2048, id="4096-bytes-multi-byte"),
    pytest.param(b"{tag}:*?[a-z]\\", id="braces-and-globs"),
    pytest.param(b"a\x00b\nc\rd e", id="nul-newline-space"),
)
_VALUES: Final = (
    pytest.param(b"", id="empty"),
    pytest.param(b"\x83\x00\xff\r\n$-1", id="binary"),
    pytest.param(b"-17", id="counter"),
    pytest.param(b"\x80" + bytes(range(256)) * 4096, id="1-MB"),
)
_INCREMENTS: Final = (
    pytest.param(b"41", 1, id="plain"),
    pytest.param(b"3", -10, id="to-negative"),
    pytest.param(b"%d" % (2**53 + 1), 2, id="beyond-doubles"),
    pytest.param(b"%d" % -(2**53 + 1), -2, id="beyond-doubles-negative"),
    pytest.param(b"%d" % (COUNTER_MAX - 1), 1, id="to-largest"),
    pytest.param(b"%d" % (COUNTER_MIN + 1), -1, id="to-smallest"),
    pytest.param(b"-1", 2**63, id="delta-beyond-64-bits"),
    pytest.param(b"%d" % COUNTER_MIN, 2**64 - 1, id="end-to-end"),
    pytest.param(b"%d" % COUNTER_MAX, 1 - 2**64, id="end-to-end-down"),
)
_OVERFLOWS: Final = (
    pytest.param(b"%d" % COUNTER_MAX, 1, id="above"),
    pytest.param(b"%d" % COUNTER_MIN, -1, id="below"),
    pytest.param(b"5", COUNTER_MAX, id="large-delta"),
    pytest.param(b"0", 2**63, id="delta-beyond-64-bits"),
    pytest.param(b"%d" % COUNTER_MIN, 2**64, id="delta-beyond-everything"),
    pytest.param(None, 2**63, id="absent"),
    pytest.param(None, -(10**5000), id="absent-and-huge"),
)


class KeyspaceContract(Contract):
    """What every `Keyspace` keeps to."""

    @pytest.fixture(params=SPACES)
    def space(self, request: pytest.FixtureRequest, backend: Backend, driver: Driver) -> Driven:
        """Run the test in each key space."""
        return Driven(backend.keyspace(request.param), driver)

    def test_an_absent_key_is_absent_for_every_operation(self, space: Driven) -> None:
        """What was never stored has no value, no expiry, and cannot be deleted."""
        assert space.get(b"k") is None
        assert space.get_many([b"k"]) == [None]
        assert space.delete(b"k") is False
        assert space.cas(b"k", b"", b"v") is False
        assert space.keys() == []
        assert space.clear() == 0
        with pytest.raises(KeyError):
            space.ttl(b"k")
        assert space.get(b"k") is None

    @pytest.mark.parametrize("value", _VALUES)
    def test_a_value_comes_back_as_it_was(self, space: Driven, value: bytes) -> None:
        """Any bytes are stored exactly, by every operation that stores."""
        space.put(b"put", b"before")
        space.put(b"put", value)
        space.put_many({b"many": value})
        assert space.add(b"add", value) is True
        assert space.cas(b"cas", None, value) is True
        assert space.cas(b"cas", value, b"then") is True
        assert space.cas(b"cas", b"then", value) is True
        names = [b"put", b"many", b"add", b"cas"]
        assert space.get_many(names) == [value] * 4
        assert space.get(b"put") == value

    @pytest.mark.parametrize("key", _KEYS)
    def test_any_key_is_told_from_its_neighbours(self, space: Driven, key: bytes) -> None:
        """Long and odd keys work in every operation and are listed as they are."""
        text = key.decode()
        neighbours = [near.encode() for near in (text[:-1] + "!", text[:-1] + "~", "!" + text[1:])]
        space.put_many(dict.fromkeys(neighbours, b"other"))
        assert space.add(key, b"1", 100) is True
        assert space.add(key, b"2") is False
        assert space.incr(key, 4) == 5
        assert space.cas(key, b"5", b"6", 100) is True
        assert space.get_many([*neighbours, key]) == [b"other"] * 3 + [b"6"]
        assert space.keys() == sorted({*neighbours, key})
        assert space.keys(key) == [key]
        assert 0 < space.ttl(key) <= 100
        assert space.delete(key) is True
        assert space.keys() == sorted(set(neighbours))
        assert space.clear(neighbours[0]) == 1

    def test_keys_that_share_a_long_prefix_differ(self, space: Driven) -> None:
        """Keys that differ only in their last byte are different keys."""
        names = [_SHARED + b"%d" % number for number in range(10)]
        space.put_many({name: name[-1:] for name in names})
        assert space.get_many(names) == [b"%d" % number for number in range(10)]
        assert space.delete(names[3]) is True
        assert space.keys(_SHARED[:-1]) == names[:3] + names[4:]
        assert space.clear(names[5]) == 1
        assert space.clear(_SHARED) == 8

    def test_get_many_keeps_the_order_asked_for(self, space: Driven) -> None:
        """Values stand where their keys stood, absent and repeated ones too."""
        space.put_many({b"a": b"1", b"b": b"2"})
        assert space.get_many([b"b", b"x", b"a", b"b"]) == [b"2", None, b"1", b"2"]
        assert space.get_many([]) == []

    def test_put_many_stores_all_of_many(self, space: Driven) -> None:
        """Hundreds of items are stored at once, and none is no error."""
        space.put_many({})
        items = {b"item/%03d" % number: b"%d" % number for number in range(300)}
        space.put_many(items, 100)
        assert space.keys() == sorted(items)
        assert space.get_many(list(items)) == list(items.values())
        assert 0 < space.ttl(b"item/000") <= 100

    def test_add_stores_only_where_nothing_is(self, space: Driven) -> None:
        """A present value and its expiry are left alone."""
        assert space.add(b"k", b"first", 100) is True
        assert space.add(b"k", b"second") is False
        assert space.get(b"k") == b"first"
        assert 0 < space.ttl(b"k") <= 100
        space.delete(b"k")
        assert space.add(b"k", b"third") is True
        assert space.ttl(b"k") is None

    @pytest.mark.parametrize(
        ("present", "expected", "stored"),
        [
            pytest.param(None, None, True, id="absent-as-expected"),
            pytest.param(None, b"v", False, id="absent"),
            pytest.param(None, b"", False, id="absent-is-not-empty"),
            pytest.param(b"v", None, False, id="present"),
            pytest.param(b"", None, False, id="empty-is-not-absent"),
            pytest.param(b"v", b"v", True, id="equal"),
            pytest.param(b"", b"", True, id="equal-empty"),
            pytest.param(b"v", b"V", False, id="different"),
            pytest.param(b"v", b"v\x00", False, id="longer"),
            pytest.param(b"17", b"17", True, id="equal-counter"),
            pytest.param(b"17", b"18", False, id="different-counter"),
        ],
    )
    def test_cas_stores_only_over_what_was_expected(
        self, space: Driven, present: bytes | None, expected: bytes | None, *, stored: bool
    ) -> None:
        """Where it does not store, neither the value nor its expiry changes."""
        if present is not None:
            space.put(b"k", present, 100)
        assert space.cas(b"k", expected, b"new", 10_000) is stored
        assert space.get(b"k") == (b"new" if stored else present)
        assert space.keys() == ([b"k"] if stored or present is not None else [])
        if stored:
            assert 100 < space.ttl(b"k") <= 10_000
        elif present is not None:
            assert 0 < space.ttl(b"k") <= 100

    @pytest.mark.parametrize(("present", "delta"), _INCREMENTS)
    def test_incr_is_exact_over_64_bits(self, space: Driven, present: bytes, delta: int) -> None:
        """Sums are those of integers, and `get` sees them as plain decimals."""
        space.put(b"n", present)
        assert space.incr(b"n", delta) == int(present) + delta
        assert space.get(b"n") == b"%d" % (int(present) + delta)

    def test_incr_counts_from_nothing(self, space: Driven) -> None:
        """An absent key counts as 0, and 0 is a delta like any other."""
        assert space.incr(b"up", 3) == 3
        assert space.incr(b"down", -3) == -3
        assert space.incr(b"same", 0) == 0
        assert space.get_many([b"up", b"down", b"same"]) == [b"3", b"-3", b"0"]
        assert space.keys() == [b"down", b"same", b"up"]

    @pytest.mark.parametrize(("present", "delta"), _OVERFLOWS)
    def test_incr_that_would_overflow_changes_nothing(
        self, space: Driven, present: bytes | None, delta: int
    ) -> None:
        """The counter stays as it was, expiry included; an absent one is not created."""
        if present is not None:
            space.put(b"n", present, 100)
        with pytest.raises(CounterOverflow):
            space.incr(b"n", delta, 10_000)
        assert space.get(b"n") == present
        if present is not None:
            assert 0 < space.ttl(b"n") <= 100
        else:
            assert space.keys() == []

    @pytest.mark.parametrize("value", [b"\x83abc", b"", b"\x8012", b"\xff" * 9])
    def test_incr_of_what_is_no_counter_is_a_wrong_type(self, space: Driven, value: bytes) -> None:
        """A value of another kind is refused and left alone."""
        space.put(b"k", value, 100)
        with pytest.raises(WrongType):
            space.incr(b"k", 1)
        assert space.get(b"k") == value
        assert 0 < space.ttl(b"k") <= 100

    def test_incr_sets_the_expiry_only_when_it_creates(self, space: Driven) -> None:
        """A rate-limit window closes however often it is counted in."""
        space.incr(b"window", 1, 100)
        space.incr(b"window", 1, 10_000)
        assert 0 < space.ttl(b"window") <= 100
        space.incr(b"window", 1)
        assert 0 < space.ttl(b"window") <= 100
        space.incr(b"total", 1)
        space.incr(b"total", 1, 100)
        assert space.ttl(b"total") is None

    def test_put_put_many_and_cas_replace_the_expiry(self, space: Driven) -> None:
        """A new expiry takes the old one's place, and None clears it."""
        for name in (b"put", b"many", b"cas"):
            space.put(name, b"v", 100)
        space.put(b"put", b"v", 10_000)
        space.put_many({b"many": b"v"}, 10_000)
        space.cas(b"cas", b"v", b"v", 10_000)
        for name in (b"put", b"many", b"cas"):
            assert 100 < space.ttl(name) <= 10_000
        space.put(b"put", b"v")
        space.put_many({b"many": b"v"})
        space.cas(b"cas", b"v", b"v")
        for name in (b"put", b"many", b"cas"):
            assert space.ttl(name) is None

    @pytest.mark.parametrize("ttl", [0.5, 1, 3600.25, 1e9])
    def test_ttl_is_the_seconds_left(self, space: Driven, ttl: float) -> None:
        """Fractions and decades are times to live like any other."""
        start = time.monotonic()
        space.put(b"k", b"v", ttl)
        try:
            left = space.ttl(b"k")
        except KeyError:  # a busy machine took its time
            left = 0.0
        passed = time.monotonic() - start
        assert max(0.0, ttl * 0.9 - passed) <= left <= ttl + 0.001

    def test_an_expired_key_is_absent_for_every_operation(self, space: Driven) -> None:
        """Reads miss it, listings skip it, and writes find nothing there."""
        names = [b"gone/%d" % number for number in range(8)]
        space.put_many(dict.fromkeys(names, b"7"), self.brief)
        space.put(b"here", b"v", 1000)
        self.elapse(2 * self.brief)
        assert space.get(names[0]) is None
        assert space.get_many([names[0], b"here"]) == [None, b"v"]
        assert space.keys() == [b"here"]
        with pytest.raises(KeyError):
            space.ttl(names[0])
        assert space.delete(names[1]) is False
        assert space.cas(names[2], b"7", b"8") is False
        assert space.cas(names[2], None, b"8") is True
        assert space.add(names[3], b"8") is True
        assert space.incr(names[4], 5) == 5
        assert [space.ttl(name) for name in names[2:5]] == [None] * 3
        assert space.incr(names[5], 5, 1000) == 5
        assert 0 < space.ttl(names[5]) <= 1000
        assert space.keys() == [*names[2:6], b"here"]
        assert space.clear(b"gone/") == 4

    def test_a_renewed_key_outlives_its_first_expiry(self, space: Driven) -> None:
        """The old expiry is forgotten once another value, or none, has replaced it."""
        names = [b"cas", b"deleted", b"many", b"put"]
        space.put_many(dict.fromkeys(names, b"v"), 10 * self.brief)
        space.put(b"put", b"v")
        space.put_many({b"many": b"v"})
        # On a busy machine it may have expired by now.
        assert space.cas(b"cas", b"v", b"v") or space.cas(b"cas", None, b"v")
        space.delete(b"deleted")
        space.incr(b"deleted", 1)
        self.elapse(11 * self.brief)
        space.put(b"other", b"v", 1000)
        assert space.get_many(names) == [b"v", b"1", b"v", b"v"]
        assert space.keys() == [*names[:3], b"other", b"put"]

    def test_delete_removes_once(self, space: Driven) -> None:
        """It says whether there was something to remove."""
        space.put(b"k", b"v", 100)
        assert space.delete(b"k") is True
        assert space.delete(b"k") is False
        assert space.get(b"k") is None
        assert space.keys() == []

    def test_keys_lists_a_prefix_in_order_of_bytes(self, space: Driven) -> None:
        """Every key that starts with the prefix, the prefix itself included, and no other."""
        names = [b"a", b"a/", b"a/1", b"a/10", b"a/2", b"a0", b"b", "a/é".encode(), b"\x00", b"A"]
        space.put_many(dict.fromkeys(names, b"v"))
        assert space.keys() == sorted(names)
        assert space.keys(b"a/") == [b"a/", b"a/1", b"a/10", b"a/2", "a/é".encode()]
        assert space.keys(b"a/1") == [b"a/1", b"a/10"]
        assert space.keys(b"nothing") == []

    def test_a_prefix_is_taken_literally(self, space: Driven) -> None:
        """Signs that mean something to a pattern mean themselves."""
        for sign in ("*", "?", "[ab]", "\\", "{", "}", "\n", "\0", "^", "ÿ", "\U0010ffff"):
            prefix = b"x" + sign.encode()
            space.put_many({prefix + b"y": b"v", b"xay": b"v"})
            assert space.keys(prefix) == [prefix + b"y"]
            assert space.clear(prefix) == 1
        assert space.keys() == [b"xay"]

    def test_clear_removes_a_prefix_and_counts(self, space: Driven) -> None:
        """Other keys stay; an empty prefix removes all."""
        space.put_many(dict.fromkeys([b"a/%d" % number for number in range(50)], b"v"), 100)
        space.put_many({b"b/%d" % number: b"v" for number in range(30)})
        assert space.clear(b"a/") == 50
        assert space.get(b"a/7") is None
        assert space.get(b"b/7") == b"v"
        assert space.clear() == 30
        assert space.keys() == []

    def test_usage_counts_where_it_can(self, space: Driven) -> None:
        """Entries and bytes are right or None; evictions are a number."""
        space.put_many({b"a/%d" % number: b"v" * 100 for number in range(5)}, 100)
        space.put_many({b"b/%d" % number: b"v" * 100 for number in range(3)})
        everything, some = space.usage(), space.usage(b"a/")
        assert everything.entries in (8, None)
        assert some.entries in (5, None)
        assert everything.bytes is None or everything.bytes >= 800
        assert everything.evictions >= 0

    def test_concurrent_increments_are_all_counted(self, space: Driven, driver: Driver) -> None:
        """Eight callers of two hundred increments each make sixteen hundred."""

        async def count() -> list[int]:
            return [await space.soon.incr(b"n", 1) for _ in range(200)]

        seen = driver.race(*(count() for _ in range(8)))
        assert space.get(b"n") == b"1600"
        assert sorted(total for totals in seen for total in totals) == list(range(1, 1601))

    def test_one_of_many_adds_wins(self, space: Driven, driver: Driver) -> None:
        """The value that stays is the winner's."""

        async def claim(name: bytes) -> bytes | None:
            return name if await space.soon.add(b"owner", name) else None

        claims = driver.race(*(claim(b"caller %d" % number) for number in range(16)))
        assert [claim for claim in claims if claim is not None] == [space.get(b"owner")]

    def test_concurrent_compare_and_sets_lose_nothing(self, space: Driven, driver: Driver) -> None:
        """Read, add, store if unchanged: every success is one of its own."""

        async def append(letter: bytes) -> None:
            for _ in range(10):
                while True:
                    text = await space.soon.get(b"text")
                    if await space.soon.cas(b"text", text, (text or b"") + letter):
                        break

        driver.race(*(append(letter.encode()) for letter in "abcdef"))
        assert sorted(space.get(b"text")) == sorted(b"abcdef" * 10)
