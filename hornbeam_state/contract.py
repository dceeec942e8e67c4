"""The contract that every backend passes, as tests; see `hornbeam_state.testing`."""
# ruff: noqa: PLR2004, S101 - a test states what it expects

from __future__ import annotations

import asyncio
import os
import select
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest

from hornbeam_state.backends.base import COUNTER_MAX, COUNTER_MIN, SPACES, Backend, Topics
from hornbeam_state.errors import CounterOverflow, WrongType

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from hornbeam_state.backends.base import Inbox

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


class _SyncDriver:
    """Calls methods directly; runs racing jobs in a thread each."""

    def call(self, target: object, method: str, *args: Any) -> Any:
        return getattr(target, method)(*args)

    async def acall(self, target: object, method: str, *args: Any) -> Any:
        return self.call(target, method, *args)

    def race(self, *jobs: Coroutine[Any, Any, Any]) -> list[Any]:
        with ThreadPoolExecutor(len(jobs)) as pool:
            return list(pool.map(_drive, jobs))


class _AsyncDriver:
    """Calls the awaitable twins on an event loop; runs racing jobs in a task each."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner

    def call(self, target: object, method: str, *args: Any) -> Any:
        return self._runner.run(self.acall(target, method, *args))

    async def acall(self, target: object, method: str, *args: Any) -> Any:
        return await getattr(target, "a" + method)(*args)

    def race(self, *jobs: Coroutine[Any, Any, Any]) -> list[Any]:
        async def together() -> list[Any]:
            return await asyncio.gather(*jobs)

        return self._runner.run(together())


_Driver = _SyncDriver | _AsyncDriver


class _Driven:
    """An object whose methods, or their twins, are called by a driver.

    ``driven.get(key)`` calls; ``await driven.soon.get(key)`` does within a racing job.
    """

    def __init__(self, target: object, driver: _Driver, *, soon: bool = False) -> None:
        self._target = target
        self._driver = driver
        self._call = driver.acall if soon else driver.call

    @property
    def soon(self) -> _Driven:
        return _Driven(self._target, self._driver, soon=True)

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return partial(self._call, self._target, method)


def _drive(job: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that never waits for anything."""
    try:
        job.send(None)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("a sync job waited")


