"""The contract of messages."""
# ruff: noqa: PLR2004, S101 - a test states what it expects

from __future__ import annotations

import select
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest

from hornbeam_state.backends.base import SPACES, Backend, Topics
from hornbeam_state.contract.driving import Contract, Driver, in_child, succeeds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hornbeam_state.backends.base import Inbox


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


def _is_silent(inbox: Inbox) -> bool:
    """Return whether there is nothing left, and the descriptor says so."""
    return inbox.take() is None and not _is_readable(inbox, 0)


def _wait_until(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"it took longer than {timeout} s"
        time.sleep(0.002)


class MessageContract(Contract):
    """How every `Backend` passes messages on."""

    @pytest.fixture
    def subscribe(self, backend: Backend, driver: Driver) -> Iterator[Callable[..., Inbox]]:
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
    def publish(self, backend: Backend, driver: Driver) -> Callable[[bytes, bytes], int]:
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
        # A message may be taken before the thread that brought it has announced it.
        _wait_until(lambda: _is_silent(inbox))
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
        assert in_child(lambda: backend.publish(b"t", b"from the child") == 1)
        assert _taken(inbox, 1) == [(b"t", b"from the child")]
        assert in_child(partial(succeeds, backend.close))
        assert backend.publish(b"t", b"still here") == 1
        assert _taken(inbox, 1) == [(b"t", b"still here")]

    def test_closing_the_backend_ends_its_subscriptions(
        self,
        backend: Backend,
        driver: Driver,
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
