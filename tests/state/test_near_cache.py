"""What is kept near, decided without a server: bounds, expiry, and every order of events."""

from __future__ import annotations

import gc
import itertools
import tracemalloc
from collections import deque
from functools import partial

import pytest

from hornbeam_state.backends.redis.feed import PING_EVERY, Pulse
from hornbeam_state.backends.redis.near import NearSteps
from hornbeam_state.backends.redis.near_cache import _STRIPES, ENTRY_BYTES, LONGEST, NearCache


def make_cache(entries=4, value=1):
    """Return an enabled cache with room for so many entries of a key and a value of one byte."""
    near = NearCache(entries * (ENTRY_BYTES + 1 + value))
    near.enable()
    return near


def key_beside(key, *, together):
    """Return another key, of which is heard together with this one or apart from it."""
    others = (b"%d" % number for number in itertools.count())
    stripe = hash(key) % _STRIPES
    return next(other for other in others if (hash(other) % _STRIPES == stripe) is together)


def keep(near, key, value=b"v", left=None, asked=0.0):
    near.keep(key, value, near.token(key), asked, left)


class TestBounds:
    """How much is kept, and for how long."""

    def test_what_was_kept_is_found(self):
        near = make_cache()
        keep(near, b"k", b"v")
        assert near.get(b"k", 0.0) == b"v"
        assert near.get(b"x", 0.0) is None

    def test_the_least_recently_used_goes_first(self):
        """Being read counts as use."""
        near = make_cache(entries=3)
        for key in (b"a", b"b", b"c"):
            keep(near, key)
        near.get(b"a", 0.0)
        keep(near, b"d")
        assert [near.get(key, 0.0) for key in (b"a", b"b", b"c", b"d")] == [b"v", None, b"v", b"v"]

    def test_a_large_value_takes_the_room_of_several(self):
        near = make_cache(entries=4)
        for key in (b"a", b"b", b"c", b"d"):
            keep(near, key)
        keep(near, b"e", b"v" * (ENTRY_BYTES + 3))
        assert [near.get(key, 0.0) for key in (b"a", b"b", b"c", b"d")] == [None, None, b"v", b"v"]
        assert near.used <= 4 * (ENTRY_BYTES + 2)

    def test_a_value_that_does_not_fit_displaces_nothing(self):
        """But it does end the life of the one before it."""
        near = make_cache(entries=3)
        keep(near, b"a")
        keep(near, b"b", b"old")
        keep(near, b"b", b"v" * 10_000)
        assert near.get(b"a", 0.0) == b"v"
        assert near.get(b"b", 0.0) is None
        assert near.used == ENTRY_BYTES + 2

    @pytest.mark.parametrize("change", ["replace", "forget", "flush", "disable"])
    def test_the_books_are_kept_whatever_happens(self, change):
        near = make_cache(entries=8)
        for key in (b"a", b"b"):
            keep(near, key)
        if change == "replace":
            keep(near, b"a", b"longer")
            keep(near, b"b", b"w")
            assert (len(near), near.used) == (2, 2 * (ENTRY_BYTES + 2) + 5)
            near.forget([b"a", b"b"])
        elif change == "forget":
            near.forget([b"a", b"b", b"x"])
        else:
            getattr(near, change)()
        assert (len(near), near.used) == (0, 0)

    def test_the_bound_holds_in_memory(self):
        """Ten thousand values through a megabyte take no more than a megabyte."""
        size = 1024 * 1024
        near = NearCache(size)
        near.enable()
        gc.collect()
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            for number in range(10_000):
                keep(near, b"key/%d" % number, bytes(number % 1000))
                assert near.used <= size
            gc.collect()
            taken = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        assert len(near) > 1000
        assert taken <= size

    @pytest.mark.parametrize(
        ("left", "until"),
        [
            pytest.param(None, LONGEST, id="no-expiry"),
            pytest.param(1e9, LONGEST, id="far"),
            pytest.param(LONGEST, LONGEST, id="equal"),
            pytest.param(1.5, 1.5, id="near"),
            pytest.param(0.001, 0.001, id="soon"),
        ],
    )
    def test_an_entry_lives_no_longer_than_its_expiry(self, left, until):
        """Counted from before the server was asked, and never longer than the hard limit."""
        near = make_cache()
        keep(near, b"k", left=left, asked=100.0)
        assert near.get(b"k", 100.0 + until * 0.999) == b"v"
        assert near.get(b"k", 100.0 + until) is None

    @pytest.mark.parametrize("left", [0.0, -0.002])
    def test_what_has_expired_is_not_kept(self, left):
        near = make_cache()
        keep(near, b"k", left=left)
        assert len(near) == 0

    def test_what_is_absent_is_not_kept(self):
        near = make_cache()
        keep(near, b"k", None)
        assert len(near) == 0


