"""Subscriptions over every store that passes messages on: waiting, sharing, ending, being wrong."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import signal
import threading
import time
import warnings

import pytest

import hornbeam_state
from hornbeam_state import (
    CodecError,
    DeadlineExceeded,
    KeyTooLong,
    Message,
    StoreUnavailable,
    Subscription,
    open_store,
    set_default_store,
)

PATIENCE = 30.0
"""Seconds that a test waits for what comes in milliseconds."""


@pytest.fixture(params=["embedded", "memory"])
def url(request, tmp_path):
    """Where the store is; a store over anything else that passes messages on may join."""
    return {"embedded": f"lmdb://{tmp_path}/store", "memory": "memory://"}[request.param]


@pytest.fixture
def store(url):
    store = open_store(url, timeout=10)
    yield store
    store.close()


@pytest.fixture
def subscribe(store):
    """Return what subscribes; it is closed at the end."""
    made = []

    def make(*topics, **options) -> Subscription:
        made.append(store.subscribe(*topics, **options))
        return made[-1]

    yield make
    for subscription in made:
        subscription.close()


@contextlib.contextmanager
def in_threads(number, work):
    """Run `work` in so many threads for a block; supply what comes of each, exceptions too."""
    outcomes = [None] * number

    def run(index):
        try:
            outcomes[index] = work()
        except BaseException as error:
            outcomes[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(number)]
    for thread in threads:
        thread.start()
    yield outcomes
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# Getting.


@pytest.mark.parametrize(
    "value",
    [None, 0, "text", b"\x00" * 20_000, {"a": [1, (2.5, {"b"})]}, ["x" * 300_000]],
    ids=["none", "int", "str", "20-KB", "nested", "300-KB"],
)
def test_a_message_comes_as_it_was_sent(store, subscribe, value):
    """Type and all, with the topic it was sent on."""
    with subscribe("jobs/é") as subscription:
        assert store.publish("jobs/é", value) == 1
        message = subscription.get(PATIENCE)
    assert isinstance(message, Message)
    assert message == ("jobs/é", value)
    assert type(message.data) is type(value)


async def test_a_message_comes_to_a_task(store):
    """By awaiting, entering or iterating over what `asubscribe` returns."""
    awaited = await store.asubscribe("t")
    entered = store.asubscribe("t")
    async with entered as same:
        assert same is entered
        assert await store.apublish("t", 1) == 2
        assert await awaited.aget(PATIENCE) == ("t", 1)
        assert await entered.aget(PATIENCE) == ("t", 1)
    assert await store.apublish("t", 2) == 1
    await awaited.aclose()
    assert await store.apublish("t", 3) == 0


async def test_a_subscription_begins_when_it_is_iterated_over(store):
    """Not before: nobody is subscribed until then."""
    subscription = store.asubscribe("t")
    assert store.publish("t", "early") == 0
    following = asyncio.ensure_future(anext(subscription))
    await asyncio.to_thread(wait_until, lambda: store.publish("t", "late"))
    assert await asyncio.wait_for(following, PATIENCE) == ("t", "late")
    await subscription.aclose()


def test_waiting_in_vain_ends_in_time(subscribe):
    """`DeadlineExceeded`, also a `TimeoutError`, which names the time."""
    subscription = subscribe("t")
    for timeout in (0, 0.05):
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=rf"within {timeout} s") as caught:
            subscription.get(timeout)
        assert isinstance(caught.value, TimeoutError)
        assert timeout <= time.monotonic() - start < PATIENCE


async def test_a_task_that_waits_in_vain_ends_in_time(store):
    """As a thread does; its own cancellation is something else."""
    async with store.asubscribe("t") as subscription:
        for timeout in (0, 0.05):
            with pytest.raises(DeadlineExceeded, match=rf"within {timeout} s"):
                await subscription.aget(timeout)
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.05):
                await subscription.aget()
        assert not isinstance(caught.value, DeadlineExceeded)


def test_what_is_there_comes_without_any_time(store, subscribe):
    """A timeout of nothing means: only if it is there."""
    subscription = subscribe("t")
    store.publish("t", 1)
    assert subscription.get(0) == ("t", 1)
    store.publish("t", 2)
    assert asyncio.run(subscription.aget(0)) == ("t", 2)


def test_one_waits_as_long_as_one_likes(store, subscribe):
    """Also longer than the kernel would."""
    subscription = subscribe("t")
    for timeout in (1e9, math.inf, None):
        with in_threads(1, lambda timeout=timeout: subscription.get(timeout)) as outcomes:
            time.sleep(0.02)
            store.publish("t", 1)
        assert outcomes == [("t", 1)]


@pytest.mark.parametrize(
    ("timeout", "error"),
    [(-1, ValueError), (math.nan, ValueError), ("1", TypeError), (True, TypeError)],
)
def test_a_timeout_that_makes_no_sense_is_refused(subscribe, timeout, error):
    """At once."""
    subscription = subscribe("t")
    with pytest.raises(error, match="timeout"):
        subscription.get(timeout)
    with pytest.raises(error, match="timeout"):
        asyncio.run(subscription.aget(timeout))


# Ending.


def test_a_loop_over_a_subscription_ends_when_it_is_closed(store, subscribe):
    """From another thread; what came until then was handed out."""
    subscription = subscribe("t")
    got = []

    def follow():
        for message in subscription:
            got.append(message.data)
        return "ended"

    with in_threads(1, follow) as outcomes:
        for number in range(50):
            store.publish("t", number)
        wait_until(lambda: len(got) == 50)
        subscription.close()
    assert outcomes == ["ended"]
    assert got == list(range(50))


@pytest.mark.parametrize("where", ["loop", "thread"])
async def test_a_loop_of_a_task_ends_when_the_subscription_is_closed(store, where):
    """By another task or by a thread."""
    subscription = await store.asubscribe("t")
    got = []

    async def follow():
        async for message in subscription:
            got.append(message.data)

    following = asyncio.create_task(follow())
    for number in range(5):
        await store.apublish("t", number)
    await asyncio.to_thread(wait_until, lambda: len(got) == 5)
    if where == "loop":
        await subscription.aclose()
    else:
        await asyncio.to_thread(subscription.close)
    await asyncio.wait_for(following, PATIENCE)
    assert got == list(range(5))


@pytest.mark.parametrize("end", ["subscription", "store"])
def test_closing_wakes_who_waits(store, subscribe, end):
    """Threads and tasks alike are told that the subscription is closed, and so are later calls."""
    subscription = subscribe("t")

    def get():
        return subscription.get()

    def aget():
        return asyncio.run(subscription.aget())

    with in_threads(3, get) as of_threads, in_threads(2, aget) as of_tasks:
        time.sleep(0.05)
        (subscription if end == "subscription" else store).close()
    for outcome in of_threads + of_tasks:
        assert isinstance(outcome, RuntimeError)
        assert "closed" in str(outcome)
    with pytest.raises(RuntimeError, match="closed"):
        subscription.get(0)
    with pytest.raises(RuntimeError, match="closed"):
        subscription.open()
    assert list(subscription) == []
    subscription.close()


def test_a_closed_store_takes_new_subscriptions(store, subscribe):
    """It opens again."""
    subscribe("t")
    store.close()
    again = subscribe("t")
    assert store.publish("t", 1) == 1
    assert again.get(PATIENCE) == ("t", 1)


def test_a_subscription_can_be_closed_before_it_begins(store):
    """Then it never does."""
    subscription = store.asubscribe("t")
    subscription.close()
    with pytest.raises(RuntimeError, match="closed"):
        subscription.get(0)
    assert store.publish("t", 1) == 0


def test_leaving_the_block_unsubscribes(store):
    """Also by an exception."""

    def fail():
        with store.subscribe("t"):
            assert store.publish("t", 1) == 1
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert store.publish("t", 1) == 0


def test_a_forgotten_subscription_is_no_subscriber(store):
    """One that was collected is closed, without a warning."""
    store.subscribe("t")
    assert store.publish("t", 1) == 0


# Sharing.


def test_threads_share_a_subscription(store, subscribe):
    """Each message goes to one of them, in order for each, and none is lost."""
    subscription = subscribe("t", maxsize=3000)
    got = []

    def collect():
        mine = []
        for message in subscription:
            mine.append(message.data)
            got.append(message.data)
        return mine

    with in_threads(8, collect) as outcomes:
        for number in range(2000):
            assert store.publish("t", number) == 1
        wait_until(lambda: len(got) == 2000)
        subscription.close()
    assert sorted(got) == list(range(2000))
    assert all(mine == sorted(mine) for mine in outcomes)
    assert subscription.dropped == 0


async def test_tasks_and_threads_share_a_subscription(store):
    """Of two loops, too; each message goes to one of them."""
    subscription = await store.asubscribe("t", maxsize=3000)
    got = []

    async def collect():
        async for message in subscription:
            got.append(message.data)

    def collect_in_thread():
        for message in subscription:
            got.append(message.data)

    tasks = [asyncio.create_task(collect()) for _ in range(5)]
    with in_threads(2, collect_in_thread), in_threads(2, lambda: asyncio.run(collect())):
        for number in range(1000):
            assert await store.apublish("t", number) == 1
        await asyncio.to_thread(wait_until, lambda: len(got) == 1000)
        subscription.close()
        await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)
    assert sorted(got) == list(range(1000))


async def test_a_message_wakes_one_of_many_who_wait_at_once(store):
    """Forty messages for forty tasks that each take one."""
    subscription = await store.asubscribe("t")
    waiting = [asyncio.create_task(subscription.aget(PATIENCE)) for _ in range(40)]
    await asyncio.sleep(0.01)
    for number in range(40):
        await store.apublish("t", number)
    messages = await asyncio.gather(*waiting)
    assert sorted(message.data for message in messages) == list(range(40))
    await subscription.aclose()


async def test_cancelled_waits_lose_no_message(store):
    """A storm of cancellations and timeouts, at any moment of a wait."""
    numbers = random.Random(1)
    subscription = await store.asubscribe("t", maxsize=1000)
    got = []

    async def take(timeout):
        message = await subscription.aget(timeout)
        got.append(message.data)  # no await between: a task that got one is not cancelled

    tasks = []
    for number in range(300):
        tasks += [asyncio.create_task(take(numbers.choice([None, 0.0005]))) for _ in range(3)]
        await asyncio.sleep(numbers.choice([0, 0, 0.0005]))
        publishing = asyncio.create_task(store.apublish("t", number))
        for task in numbers.sample(tasks[-6:], 2):
            task.cancel()
        assert await publishing == 1
    for task in tasks:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    kinds = {type(outcome) for outcome in outcomes}
    assert kinds <= {type(None), asyncio.CancelledError, DeadlineExceeded}
    while len(got) < 300:
        await take(PATIENCE)
    assert got == list(range(300))
    await subscription.aclose()


async def test_others_run_while_a_task_takes_what_is_there(store):
    """A loop over many waiting messages lets other tasks in between."""
    subscription = await store.asubscribe("t")
    for number in range(500):
        await store.apublish("t", number)
    turns = 0

    async def count():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    for _ in range(500):
        await subscription.aget(0)
    counting.cancel()
    assert turns > 10
    await subscription.aclose()


# Processes.


@pytest.mark.parametrize("how", ["get", "aget", "open", "iterate"])
def test_a_child_cannot_use_its_parents_subscription(store, subscribe, how):
    """It is told to subscribe itself; to the parent nothing happens."""
    subscription = subscribe("t")
    store.publish("t", 1)
    calls = {
        "get": lambda: subscription.get(0),
        "aget": lambda: asyncio.run(subscription.aget(0)),
        "open": subscription.open,
        "iterate": lambda: next(iter(subscription)),
    }

    def use():
        with pytest.raises(RuntimeError, match="parent"):
            calls[how]()
        subscription.close()

    in_child(use)
    assert subscription.get(PATIENCE) == ("t", 1)
    assert store.publish("t", 2) == 1
    assert subscription.get(PATIENCE) == ("t", 2)


def test_a_child_subscribes_and_publishes(store, subscribe):
    """Through the store that it inherited, both ways."""
    answers = subscribe("answers")

    def serve():
        with store.subscribe("questions") as questions:
            store.publish("answers", "ready")
            store.publish("answers", questions.get(PATIENCE).data * 2)

    child = start_child(serve)
    assert answers.get(PATIENCE).data == "ready"
    assert store.publish("questions", 21) == 1
    assert answers.get(PATIENCE).data == 42
    end_child(child)
    assert store.publish("questions", 0) == 0


def start_child(work):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: "may lead to deadlocks"
        child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, PATIENCE)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def end_child(child):
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def in_child(work):
    end_child(start_child(work))


# Topics.


@pytest.mark.parametrize(
    ("asked", "topic", "comes"),
    [
        (["a"], "a", True),
        (["a"], "ab", False),
        (["a*"], "a", True),
        (["a*"], "abc", True),
        (["a*"], "b", False),
        (["*"], "anything", True),
        (["a*b"], "a*b", True),
        (["a*b"], "axb", False),
        (["a**"], "a*x", True),
        (["a**"], "ax", False),
        (["[ab]?"], "[ab]?", True),
        (["[ab]?"], "ax", False),
        (["x", "y"], "y", True),
        (["\u00e9*"], "\u00e9t\u00e9", True),
        (["k" * 4096], "k" * 4096, True),
    ],
)
def test_a_star_at_the_end_stands_for_anything(store, subscribe, asked, topic, comes):
    """Elsewhere it is a star, and no other sign means more than itself."""
    subscription = subscribe(*asked)
    assert store.publish(topic, 1) == comes
    if comes:
        assert subscription.get(PATIENCE) == (topic, 1)
    with pytest.raises(DeadlineExceeded):
        subscription.get(0)


def test_overlapping_topics_deliver_once(store, subscribe):
    """However often a topic is asked for."""
    subscription = subscribe("a", "a", "a*", "ab*", "*")
    for topic in ("a", "ab", "abc", "b"):
        assert store.publish(topic, topic) == 1
        assert subscription.get(PATIENCE) == (topic, topic)
    with pytest.raises(DeadlineExceeded):
        subscription.get(0)


def test_key_spaces_never_meet(store):
    """The same topic in three spaces is three topics."""
    spaces = {name: store.space(name) for name in ("app", "sys", "cache")}
    with contextlib.ExitStack() as stack:
        inboxes = {
            name: stack.enter_context(space.subscribe("*", "t")) for name, space in spaces.items()
        }
        for name, space in spaces.items():
            assert space.publish("t", name) == 1
        for name, subscription in inboxes.items():
            assert subscription.get(PATIENCE) == ("t", name)
            with pytest.raises(DeadlineExceeded):
                subscription.get(0)


# Limits and errors.


def test_a_slow_reader_is_told_how_many_it_missed(store, subscribe):
    """It gets the newest, and later ones as ever."""
    subscription = subscribe("t", maxsize=5)
    assert subscription.dropped == 0
    for number in range(12):
        store.publish("t", number)
    wait_until(lambda: subscription.dropped == 7)
    assert [subscription.get(PATIENCE).data for _ in range(5)] == [7, 8, 9, 10, 11]
    store.publish("t", 12)
    assert subscription.get(PATIENCE).data == 12
    assert (subscription.dropped, subscription.gaps) == (7, 0)
    subscription.close()
    assert subscription.dropped == 7


def test_damaged_bytes_are_an_error_once(store, subscribe):
    """The call after goes on with the next message."""
    subscription = subscribe("t")
    for payload in (b"\xff damaged", b"1"):
        assert store.backend.publish(b"app:t", payload) == 1
    with pytest.raises(CodecError):
        subscription.get(PATIENCE)
    assert subscription.get(PATIENCE) == ("t", 1)
    store.backend.publish(b"app:t", b"\xff damaged")
    store.publish("t", 2)
    with pytest.raises(CodecError):
        asyncio.run(subscription.aget(PATIENCE))
    assert asyncio.run(subscription.aget(PATIENCE)) == ("t", 2)


@pytest.mark.parametrize(
    ("topics", "options", "error"),
    [
        ([], {}, TypeError),
        ([1], {}, TypeError),
        ([b"t"], {}, TypeError),
        ([""], {}, ValueError),
        (["k" * 4097], {}, KeyTooLong),
        (["\ud800"], {}, ValueError),
        (["t"], {"maxsize": 0}, ValueError),
        (["t"], {"maxsize": -1}, ValueError),
        (["t"], {"maxsize": 1.5}, TypeError),
        (["t"], {"maxsize": True}, TypeError),
    ],
)
def test_wrong_arguments_are_refused(store, topics, options, error):
    """When subscribing, not when waiting."""
    with pytest.raises(error):
        store.subscribe(*topics, **options)
    with pytest.raises(error):
        store.asubscribe(*topics, **options)


@pytest.mark.parametrize("topic", ["", 1, b"t", "k" * 4097, "\ud800"])
def test_a_wrong_topic_is_not_published_on(store, topic):
    """As a wrong key is not set."""
    with pytest.raises((TypeError, ValueError)):
        store.publish(topic, 1)


async def test_what_cannot_be_encoded_is_not_published(store):
    """The error names the type."""
    with pytest.raises(CodecError, match="object"):
        store.publish("t", object())
    with pytest.raises(CodecError, match="object"):
        await store.apublish("t", object())


def test_any_maxsize_will_do(store, subscribe):
    """However large."""
    subscription = subscribe("t", maxsize=10**30)
    store.publish("t", 1)
    assert subscription.get(PATIENCE) == ("t", 1)


# The process default store.


@pytest.fixture
def default(store):
    before = set_default_store(store)
    yield store
    set_default_store(before)


def test_the_functions_use_the_default_store(default):
    """As those over values do."""
    with hornbeam_state.subscribe("t", maxsize=2) as subscription:
        assert hornbeam_state.publish("t", 1) == 1
        assert default.publish("t", 2) == 1
        assert subscription.get(PATIENCE) == ("t", 1)
        assert subscription.get(PATIENCE) == ("t", 2)
    assert hornbeam_state.publish("t", 3) == 0


async def test_the_awaitable_functions_use_the_default_store(default):
    """As those over values do."""
    async with hornbeam_state.asubscribe("t", maxsize=2) as subscription:
        assert await hornbeam_state.apublish("t", 1) == 1
        assert await subscription.aget(PATIENCE) == ("t", 1)


def test_a_store_that_cannot_be_opened_says_so(tmp_path):
    """When the subscription begins, and when something is published."""
    (tmp_path / "store").write_text("not a store")
    store = open_store(f"lmdb://{tmp_path}/store")
    with pytest.raises(StoreUnavailable):
        store.subscribe("t")
    with pytest.raises(StoreUnavailable):
        store.publish("t", 1)
    subscription = store.asubscribe("t")
    with pytest.raises(StoreUnavailable):
        asyncio.run(subscription.aget(0))
