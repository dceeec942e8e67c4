"""A backend that fails where a test says so; and what a store, locks and messages do then."""

from __future__ import annotations

import asyncio
import select
import threading
import time

import pytest
from redis_servers import wait_until

from hornbeam_state import (
    MISSING,
    DeadlineExceeded,
    LockTimeout,
    Store,
    StoreConfig,
    StoreFull,
    StoreUnavailable,
    WrongType,
)
from hornbeam_state.backends.base import SPACES, Topics
from hornbeam_state.backends.embedded.backend import EmbeddedBackend
from hornbeam_state.testing import FaultyBackend

PATIENCE = 10.0


@pytest.fixture
def backend():
    return EmbeddedBackend(StoreConfig.from_url("memory://"))


@pytest.fixture
def faulty(backend):
    faulty = FaultyBackend(backend)
    yield faulty
    faulty.close()


@pytest.fixture
def store(faulty):
    return Store(StoreConfig.from_url("memory://"), backend=faulty)


@pytest.fixture(params=["sync", "async"])
def call(request):
    """Call a method of a store, or await its twin."""

    async def awaited(store, method, *args, **options):
        return await getattr(store, "a" + method)(*args, **options)

    def call(store, method, *args, **options):
        if request.param == "sync":
            return getattr(store, method)(*args, **options)
        return asyncio.run(awaited(store, method, *args, **options))

    return call


def outcome(work, *args, **options):
    """Return what it returns, or the type of what it raises."""
    try:
        return work(*args, **options)
    except Exception as error:
        return type(error)


def in_thread(work, *args) -> threading.Thread:
    thread = threading.Thread(target=work, args=args)
    thread.start()
    return thread


# Which calls are struck.


def test_a_call_fails_before_anything_is_done(faulty, store, call):
    """The caller is told, and nothing has changed."""
    fault = faulty.before("put").fail()
    with pytest.raises(StoreUnavailable, match="nothing was done"):
        call(store, "set", "k", 1)
    assert store.get("k") is None
    fault.end()
    fault.end()
    call(store, "set", "k", 1)
    assert store.get("k") == 1


def test_a_call_fails_after_it_was_done(faulty, store, call):
    """As when the answer of a server is lost."""
    faulty.after("put").fail()
    with pytest.raises(StoreUnavailable, match="outcome is unknown"):
        call(store, "set", "k", 1)
    assert store.get("k") == 1


def test_an_error_of_ones_choice(faulty, store, call):
    """Any that is made of a message; each caller gets its own."""
    faulty.before("add").fail(StoreFull)
    assert outcome(call, store, "add", "k", 1) is StoreFull
    faulty.before("get").fail(lambda message: WrongType(message + "!"))
    with pytest.raises(WrongType, match="done!") as one:
        call(store, "get", "k")
    with pytest.raises(WrongType) as other:
        call(store, "get", "k")
    assert one.value is not other.value


@pytest.mark.parametrize(
    ("nth", "struck"),
    [
        pytest.param(None, "12345", id="all"),
        pytest.param(2, "2", id="second"),
        pytest.param({1, 4}, "14", id="some"),
        pytest.param(range(3, 99), "345", id="from the third on"),
    ],
)
def test_calls_are_chosen_by_number(faulty, store, call, nth, struck):
    """Of those that match, from when the fault was made."""
    call(store, "incr", "n")
    faulty.before("incr", nth=nth).fail()
    for number in "12345":
        call(store, "get", "n")
        failed = outcome(call, store, "incr", "n") is StoreUnavailable
        assert failed == (number in struck)
    assert store.get("n") == 6 - len(struck)


def test_calls_are_chosen_by_key_space(faulty, store, call):
    """An operation of another space, or of none, goes through."""
    faulty.before(space="cache").fail()
    for space in SPACES:
        failed = outcome(call, store.space(space), "set", "k", 1) is StoreUnavailable
        assert failed == (space == "cache")
    with store.lock("name", timeout=0):
        pass