class TestOrder:
    """What may have come between a question and its answer."""

    @pytest.mark.parametrize(
        ("between", "kept"),
        [
            pytest.param([], True, id="nothing"),
            pytest.param([("forget", [b"k"])], False, id="a-change"),
            pytest.param([("forget", [b"x", b"k"])], False, id="changes"),
            pytest.param(
                [("forget", [key_beside(b"k", together=False)])],
                True,
                id="a-change-of-another-key",
            ),
            pytest.param([("flush",)], False, id="flush"),
            pytest.param([("disable",)], False, id="loss"),
            pytest.param([("disable",), ("enable",)], False, id="loss-and-return"),
            pytest.param([("enable",)], False, id="another-beginning"),
            pytest.param([("after_fork",)], False, id="fork"),
        ],
    )
    def test_an_answer_is_kept_only_if_nothing_came_between(self, between, kept):
        near = make_cache()
        token = near.token(b"k")
        for method, *args in between:
            getattr(near, method)(*args)
        near.keep(b"k", b"v", token, 0.0, None)
        assert (near.get(b"k", 0.0) == b"v") is kept

    def test_answers_to_one_question_are_all_kept(self):
        """Also of keys that are not told apart by what is heard of them."""
        keys = [b"k", key_beside(b"k", together=True)]
        near = make_cache(entries=8, value=10)
        steps = NearSteps(near, lambda: None).get_many(keys)
        next(steps)
        assert finished(steps, [[b"1", b"2"], -1, -1]) == [b"1", b"2"]
        assert [near.get(key, 0.0) for key in keys] == [b"1", b"2"]

    @pytest.mark.parametrize("changed", [b"1", b"2", None], ids=["this", "a-later-one", "any"])
    def test_a_change_that_a_finalizer_tells_amid_an_answer(self, changed):
        """It runs on this thread, wherever that is, and holds the lock already."""

        class Value(bytes):
            __slots__ = ()

            def __len__(self):
                near.forget([changed]) if changed else near.flush()
                return 1

        near = make_cache(entries=8, value=10)
        answers = [(b"0", b"v"), (b"1", Value(b"v")), (b"2", b"v")]
        near.keep_all([(key, value, near.token(key), None) for key, value in answers], 0.0)
        gone = [changed] if changed else [b"0", b"1", b"2"]
        assert [near.get(key, 0.0) for key in gone] == [None] * len(gone)
        near.flush()
        assert near.used == 0

    def test_nothing_is_kept_while_disabled(self):
        """Not even what was asked for before it was."""
        near = NearCache(10_000)
        keep(near, b"k")
        assert not near.enabled
        assert len(near) == 0

    def test_a_change_in_the_midst_of_enabling_counts(self):
        """A question from before the beginning is answered by a server that did not listen yet."""
        near = NearCache(10_000)
        token = near.token(b"k")
        near.enable()
        near.keep(b"k", b"v", token, 0.0, None)
        assert len(near) == 0

    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
    def test_equal_answers_of_many_readers(self, order):
        """The first is kept, the others agree."""
        near = make_cache()
        tokens = [near.token(b"k") for _ in order]
        for number in order:
            near.keep(b"k", b"v", tokens[number], 0.0, None)
        assert near.get(b"k", 0.0) == b"v"

    @pytest.mark.parametrize("answers", [(b"1", b"2"), (b"2", b"1"), (b"1", None), (None, b"1")])
    def test_answers_that_differ(self, answers):
        """Nobody knows which is the later one: the server is asked again."""
        near = make_cache()
        tokens = [near.token(b"k") for _ in answers]
        for token, answer in zip(tokens, answers, strict=True):
            near.keep(b"k", answer, token, 0.0, None)
        assert near.get(b"k", 0.0) is None
        keep(near, b"k", b"3")
        assert near.get(b"k", 0.0) == b"3"

    def test_readers_who_give_up_leave_nothing(self):
        """However many they are."""
        near = make_cache()
        gc.collect()
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            for number in range(100_000):
                near.token(b"%d" % number)
            taken = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        assert taken < 10_000

    def test_an_entry_that_goes_while_it_is_read_is_a_miss(self):
        """A reader holds no lock."""
        near = make_cache()
        keep(near, b"k")
        entries = near._entries

        class Evicting(type(entries)):
            def get(self, key):
                return entries.pop(key)

        near._entries = Evicting()
        assert near.get(b"k", 0.0) is None