def _in_child(work: Callable[[], bool]) -> bool:
    """Return what `work` returns in a forked child; False if it raises there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: "may lead to deadlocks"
        child = os.fork()
    if child == 0:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _succeeds(action: Callable[[], None]) -> bool:
    action()
    return True


def _is_readable(inbox: Inbox, timeout_ms: int) -> bool:
    poller = select.poll()
    poller.register(inbox.fileno(), select.POLLIN)
    return bool(poller.poll(timeout_ms))


def _taken(inbox: Inbox, number: int) -> list[tuple[bytes, bytes]]:
    """Return the next messages, waiting for each for some seconds at most."""
    messages: list[tuple[bytes, bytes]] = []
    while len(messages) < number:
        message = inbox.take()
        if message is not None:
            messages.append(message)
        elif not _is_readable(inbox, 10_000):
            pytest.fail(f"{len(messages)} messages came, and not {number}")
    return messages


def _wait_until(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)


class _Contract:
    """What all parts of the contract stand on."""

    brief = 0.04
    """Seconds to live that a test waits out."""

    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        """Supply an empty backend, and close it after."""
        raise NotImplementedError

    def elapse(self, seconds: float) -> None:
        """Let time pass for the backend."""
        time.sleep(seconds)

    @pytest.fixture(params=["sync", "async"])
    def driver(self, request: pytest.FixtureRequest, backend: Backend) -> Iterator[_Driver]:
        """Run the test through one kind of methods."""
        if request.param == "sync":
            yield _SyncDriver()
            return
        with asyncio.Runner() as runner:
            yield _AsyncDriver(runner)
            runner.run(backend.aclose())


class KeyspaceContract(_Contract):
    """What every `Keyspace` keeps to."""

    @pytest.fixture(params=SPACES)
    def space(self, request: pytest.FixtureRequest, backend: Backend, driver: _Driver) -> _Driven:
        """Run the test in each key space."""
        return _Driven(backend.keyspace(request.param), driver)

    def test_an_absent_key_is_absent_for_every_operation(self, space: _Driven) -> None:
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
    def test_a_value_comes_back_as_it_was(self, space: _Driven, value: bytes) -> None:
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
    def test_any_key_is_told_from_its_neighbours(self, space: _Driven, key: bytes) -> None:
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

    def test_keys_that_share_a_long_prefix_differ(self, space: _Driven) -> None:
        """Keys that differ only in their last byte are different keys."""
        names = [_SHARED + b"%d" % number for number in range(10)]
        space.put_many({name: name[-1:] for name in names})
        assert space.get_many(names) == [b"%d" % number for number in range(10)]
        assert space.delete(names[3]) is True
        assert space.keys(_SHARED[:-1]) == names[:3] + names[4:]
        assert space.clear(names[5]) == 1
        assert space.clear(_SHARED) == 8

    def test_get_many_keeps_the_order_asked_for(self, space: _Driven) -> None:
        """Values stand where their keys stood, absent and repeated ones too."""
        space.put_many({b"a": b"1", b"b": b"2"})
        assert space.get_many([b"b", b"x", b"a", b"b"]) == [b"2", None, b"1", b"2"]
        assert space.get_many([]) == []

    def test_put_many_stores_all_of_many(self, space: _Driven) -> None:
        """Hundreds of items are stored at once, and none is no error."""
        space.put_many({})
        items = {b"item/%03d" % number: b"%d" % number for number in range(300)}
        space.put_many(items, 100)
        assert space.keys() == sorted(items)
        assert space.get_many(list(items)) == list(items.values())
        assert 0 < space.ttl(b"item/000") <= 100

    def test_add_stores_only_where_nothing_is(self, space: _Driven) -> None:
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
        self, space: _Driven, present: bytes | None, expected: bytes | None, *, stored: bool
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
    def test_incr_is_exact_over_64_bits(self, space: _Driven, present: bytes, delta: int) -> None:
        """Sums are those of integers, and `get` sees them as plain decimals."""
        space.put(b"n", present)
        assert space.incr(b"n", delta) == int(present) + delta
        assert space.get(b"n") == b"%d" % (int(present) + delta)

    def test_incr_counts_from_nothing(self, space: _Driven) -> None:
        """An absent key counts as 0, and 0 is a delta like any other."""
        assert space.incr(b"up", 3) == 3
        assert space.incr(b"down", -3) == -3
        assert space.incr(b"same", 0) == 0
        assert space.get_many([b"up", b"down", b"same"]) == [b"3", b"-3", b"0"]
        assert space.keys() == [b"down", b"same", b"up"]

    @pytest.mark.parametrize(("present", "delta"), _OVERFLOWS)
    def test_incr_that_would_overflow_changes_nothing(
        self, space: _Driven, present: bytes | None, delta: int
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
    def test_incr_of_what_is_no_counter_is_a_wrong_type(self, space: _Driven, value: bytes) -> None:
        """A value of another kind is refused and left alone."""
        space.put(b"k", value, 100)
        with pytest.raises(WrongType):
            space.incr(b"k", 1)
        assert space.get(b"k") == value
        assert 0 < space.ttl(b"k") <= 100

    def test_incr_sets_the_expiry_only_when_it_creates(self, space: _Driven) -> None:
        """A rate-limit window closes however often it is counted in."""
        space.incr(b"window", 1, 100)
        space.incr(b"window", 1, 10_000)
        assert 0 < space.ttl(b"window") <= 100
        space.incr(b"window", 1)
        assert 0 < space.ttl(b"window") <= 100
        space.incr(b"total", 1)
        space.incr(b"total", 1, 100)
        assert space.ttl(b"total") is None

    def test_put_put_many_and_cas_replace_the_expiry(self, space: _Driven) -> None:
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
    def test_ttl_is_the_seconds_left(self, space: _Driven, ttl: float) -> None:
        """Fractions and decades are times to live like any other."""
        space.put(b"k", b"v", ttl)
        assert ttl * 0.5 - 0.2 < space.ttl(b"k") <= ttl + 0.001

    def test_an_expired_key_is_absent_for_every_operation(self, space: _Driven) -> None:
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

    def test_a_renewed_key_outlives_its_first_expiry(self, space: _Driven) -> None:
        """The old expiry is forgotten once another value, or none, has replaced it."""
        names = [b"cas", b"deleted", b"many", b"put"]
        space.put_many(dict.fromkeys(names, b"v"), 10 * self.brief)
        space.put(b"put", b"v")
        space.put_many({b"many": b"v"})
        assert space.cas(b"cas", b"v", b"v") is True
        space.delete(b"deleted")
        space.incr(b"deleted", 1)
        self.elapse(11 * self.brief)
        space.put(b"other", b"v", 1000)
        assert space.get_many(names) == [b"v", b"1", b"v", b"v"]
        assert space.keys() == [*names[:3], b"other", b"put"]

    def test_delete_removes_once(self, space: _Driven) -> None:
        """It says whether there was something to remove."""
        space.put(b"k", b"v", 100)
        assert space.delete(b"k") is True
        assert space.delete(b"k") is False
        assert space.get(b"k") is None
        assert space.keys() == []

    def test_keys_lists_a_prefix_in_order_of_bytes(self, space: _Driven) -> None:
        """Every key that starts with the prefix, the prefix itself included, and no other."""
        names = [b"a", b"a/", b"a/1", b"a/10", b"a/2", b"a0", b"b", "a/é".encode(), b"\x00", b"A"]
        space.put_many(dict.fromkeys(names, b"v"))
        assert space.keys() == sorted(names)
        assert space.keys(b"a/") == [b"a/", b"a/1", b"a/10", b"a/2", "a/é".encode()]
        assert space.keys(b"a/1") == [b"a/1", b"a/10"]
        assert space.keys(b"nothing") == []

    def test_a_prefix_is_taken_literally(self, space: _Driven) -> None:
        """Signs that mean something to a pattern mean themselves."""
        for sign in ("*", "?", "[ab]", "\\", "{", "}", "\n", "\0", "^", "ÿ", "\U0010ffff"):
            prefix = b"x" + sign.encode()
            space.put_many({prefix + b"y": b"v", b"xay": b"v"})
            assert space.keys(prefix) == [prefix + b"y"]
            assert space.clear(prefix) == 1
        assert space.keys() == [b"xay"]

    def test_clear_removes_a_prefix_and_counts(self, space: _Driven) -> None:
        """Other keys stay; an empty prefix removes all."""
        space.put_many(dict.fromkeys([b"a/%d" % number for number in range(50)], b"v"), 100)
        space.put_many({b"b/%d" % number: b"v" for number in range(30)})
        assert space.clear(b"a/") == 50
        assert space.get(b"a/7") is None
        assert space.get(b"b/7") == b"v"
        assert space.clear() == 30
        assert space.keys() == []

    def test_usage_counts_where_it_can(self, space: _Driven) -> None:
        """Entries and bytes are right or None; evictions are a number."""
        space.put_many({b"a/%d" % number: b"v" * 100 for number in range(5)}, 100)
        space.put_many({b"b/%d" % number: b"v" * 100 for number in range(3)})
        everything, some = space.usage(), space.usage(b"a/")
        assert everything.entries in (8, None)
        assert some.entries in (5, None)
        assert everything.bytes is None or everything.bytes >= 800
        assert everything.evictions >= 0

    def test_concurrent_increments_are_all_counted(self, space: _Driven, driver: _Driver) -> None:
        """Eight callers of two hundred increments each make sixteen hundred."""

        async def count() -> list[int]:
            return [await space.soon.incr(b"n", 1) for _ in range(200)]

        seen = driver.race(*(count() for _ in range(8)))
        assert space.get(b"n") == b"1600"
        assert sorted(total for totals in seen for total in totals) == list(range(1, 1601))

    def test_one_of_many_adds_wins(self, space: _Driven, driver: _Driver) -> None:
        """The value that stays is the winner's."""

        async def claim(name: bytes) -> bytes | None:
            return name if await space.soon.add(b"owner", name) else None

        claims = driver.race(*(claim(b"caller %d" % number) for number in range(16)))
        assert [claim for claim in claims if claim is not None] == [space.get(b"owner")]

    def test_concurrent_compare_and_sets_lose_nothing(
        self, space: _Driven, driver: _Driver
    ) -> None:
        """Read, add, store if unchanged: every success is one of its own."""

        async def append(letter: bytes) -> None:
            for _ in range(10):
                while True:
                    text = await space.soon.get(b"text")
                    if await space.soon.cas(b"text", text, (text or b"") + letter):
                        break

        driver.race(*(append(letter.encode()) for letter in "abcdef"))
        assert sorted(space.get(b"text")) == sorted(b"abcdef" * 10)