def test_calls_are_chosen_by_what_they_are_about(faulty, store, call):
    """A predicate sees the names of keys, locks and topics."""
    faulty.before(when=lambda call: any(b"bad" in name for name in call.names)).fail()
    for method, good, bad in [
        ("get", ("good",), ("bad",)),
        ("set_multi", ({"good": 1},), ({"good": 1, "bad": 1},)),
        ("get_multi", (["good", "fine"],), (["good", "bad"],)),
        ("keys", ("good",), ("bad",)),
        ("clear", (), ("bad",)),
        ("publish", ("good", 1), ("bad", 1)),
    ]:
        assert outcome(call, store, method, *good) is not StoreUnavailable
        assert outcome(call, store, method, *bad) is StoreUnavailable
    assert outcome(store.lock("bad").__enter__) is StoreUnavailable


def test_a_predicate_may_be_a_script(faulty, store, call):
    """One answer for each call."""
    script = iter([False, True, True, False])
    faulty.after("incr", when=lambda _: next(script)).fail()
    outcomes = [outcome(call, store, "incr", "n") for _ in range(4)]
    assert outcomes == [1, StoreUnavailable, StoreUnavailable, 4]


def test_faults_strike_in_the_order_in_which_they_were_made(faulty, store, call):
    """Each counts for itself, whatever the others do."""
    faulty.before("get", nth={1, 2}).fail(StoreFull)
    faulty.before("get", nth={2, 3}).fail(StoreUnavailable)
    outcomes = [outcome(call, store, "get", "k") for _ in range(4)]
    assert outcomes == [StoreFull, StoreFull, StoreUnavailable, None]


@pytest.mark.parametrize("name", ["set", "aput", "", "close"])
def test_a_name_that_is_no_operation_is_refused(faulty, name):
    """A fault that never strikes would make a test pass that tests nothing."""
    with pytest.raises(ValueError, match="get_many"):
        faulty.before("get", name)
    with pytest.raises(ValueError, match="get_many"):
        faulty.after(name)
    with pytest.raises(ValueError, match="get_many"):
        faulty.count(name)


def test_an_error_of_the_work_itself_comes_out(faulty, store, call):
    """What failed by itself was not done: nothing strikes after it."""
    store.set("k", "text")
    faulty.after("incr").fail()
    assert outcome(call, store, "incr", "k") is WrongType


def test_arguments_may_be_given_by_name(faulty):
    """The names are found all the same."""
    space = faulty.keyspace("app")
    space.put(value=b"v", key=b"k", ttl=5)
    assert space.get(key=b"k") == b"v"
    assert asyncio.run(space.aget(key=b"k")) == b"v"
    assert [call.names for call in faulty.calls] == [(b"k",)] * 3


def test_calls_are_recorded(faulty, store, call):
    """In order, failed ones too, by the name of the sync method, and without values."""
    faulty.before("delete").fail()
    call(store, "set", "k", 1)
    call(store.space("sys"), "get_multi", ["a", "b"])
    outcome(call, store, "delete", "k")
    call(store, "keys")
    call(store, "publish", "t", 1)
    with store.lock("name"):
        pass
    assert [tuple(one) for one in faulty.calls] == [
        ("put", "app", (b"k",)),
        ("get_many", "sys", (b"a", b"b")),
        ("delete", "app", (b"k",)),
        ("keys", "app", (b"",)),
        ("publish", None, (b"app:t",)),
        ("try_lock", None, (b"app:name",)),
        ("release", None, (b"app:name",)),
    ]
    assert faulty.count() == 7
    assert faulty.count("put", "keys") == 2
    assert faulty.count("put", space="sys") == 0
    faulty.calls.clear()
    assert faulty.count() == 0


def test_calls_of_threads_are_all_counted(faulty, store):
    """Of a hundred, by four threads, every tenth fails."""
    faulty.before("incr", nth=range(10, 101, 10)).fail()
    threads = [in_thread(lambda: [outcome(store.incr, "n") for _ in range(25)]) for _ in range(4)]
    for thread in threads:
        thread.join(PATIENCE)
    assert faulty.count("incr") == 100
    assert store.get("n") == 90


# What happens to them.


def test_a_delayed_call_takes_longer(faulty, store, call):
    """Before it or after it."""
    for where in (faulty.before("get"), faulty.after("get")):
        with where.delay(0.05):
            start = time.monotonic()
            call(store, "get", "k")
            assert time.monotonic() - start >= 0.05


async def test_a_delay_does_not_block_the_loop(faulty, store):
    """Nor does the task that waits resist being cancelled."""
    faulty.before("get").delay(60)
    waiting = asyncio.create_task(store.aget("k"))
    await until(lambda: faulty.calls)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