class TestPulse:
    """When a server is taken for lost."""

    def test_it_is_asked_every_so_often(self):
        pulse = Pulse(0.5, 10.0)
        assert pulse.next() == 10.0 + PING_EVERY
        assert not pulse.must_ask(10.0 + PING_EVERY - 0.01)
        assert pulse.must_ask(10.0 + PING_EVERY)
        assert not pulse.must_ask(10.0 + PING_EVERY), "one question at a time"
        pulse.heard(11.2)
        assert pulse.next() == 11.2 + PING_EVERY

    def test_it_is_lost_when_it_does_not_answer_in_time(self):
        pulse = Pulse(0.5, 10.0)
        assert not pulse.is_silent(20.0), "it was not asked"
        assert pulse.must_ask(20.0)
        assert pulse.next() == 20.5
        assert not pulse.is_silent(20.4)
        assert pulse.is_silent(20.5)

    def test_whatever_it_says_is_an_answer(self):
        pulse = Pulse(0.5, 10.0)
        assert pulse.must_ask(20.0)
        pulse.heard(20.4)
        assert not pulse.is_silent(99.0)

    def test_changes_do_not_put_the_question_off(self):
        """A server from which much is heard is asked as often."""
        pulse = Pulse(0.5, 10.0)
        pulse.heard(10.9)
        assert pulse.must_ask(10.0 + PING_EVERY)


KEY, OTHER = KEYS = (b"k", b"other")


class World:
    """A model of a server and of one process near it: values are versions.

    A version is known to the process once a read has returned it, or a write of its own has
    ended. No read that begins later may return an earlier one, and what is near is what the
    server has, unless word of a change is on its way.
    """

    def __init__(self, *, connected=True):
        self.version = 0
        self.values = dict.fromkeys(KEYS)
        self.changed = dict.fromkeys(KEYS, 0)  # at which version each was written or deleted
        self.told = deque()  # what the server said and nobody has heard yet
        self.known = dict.fromkeys(KEYS, 0)
        self.near = NearCache(1024 * 1024)
        self.steps = NearSteps(self.near, lambda: None)
        if connected:
            self.near.enable()
        self.connected = connected

    def change(self, key, *, delete=False):
        self.version += 1
        self.values[key] = None if delete else b"%d" % self.version
        self.changed[key] = self.version
        if self.connected:
            self.told.append(key)

    def serve(self, batch):
        return [self.reply(*command.words) for command in batch.commands]

    def reply(self, verb, *names):
        keys = [name.partition(b":c:")[2] for name in names]
        match verb:
            case b"MGET":
                return [self.values[key] for key in keys]
            case b"PTTL":
                return -2 if self.values[keys[0]] is None else 10**9
            case b"SET":
                return self.change(keys[0])
        raise AssertionError(verb)

    def learn(self, key, version):
        self.known[key] = max(self.known[key], version)

    def check(self, floors, found, versions):
        """Check what a read returned; absent keys were told by the server at these versions."""
        for key, value in found.items():
            version = versions[key] if value is None else int(value)
            assert version >= floors[key], "a read went back"
            self.learn(key, version)

    def look(self):
        """Check what is near now."""
        for key in KEYS:
            value = self.near.get(key, 0.0)
            if value is not None:
                assert key in self.told or value == self.values[key], "it is stale"
                self.check(self.known, {key: value}, {})