class LockContract(_Contract):
    """What the locks of every `Backend` keep to."""

    @pytest.fixture
    def locks(self, backend: Backend, driver: _Driver) -> Callable[[bytes], Any]:
        """Supply what takes a lock."""

        def take(name: bytes) -> Any:
            held = driver.call(backend, "try_lock", name, 30.0)
            return None if held is None else _Driven(held, driver)

        return take

    @pytest.mark.parametrize("name", [b"lock", b"a{b}*\n\x00", b"n" * 4096])
    def test_a_lock_has_one_holder(self, locks: Callable[[bytes], Any], name: bytes) -> None:
        """It is refused while it is held, and free after."""
        first = locks(name)
        assert first is not None
        assert locks(name) is None
        assert first.release() is True
        second = locks(name)
        assert second is not None
        assert first.release() is False, "the first holder released the second's lock"
        assert locks(name) is None
        assert second.release() is True

    def test_a_lock_is_released_once(self, locks: Callable[[bytes], Any]) -> None:
        """A second release changes nothing and says so."""
        held = locks(b"lock")
        assert held.release() is True
        assert held.release() is False

    def test_locks_of_other_names_are_independent(self, locks: Callable[[bytes], Any]) -> None:
        """Any number may be held at once."""
        held = [locks(b"lock/%d" % number) for number in range(20)]
        assert None not in held
        assert [lock.release() for lock in held] == [True] * 20

    def test_a_lock_and_a_key_of_one_name_do_not_meet(
        self, backend: Backend, locks: Callable[[bytes], Any]
    ) -> None:
        """A lock is in no key space."""
        held = locks(b"name")
        for space in SPACES:
            assert backend.keyspace(space).get(b"name") is None
            assert backend.keyspace(space).keys() == []
            backend.keyspace(space).put(b"name", b"v")
            assert backend.keyspace(space).clear() == 1
        assert locks(b"name") is None
        assert held.release() is True

    def test_one_of_many_gets_the_lock(self, backend: Backend, driver: _Driver) -> None:
        """However many ask at once, from threads or tasks."""

        async def ask() -> Any:
            return await driver.acall(backend, "try_lock", b"lock", 30.0)

        [held] = [lock for lock in driver.race(*(ask() for _ in range(8))) if lock is not None]
        assert held.release() is True

    def test_a_lock_excludes_a_change_of_means(self, backend: Backend) -> None:
        """A lock taken by a thread is refused to a task, and may be released by one."""

        async def main() -> None:
            held = backend.try_lock(b"lock", 30.0)
            assert held is not None
            assert await backend.atry_lock(b"lock", 30.0) is None
            assert await held.arelease() is True
            held = await backend.atry_lock(b"lock", 30.0)
            assert held is not None
            assert backend.try_lock(b"lock", 30.0) is None
            assert held.release() is True
            await backend.aclose()

        asyncio.run(main())

    def test_a_child_does_not_hold_its_parents_lock(
        self, backend: Backend, locks: Callable[[bytes], Any]
    ) -> None:
        """After a fork the lock is still the parent's, and the child cannot take it."""
        held = locks(b"lock")
        assert _in_child(lambda: backend.try_lock(b"lock", 30.0) is None)
        assert locks(b"lock") is None
        assert held.release() is True