def test_a_held_call_waits_for_the_test(faulty, store, call):
    """And then goes on as if nothing had been."""
    with faulty.before("put").hold() as hold:
        thread = in_thread(call, store, "set", "k", 1)
        hold.reached()
        assert store.get("k") is None
    thread.join(PATIENCE)
    assert store.get("k") == 1


def test_an_answer_may_be_held(faulty, store, call):
    """Others see what was done before its caller does."""
    with faulty.after("put").hold() as hold:
        thread = in_thread(call, store, "set", "k", 1)
        hold.reached()
        assert store.get("k") == 1
        assert thread.is_alive()
    thread.join(PATIENCE)


async def test_a_task_may_be_held_and_cancelled(faulty, store):
    """The loop goes on, and a hold that is ended by `heal` lets go of the others."""
    hold = faulty.before("put").hold()
    cancelled = asyncio.create_task(store.aset("cancelled", 1))
    other = asyncio.create_task(store.aset("other", 1))
    await hold.areached()
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    faulty.heal()
    await asyncio.wait_for(other, PATIENCE)
    assert await store.aget_multi(["cancelled", "other"]) == {"cancelled": None, "other": 1}


def test_no_hold_lasts_for_ever(faulty, store, call):
    """A test that forgets to end it, or waits for a call in vain, is told."""
    hold = faulty.before("get").hold(patience=0.02)
    with pytest.raises(TimeoutError, match="no call came"):
        hold.reached()
    with pytest.raises(TimeoutError, match="no call came"):
        asyncio.run(hold.areached())
    with pytest.raises(TimeoutError, match="end the hold"):
        call(store, "get", "k")


def test_an_outage_is_switched_on_and_off(faulty, store, call):
    """Everything fails before it is done, and then nothing does any more."""
    lock = store.lock("name", timeout=0)
    attempts = [
        *[(method, "k") for method in ("get", "delete", "incr", "decr", "ttl", "keys", "clear")],
        *[(method, "k", 1) for method in ("set", "add", "publish")],
        *[("cas", "k", MISSING, 1), ("update", "k", str), ("get_multi", ["k"])],
        ("set_multi", {"k": 1}),
        ("check",),
    ]
    with faulty.outage():
        for method, *args in attempts:
            assert outcome(call, store, method, *args) is StoreUnavailable, method
        assert outcome(lock.__enter__) is StoreUnavailable
        assert outcome(store.subscribe, "t") is StoreUnavailable
    assert call(store, "keys") == []
    assert call(store, "incr", "k") == 1
    with lock:
        pass


def test_faults_outlive_closing(faulty, store, call):
    """An app that closes and opens its store anew meets the same outage."""
    store.set("k", 1)
    with faulty.outage():
        call(store, "close")
        assert outcome(call, store, "get", "k") is StoreUnavailable
    assert call(store, "get", "other") is None


# What a store makes of it.


def test_a_cas_whose_answer_is_lost_may_be_in(faulty, store, call):
    """The caller is told that nobody knows; a second one finds what the first has done."""
    store.set("k", "old")
    faulty.after("cas", nth=1).fail()
    with pytest.raises(StoreUnavailable, match="unknown"):
        call(store, "cas", "k", "old", "new")
    assert store.get("k") == "new"
    assert call(store, "cas", "k", "old", "new") is False
    assert call(store, "cas", "k", "new", "newer") is True


def test_a_cas_against_absence_whose_answer_is_lost_may_be_in(faulty, store, call):
    """So whoever claims a name once more sees it taken, by itself."""
    faulty.after("add", nth=1).fail()
    assert outcome(call, store, "cas", "owner", MISSING, "me") is StoreUnavailable
    assert call(store, "cas", "owner", MISSING, "me") is False
    assert store.get("owner") == "me"


def test_a_cas_that_fails_while_it_compares_stored_nothing(faulty, store, call):
    """Equal values of other bytes take a second look, which may fail as well."""
    store.set("k", {"a": 1, "b": 2})
    faulty.before("get", nth=1).fail()
    assert outcome(call, store, "cas", "k", {"b": 2, "a": 1}, "new") is StoreUnavailable
    assert store.get("k") == {"a": 1, "b": 2}
    assert call(store, "cas", "k", {"b": 2, "a": 1}, "new") is True