def finished(steps, replies):
    """Return the result of an operation that needs no more than these replies."""
    try:
        steps.send(replies)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it asks for more")


# What goes on at once. Each of these does one step up to every `yield`.


def reader(world, keys, end="answer"):
    floors = dict(world.known)
    steps = world.steps.get_many(keys)
    try:
        batch = next(steps)
    except StopIteration as stop:
        world.check(floors, dict(zip(keys, stop.value, strict=True)), {})
        return
    yield
    replies, versions = world.serve(batch), dict(world.changed)
    yield
    if end == "abandon":
        steps.close()
        return
    found = finished(steps, replies)
    world.check(floors, dict(zip(keys, found, strict=True)), versions)


def writer(world, end="answer"):
    steps = world.steps.put(KEY, b"", None)
    batch = next(steps)
    yield
    replies, version = world.serve(batch), world.version
    yield
    if end == "abandon":
        steps.close()
    else:
        finished(steps, replies)
    world.learn(KEY, version)


def stranger(world, *, delete=False):
    world.change(KEY, delete=delete)
    yield
    if world.told:
        world.near.forget([world.told.popleft()])


def connection(world):
    """Be lost and made anew: the server speaks before the cache is enabled."""
    world.connected = False
    world.told.clear()
    world.near.disable()
    yield
    yield from first_connection(world)


def first_connection(world):
    world.connected = True
    yield
    world.near.enable()


def orders(lengths):
    """Return every order in which actors with so many steps can take turns."""
    if not any(lengths):
        yield ()
    for actor, left in enumerate(lengths):
        if left:
            rest = (*lengths[:actor], left - 1, *lengths[actor + 1 :])
            yield from ((actor, *order) for order in orders(rest))


READ, READ_BOTH, GIVE_UP = (
    (3, partial(reader, keys=(KEY,))),
    (3, partial(reader, keys=KEYS)),
    (3, partial(reader, keys=(KEY,), end="abandon")),
)
WRITE, WRITE_UNTOLD = (3, writer), (3, partial(writer, end="abandon"))
CHANGE, DELETE = (2, stranger), (2, partial(stranger, delete=True))
LOSE, CONNECT = (3, connection), (2, first_connection)


@pytest.mark.parametrize(
    "actors",
    [
        pytest.param([READ, READ, CHANGE, CHANGE], id="readers-and-changes"),
        pytest.param([READ, READ, DELETE, CHANGE], id="readers-and-a-deletion"),
        pytest.param([READ, READ_BOTH, CHANGE, CHANGE], id="reader-of-many"),
        pytest.param([READ, GIVE_UP, CHANGE, CHANGE], id="reader-who-gives-up"),
        pytest.param([READ, READ, WRITE], id="readers-and-a-writer"),
        pytest.param([READ, READ, WRITE_UNTOLD], id="writer-who-gives-up"),
        pytest.param([READ, WRITE, WRITE], id="writers"),
        pytest.param([READ, WRITE, CHANGE], id="writer-and-a-change"),
        pytest.param([READ, WRITE_UNTOLD, CHANGE], id="writer-who-gives-up-and-a-change"),
        pytest.param([READ, READ, LOSE], id="readers-and-a-loss"),
        pytest.param([READ, CHANGE, LOSE], id="change-and-a-loss"),
        pytest.param([CONNECT, READ, READ, CHANGE], id="beginning"),
        pytest.param([CONNECT, READ, WRITE], id="beginning-with-a-writer"),
    ],
)
def test_every_order_of_events(actors):
    """Nobody goes back, every write of one's own is seen, and no entry is stale for long."""
    lengths, actors = zip(*actors, strict=True)
    for order in orders(lengths):
        world = World(connected=(2, first_connection) not in zip(lengths, actors, strict=True))
        world.change(KEY)
        world.change(OTHER)
        world.told.clear()
        running = [actor(world) for actor in actors]
        try:
            for actor in order:
                next(running[actor], None)
                world.look()
            world.near.forget(world.told)
            world.told.clear()
            world.look()
        except AssertionError:
            print("order of turns:", order)
            raise
        finally:
            for actor in running:
                actor.close()