class MessageContract(_Contract):
    """How every `Backend` passes messages on."""

    @pytest.fixture
    def subscribe(self, backend: Backend, driver: _Driver) -> Iterator[Callable[..., Inbox]]:
        """Supply what subscribes, and unsubscribes after."""
        inboxes: list[Inbox] = []

        def begin(*names: bytes, prefixes: tuple[bytes, ...] = (), maxsize: int = 100) -> Inbox:
            topics = Topics(names, prefixes)
            inboxes.append(driver.call(backend, "subscribe", topics, maxsize))
            return inboxes[-1]

        yield begin
        for inbox in inboxes:
            inbox.close()

    @pytest.fixture
    def publish(self, backend: Backend, driver: _Driver) -> Callable[[bytes, bytes], int]:
        """Supply what publishes."""
        return partial(driver.call, backend, "publish")

    def test_a_message_goes_to_every_subscription(
        self, subscribe: Callable[..., Inbox], publish: Callable[[bytes, bytes], int]
    ) -> None:
        """Each gets it once, as it was; the publisher learns how many they are."""
        payload = b"\x83\x00\xff\r\n" * 10
        assert publish(b"topic", payload) == 0
        inboxes = [subscribe(b"topic") for _ in range(3)]
        other = subscribe(b"topi", b"topic2", b"Topic")
        assert publish(b"topic", payload) == 3
        for inbox in inboxes:
            assert _taken(inbox, 1) == [(b"topic", payload)]
        assert publish(b"topic2", b"") == 1
        assert _taken(other, 1) == [(b"topic2", b"")]
        for inbox in (*inboxes, other):
            assert inbox.take() is None
            assert inbox.dropped == 0
            assert inbox.gaps == 0

    def test_nothing_is_kept_for_those_who_come_later(
        self, subscribe: Callable[..., Inbox], publish: Callable[[bytes, bytes], int]
    ) -> None:
        """A subscription begins where it begins and ends when it is closed."""
        publish(b"topic", b"before")
        inbox = subscribe(b"topic")
        publish(b"topic", b"during")
        assert _taken(inbox, 1) == [(b"topic", b"during")]
        inbox.close()
        inbox.close()
        assert inbox.closed
        assert inbox.take() is None
        assert publish(b"topic", b"after") == 0

    def test_messages_come_in_order(
        self, subscribe: Callable[..., Inbox], publish: Callable[[bytes, bytes], int]
    ) -> None:
        """Over all topics of a subscription."""
        inbox = subscribe(b"a", b"b", maxsize=300)
        sent = [(b"ab"[number % 2 :][:1], b"%d" % number) for number in range(300)]
        assert [publish(*message) for message in sent] == [1] * 300
        assert _taken(inbox, 300) == sent
        assert inbox.dropped == 0

    def test_a_prefix_of_topics_is_taken_literally(
        self, subscribe: Callable[..., Inbox], publish: Callable[[bytes, bytes], int]
    ) -> None:
        """Signs that mean something to a pattern mean themselves; the prefix itself counts."""
        inbox = subscribe(b"x", prefixes=(b"a*[b]?\\", b"room/"))
        for topic, count in [
            (b"a*[b]?\\", 1),
            (b"a*[b]?\\\n\x00z", 1),
            (b"aab?\\", 0),
            (b"room/1", 1),
            (b"room", 0),
            (b"x", 1),
            (b"xy", 0),
        ]:
            assert publish(topic, topic) == count
        topics = [b"a*[b]?\\", b"a*[b]?\\\n\x00z", b"room/1", b"x"]
        assert _taken(inbox, 4) == [(topic, topic) for topic in topics]
        assert inbox.take() is None

    def test_an_empty_prefix_matches_every_topic(
        self, subscribe: Callable[..., Inbox], publish: Callable[[bytes, bytes], int]
    ) -> None:
        """Also the longest."""
        inbox = subscribe(prefixes=(b"",))
        longest = b"t" * 4200
        assert publish(longest, b"v") == 1
        assert _taken(inbox, 1) == [(longest, b"v")]

    def test_a_full_inbox_drops_its_oldest_and_counts(
        self, subscribe: Callable[..., Inbox], publish: Callable[[bytes, bytes], int]
    ) -> None:
        """The slow lose messages, and those who keep up do not."""
        slow, quick = subscribe(b"t", maxsize=10), subscribe(b"t", maxsize=100)
        for number in range(35):
            assert publish(b"t", b"%d" % number) == 2
        assert [payload for _, payload in _taken(quick, 35)] == [b"%d" % n for n in range(35)]
        _wait_until(lambda: slow.dropped == 25)
        assert [payload for _, payload in _taken(slow, 10)] == [b"%d" % n for n in range(25, 35)]
        assert slow.take() is None
        assert (slow.dropped, quick.dropped) == (25, 0)
        publish(b"t", b"again")
        assert _taken(slow, 1) == [(b"t", b"again")]
        assert slow.dropped == 25

    def test_large_messages_arrive_whole(
        self, subscribe: Callable[..., Inbox], publish: Callable[[bytes, bytes], int]
    ) -> None:
        """From a few kilobytes to some megabytes, several waiting at a time."""
        inboxes = [subscribe(b"t"), subscribe(b"t")]
        sent = [bytes([number]) * (1 << (4 * number)) for number in range(3, 6)] * 2
        for payload in sent:
            assert publish(b"t", payload) == 2
        for inbox in inboxes:
            assert [payload for _, payload in _taken(inbox, 6)] == sent

    def test_the_descriptor_is_readable_until_nothing_is_left(
        self, subscribe: Callable[..., Inbox], publish: Callable[[bytes, bytes], int]
    ) -> None:
        """So several may wait on it, and each finds a message if there is one for it."""
        inbox = subscribe(b"t")
        assert not _is_readable(inbox, 0)
        publish(b"t", b"1")
        publish(b"t", b"2")
        for payload in (b"1", b"2"):
            assert _is_readable(inbox, 5000)
            assert _taken(inbox, 1) == [(b"t", payload)]
        assert inbox.take() is None
        assert not _is_readable(inbox, 0)
        inbox.close()
        assert _is_readable(inbox, 5000)

    def test_a_message_leaves_no_key_behind(
        self,
        backend: Backend,
        subscribe: Callable[..., Inbox],
        publish: Callable[[bytes, bytes], int],
    ) -> None:
        """Messages are in no key space."""
        inbox = subscribe(b"t")
        publish(b"t", b"v")
        for space in SPACES:
            assert backend.keyspace(space).keys() == []
            backend.keyspace(space).clear()
        assert _taken(inbox, 1) == [(b"t", b"v")]

    def test_messages_cross_a_fork(self, backend: Backend, subscribe: Callable[..., Inbox]) -> None:
        """A child publishes to its parent, and closing there ends nothing here."""
        inbox = subscribe(b"t")
        assert _in_child(lambda: backend.publish(b"t", b"from the child") == 1)
        assert _taken(inbox, 1) == [(b"t", b"from the child")]
        assert _in_child(partial(_succeeds, backend.close))
        assert backend.publish(b"t", b"still here") == 1
        assert _taken(inbox, 1) == [(b"t", b"still here")]

    def test_closing_the_backend_ends_its_subscriptions(
        self,
        backend: Backend,
        driver: _Driver,
        subscribe: Callable[..., Inbox],
        publish: Callable[[bytes, bytes], int],
    ) -> None:
        """Who waits on one sees that; new ones can be made."""
        inbox = subscribe(b"t")
        assert not inbox.closed
        driver.call(backend, "close")
        assert inbox.closed
        assert _is_readable(inbox, 5000)
        assert inbox.take() is None
        assert publish(b"t", b"v") == 0
        again = subscribe(b"t")
        assert publish(b"t", b"w") == 1
        assert _taken(again, 1) == [(b"t", b"w")]