def test_an_update_whose_answer_is_lost_is_done_once(faulty, store, call):
    """It is not tried again by itself: that would count twice."""
    seen = []

    def add_one(old):
        seen.append(old)
        return old + 1

    faulty.after("cas", nth=1).fail()
    assert outcome(call, store, "update", "n", add_one, 0) is StoreUnavailable
    assert (store.get("n"), seen) == (1, [0])
    assert call(store, "update", "n", add_one, 0) == 2


@pytest.mark.parametrize("operation", ["get", "cas"])
def test_an_update_that_fails_before_it_writes_changes_nothing(faulty, store, call, operation):
    """Whichever of its two steps it is."""
    store.set("n", 1, ttl=100)
    faulty.before(operation, nth=1).fail()
    assert outcome(call, store, "update", "n", str) is StoreUnavailable
    assert store.get("n") == 1
    assert store.ttl("n") is not None


def test_an_update_tries_again_when_others_come_between(faulty, store, call):
    """Held between reading and writing, it sees what was written meanwhile."""
    results = []
    with faulty.before("cas", nth=1).hold() as hold:
        thread = in_thread(
            lambda: results.append(call(store, "update", "n", lambda old: old + 1, 0))
        )
        hold.reached()
        store.set("n", 10)
    thread.join(PATIENCE)
    assert results == [11]
    assert faulty.count("cas") == 2


def test_an_increment_whose_answer_is_lost_is_in(faulty, store, call):
    """Nothing repeats it, so it counts once."""
    faulty.after("incr", nth=2).fail()
    outcomes = [outcome(call, store, "incr", "n") for _ in range(3)]
    assert outcomes == [1, StoreUnavailable, 3]


# Locks.


def test_a_lock_whose_release_fails_stays_taken(faulty, store):
    """Leaving raises; others wait until it expires, and the same object can enter again then."""
    lock = store.lock("name", timeout=0)
    faulty.before("release", nth=1).fail()
    with pytest.raises(StoreUnavailable), lock:
        pass
    assert outcome(lock.__enter__) is LockTimeout
    faulty.heal()
    with lock:
        assert outcome(store.lock("name", timeout=0).__enter__) is LockTimeout


async def test_an_awaited_lock_whose_release_fails_stays_taken(faulty, store):
    """As without awaiting; closing frees it too."""
    lock = store.lock("name", timeout=0)
    faulty.before("release", nth=1).fail()
    with pytest.raises(StoreUnavailable):
        async with lock:
            pass
    with pytest.raises(LockTimeout):
        async with lock:
            pass
    await store.aclose()
    async with lock:
        pass


def test_a_lock_whose_release_is_not_confirmed_is_free(faulty, store):
    """It was done, and only the answer is missing."""
    faulty.after("release", nth=1).fail()
    with pytest.raises(StoreUnavailable), store.lock("name"):
        pass
    with store.lock("name", timeout=0):
        pass


def test_an_error_inside_a_lock_is_not_lost_when_its_release_fails(faulty, store):
    """It is the context of what comes out."""
    faulty.before("release").fail()
    with pytest.raises(StoreUnavailable) as caught, store.lock("name"):
        raise ZeroDivisionError
    assert isinstance(caught.value.__context__, ZeroDivisionError)


@pytest.mark.parametrize("awaited", [False, True], ids=["sync", "async"])
def test_a_lock_that_the_caller_was_not_told_of_is_taken(faulty, store, awaited):
    """Nobody gets it before it expires, and the caller has nothing to leave."""
    lock = store.lock("name", timeout=0)
    faulty.after("try_lock", nth=1).fail()
    with pytest.raises(StoreUnavailable):
        asyncio.run(lock.__aenter__()) if awaited else lock.__enter__()
    with pytest.raises(RuntimeError, match="not held"):
        lock.__exit__(None, None, None)
    assert outcome(lock.__enter__) is LockTimeout
    faulty.heal()
    with lock:
        pass


def test_a_wait_for_a_lock_ends_with_the_store(faulty, store):
    """Who waits while the store goes out is told, and not at its timeout."""
    errors = []
    with store.lock("name"):
        waiting = in_thread(lambda: errors.append(outcome(store.lock("name").__enter__)))
        wait_until(lambda: faulty.count("try_lock") >= 3, "somebody waits")
        with faulty.outage():
            waiting.join(PATIENCE)
    assert errors == [StoreUnavailable]