class BackendContract(KeyspaceContract, LockContract, MessageContract):
    """The whole contract: subclass it and supply the `backend` fixture, an empty one."""

    def test_it_is_a_backend(self, backend: Backend) -> None:
        """It has the methods, can be used, and hands out one object for each key space."""
        assert isinstance(backend, Backend)
        backend.check()
        for space in SPACES:
            assert backend.keyspace(space) is backend.keyspace(space)

    def test_its_directory_is_private(self, backend: Backend) -> None:
        """It exists, stays the same, and is closed to other users."""
        assert backend.directory.is_dir()
        assert backend.directory.stat().st_mode & 0o077 == 0
        assert len({backend.directory, backend.directory}) == 1

    def test_key_spaces_never_meet(self, backend: Backend, driver: _Driver) -> None:
        """One key in three spaces is three keys."""
        spaces = {name: _Driven(backend.keyspace(name), driver) for name in SPACES}
        for name, space in spaces.items():
            assert space.add(b"key", name.encode()) is True
        for name, space in spaces.items():
            assert space.get(b"key") == name.encode()
            assert space.keys() == [b"key"]
        assert spaces["app"].clear() == 1
        assert spaces["sys"].incr(b"n", 1) == 1
        assert spaces["cache"].keys() == [b"key"]
        assert spaces["app"].keys() == []
        assert spaces["cache"].get(b"n") is None

    def test_a_closed_backend_opens_again(self, backend: Backend, driver: _Driver) -> None:
        """What was stored before it was closed is there after."""
        space = _Driven(backend.keyspace("app"), driver)
        space.put(b"k", b"v")
        driver.call(backend, "close")
        driver.call(backend, "close")
        assert space.get(b"k") == b"v"

    def test_it_works_on_both_sides_of_a_fork(self, backend: Backend, driver: _Driver) -> None:
        """Parent and child count on together, each with connections of its own."""
        space = _Driven(backend.keyspace("app"), driver)
        space.incr(b"n", 1)

        def work() -> bool:
            totals = [backend.keyspace("app").incr(b"n", 1) for _ in range(50)]

            async def main() -> bool:
                total = await backend.keyspace("app").aincr(b"n", 1)
                await backend.aclose()
                return total > max(totals)

            return asyncio.run(main())

        assert _in_child(work)
        assert space.incr(b"n", 1) == 53