# Messages.


def test_a_message_that_fails_is_not_sent(faulty, store, call):
    """Before; and after, it was."""
    with store.subscribe("t") as subscription:
        faulty.before("publish", nth=1).fail()
        faulty.after("publish", nth=1).fail()
        assert outcome(call, store, "publish", "t", "before") is StoreUnavailable
        assert outcome(call, store, "publish", "t", "after") is StoreUnavailable
        assert call(store, "publish", "t", "then") == 1
        assert [subscription.get(PATIENCE).data for _ in range(2)] == ["after", "then"]
        assert outcome(subscription.get, 0.01) is DeadlineExceeded


def test_a_subscription_that_fails_receives_nothing(faulty, store):
    """Not before; and after, it was ended again. Trying once more works."""
    subscription = store.asubscribe("t")
    faulty.before("subscribe", nth=1).fail()
    faulty.after("subscribe", nth=1).fail()
    for _ in range(2):
        assert outcome(subscription.open) is StoreUnavailable
        assert store.publish("t", "unheard") == 0
    with subscription.open():
        assert store.publish("t", "heard") == 1
        assert subscription.get(PATIENCE).data == "heard"


async def test_an_awaited_subscription_that_fails_receives_nothing(faulty, store):
    """As without awaiting."""
    subscription = store.asubscribe("t")
    faulty.after("subscribe", nth=1).fail()
    with pytest.raises(StoreUnavailable):
        await subscription
    assert await store.apublish("t", "unheard") == 0
    async with subscription:
        assert await store.apublish("t", "heard") == 1


def test_an_inbox_that_fails_once_goes_on(faulty, store):
    """No message is lost, and the subscription stays."""
    with store.subscribe("t") as subscription:
        store.publish("t", 1)
        faulty.before("take", nth=1).fail()
        assert outcome(subscription.get, PATIENCE) is StoreUnavailable
        assert subscription.get(PATIENCE).data == 1
        store.publish("t", 2)
        assert next(subscription).data == 2


def test_who_waits_for_a_message_hears_of_an_outage(backend, faulty, store):
    """Once for each; then it waits on, also for what others publish meanwhile."""
    heard = []

    def listen(subscription) -> None:
        while "end" not in heard:
            message = outcome(subscription.get, PATIENCE)
            heard.append(message if isinstance(message, type) else message.data)

    def hears(times) -> bool:
        return heard.count(StoreUnavailable) == times

    with store.subscribe("t") as subscription:
        listener = in_thread(listen, subscription)
        wait_until(lambda: faulty.count("take"), "somebody waits")
        for number in range(1, 3):
            with faulty.outage():
                wait_until(lambda number=number: hears(number), "it hears of it")
        others = Store(store.config, backend=backend)
        with faulty.outage():
            wait_until(lambda: hears(3), "it hears of it")
            others.publish("t", "from elsewhere")
            wait_until(lambda: "from elsewhere" in heard, "the message comes")
        store.publish("t", "end")
        listener.join(PATIENCE)
    assert heard == [StoreUnavailable] * 3 + ["from elsewhere", "end"]


async def test_a_task_that_waits_for_a_message_hears_of_an_outage(faulty, store):
    """As a thread does."""
    async with store.asubscribe("t") as subscription:
        waiting = asyncio.create_task(subscription.aget(PATIENCE))
        await until(lambda: faulty.count("take"))
        with faulty.outage():
            with pytest.raises(StoreUnavailable):
                await waiting
            again = asyncio.create_task(subscription.aget(PATIENCE))
            await asyncio.sleep(0.01)
        await store.apublish("t", 1)
        assert (await again).data == 1


def test_an_inbox_ends_with_its_subscription(faulty):
    """Its descriptor is valid as long as it is there, and readable once it is closed."""
    inbox = faulty.subscribe(Topics((b"t",), ()), 10)
    inbox.close()
    assert inbox.take() is None
    poller = select.poll()
    poller.register(inbox.fileno(), select.POLLIN)
    assert poller.poll(0)


async def until(condition) -> None:
    await asyncio.to_thread(wait_until, condition, "a call came")
