"""What carries messages on Redis, without a server: names, lanes, the wire format, the inbox."""

from __future__ import annotations

import gc
import os
import random
import select
import threading
import weakref
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.exceptions import InvalidResponse, ResponseError
from redis_servers import wait_until

from hornbeam_state.backends.base import Topics
from hornbeam_state.backends.redis import inbox as redis_inbox
from hornbeam_state.backends.redis.channels import Coverage, Naming
from hornbeam_state.backends.redis.inbox import RedisInbox
from hornbeam_state.backends.redis.outage import LONGEST_PAUSE, Outage, pause_before
from hornbeam_state.backends.redis.replies import Replies, command
from hornbeam_state.backends.redis.session import Member, Session
from hornbeam_state.errors import StoreUnavailable

SHORT = st.binary(min_size=0, max_size=3).map(lambda text: bytes(b"ab"[byte % 2] for byte in text))
EVERY_TOPIC = [bytes(topic) for size in range(5) for topic in product(b"ab", repeat=size)]


def is_readable(inbox):
    poller = select.poll()
    poller.register(inbox.fileno(), select.POLLIN)
    return bool(poller.poll(0))


class TestChannels:
    """What the server is asked for."""

    def test_names_are_fixed_for_good(self):
        """Another name would part versions that run at the same time."""
        naming = Naming(7)
        topics = Topics((b"app:a*", b"b\r\n\xff"), (b"app:x", b"*[?]\\", b""))
        assert naming.channels(topics).names == (b"hb:7:m:app:a*", b"hb:7:m:b\r\n\xff")
        assert naming.channels(topics).patterns == (
            b"hb:7:m:app:x*",
            rb"hb:7:m:\*\[\?\]\\*",
            b"hb:7:m:*",
        )
        assert naming.topic(b"hb:7:m:b\r\n\xff") == b"b\r\n\xff"
        [publish] = next(naming.publish(b"t", b"v")).commands
        assert publish.words == (b"PUBLISH", b"hb:7:m:t", b"v")

    def test_publishing_is_not_repeated(self):
        """A second PUBLISH would be a second message."""
        assert next(Naming(0).publish(b"t", b"v")).repeatable is False

    topics = st.builds(
        Topics, st.lists(SHORT, max_size=2).map(tuple), st.lists(SHORT, max_size=2).map(tuple)
    )

    @given(st.lists(topics, max_size=4), topics)
    def test_those_that_share_a_connection_have_no_topic_in_common(self, others, topics):
        """Not even one that nobody has published on yet."""
        coverage = Coverage()
        members = []
        for other in others:
            if coverage.is_apart(other):
                coverage.add(other)
                members.append(other)
        meets = any(
            topics.match(topic) and member.match(topic)
            for topic in EVERY_TOPIC
            for member in members
        )
        assert coverage.is_apart(topics) is not meets

    @given(topics, topics)
    def test_what_left_is_not_in_the_way(self, stays, leaves):
        """Not even where both of them begin alike."""
        coverage, expected = Coverage(), Coverage()
        coverage.add(stays)
        expected.add(stays)
        if coverage.is_apart(leaves):
            coverage.add(leaves)
            coverage.remove(leaves)
        for topic in EVERY_TOPIC:
            for probe in (Topics((topic,), ()), Topics((), (topic,))):
                assert coverage.is_apart(probe) is expected.is_apart(probe)


class TestReplies:
    """RESP2, in whatever pieces it arrives."""

    STREAM = (
        b"*3\r\n$7\r\nmessage\r\n$4\r\nc\r\nd\r\n$0\r\n\r\n:-12\r\n+OK\r\n-ERR no\r\n$-1\r\n*-1\r\n"
        b"*2\r\n$4\r\npong\r\n$0\r\n\r\n*0\r\n$300\r\n" + bytes(range(256)) + b"\r\n" * 22 + b"\r\n"
    )
    VALUES = (
        [b"message", b"c\r\nd", b""],
        *(-12, b"OK", "ERR no", None, None, [b"pong", b""], []),
        bytes(range(256)) + b"\r\n" * 22,
    )

    def values(self, replies):
        return tuple(str(one) if isinstance(one, ResponseError) else one for one in replies)

    @given(st.lists(st.integers(0, len(STREAM)), max_size=8).map(sorted))
    def test_pieces(self, cuts):
        """Each reply comes once, when its last byte has."""
        replies, seen, ends = Replies(), [], [*cuts, len(self.STREAM)]
        for begin, end in zip([0, *cuts], ends, strict=True):
            seen += replies.feed(self.STREAM[begin:end])
        assert self.values(seen) == self.VALUES

    def test_byte_for_byte(self):
        """The smallest of pieces."""
        replies = Replies()
        seen = [one for byte in self.STREAM for one in replies.feed(bytes([byte]))]
        assert self.values(seen) == self.VALUES

    def test_a_large_reply_is_put_together_once(self):
        """Taking in 64 MB in small pieces copies them some times, and not a thousand."""
        replies, piece = Replies(), b"v" * 65536
        replies.feed(b"*3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$%d\r\n" % (1024 * len(piece)))
        joined = []
        for _ in range(1024):
            assert replies.feed(piece) == []
            joined.append(len(replies._parts))
        assert joined == list(range(2, 1026))
        [[_, _, payload]] = replies.feed(b"\r\n")
        assert payload == piece * 1024

    @pytest.mark.parametrize("data", [b"HTTP/1.1 400\r\n", b"*x\r\n", b"$1x\r\n", b":\r\n"])
    def test_what_is_not_redis(self, data):
        """It is told as such."""
        with pytest.raises(InvalidResponse):
            Replies().feed(data)

    def test_commands(self):
        """Words of any bytes."""
        assert command(b"A", b"\r\n\xff") == b"*2\r\n$1\r\nA\r\n$3\r\n\r\n\xff\r\n"


class TestSession:
    """What a connection was asked, and what its replies mean."""

    def member(self, *names, prefixes=()):
        inbox = RedisInbox(100, lambda: None)
        topics = Topics(names, prefixes)
        member = Member(topics, Naming(0).channels(topics), weakref.ref(inbox))
        return member, inbox

    def answer(self, kind, topic):
        channel = b"hb:0:m:" + topic
        words = (len(kind), kind, len(channel), channel)
        return b"*3\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n:1\r\n" % words

    def message(self, topic, payload):
        return command(b"message", b"hb:0:m:" + topic, payload)

    def test_each_message_goes_to_who_was_subscribed_when_it_was_published(self):
        """Though one ended and another began on the same topic meanwhile."""
        session = Session(Naming(0), 0.0)
        (first, old), (second, new) = self.member(b"t"), self.member(b"t")
        session.subscribe(first, 0.0)
        session.received(self.answer(b"subscribe", b"t"), 0.0)
        session.unsubscribe(first, 0.0, None)
        session.subscribe(second, 0.0)
        session.received(
            self.message(b"t", b"1")
            + self.answer(b"unsubscribe", b"t")
            + self.answer(b"subscribe", b"t")
            + self.message(b"t", b"2"),
            1.0,
        )
        assert (old.take(), old.take()) == ((b"t", b"1"), None)
        assert (new.take(), new.take()) == ((b"t", b"2"), None)

    def test_a_subscription_has_begun_when_all_of_it_was_acknowledged(self):
        """Names and prefixes."""
        session = Session(Naming(0), 0.0)
        member, _ = self.member(b"a", b"b", prefixes=(b"c",))
        session.subscribe(member, 0.0)
        answers = [(b"subscribe", b"a"), (b"subscribe", b"b"), (b"psubscribe", b"c*")]
        for answer in answers:
            assert not member.has_begun
            assert session.silent_since is not None
            session.received(self.answer(*answer), 1.0)
        assert member.has_begun
        assert session.silent_since is None

    def test_a_refusal_is_about_one_member(self):
        """The others are subscribed."""
        session = Session(Naming(0), 0.0)
        (refused, _), (other, _) = self.member(prefixes=(b"a",)), self.member(b"b")
        session.subscribe(refused, 0.0)
        session.subscribe(other, 0.0)
        [(member, error)] = session.received(
            b"-NOPERM no\r\n" + self.answer(b"subscribe", b"b"), 1.0
        )
        assert member is refused
        assert str(error) == "NOPERM no"
        assert other.has_begun
        assert not refused.has_begun

    def test_silence(self):
        """It begins with the first question that is open, and anew with whatever comes."""
        session = Session(Naming(0), 5.0)
        assert session.silent_since is None
        session.ping(6.0)
        session.ping(7.0)
        assert session.silent_since == 6.0
        session.received(b"", 7.5)
        assert session.silent_since == 6.0
        session.received(b"*2\r\n", 8.0)
        assert session.silent_since == 8.0
        session.received(b"$4\r\npong\r\n$0\r\n\r\n+PONG\r\n", 9.0)
        assert session.silent_since is None

    @pytest.mark.parametrize(
        "data",
        [
            b"+OK\r\n",
            b":1\r\n",
            b"-ERR x\r\n",
            b"*3\r\n+subscribe\r\n+c\r\n:1\r\n",
            b"*1\r\n+x\r\n",
        ],
    )
    def test_replies_to_nothing_that_was_asked(self, data):
        """They end the connection: nothing on it could be relied upon."""
        with pytest.raises(InvalidResponse):
            Session(Naming(0), 0.0).received(data, 0.0)


class TestOutage:
    """When a connection is made again, and when readers are told."""

    @pytest.mark.parametrize(
        ("attempt", "shortest", "longest"),
        [(0, 0, 0), (1, 0.05, 0.1), (2, 0.1, 0.2), (6, 1, 2), (7, 1, 2), (10**6, 1, 2)],
    )
    def test_pauses_between_attempts(self, attempt, shortest, longest):
        """None at first, for a connection that was lost by chance; two seconds at most."""
        for _ in range(20):
            assert shortest <= pause_before(attempt) <= longest

    def test_readers_are_told_once_for_each(self):
        """When it has lasted for the timeout, counted from its beginning."""
        outage = Outage(timeout=1.0)
        assert not outage.must_tell(100.0)
        outage.begin(10.0)
        outage.begin(10.9)
        assert outage.tell_at() == 11.0
        assert not outage.must_tell(10.9)
        assert outage.must_tell(11.0)
        assert not outage.must_tell(20.0)
        assert outage.end()
        assert not outage.end()
        outage.begin(30.0)
        assert not outage.must_tell(30.5)
        assert outage.must_tell(31.0)

    def test_a_connection_that_held_is_made_again_at_once(self):
        """One that did not is a failed attempt."""
        outage = Outage(timeout=1.0)
        outage.failed(5.0)
        assert outage.next_try == 5.0
        outage.failed(6.0, lasted=1.0)
        assert outage.next_try > 6.0
        outage.failed(7.0, lasted=LONGEST_PAUSE)
        assert outage.next_try == 7.0


class TestInbox:
    """The messages that wait."""

    @pytest.fixture
    def inbox(self):
        inbox = RedisInbox(3, lambda: None)
        yield inbox
        inbox.close()

    def test_bytes_are_bounded(self, inbox, monkeypatch):
        """A message that is larger by itself stays, until another one comes."""
        monkeypatch.setattr(redis_inbox, "INBOX_BYTES", 10)
        inbox.put(b"t", b"1" * 6)
        inbox.put(b"t", b"2" * 4)
        assert inbox.dropped == 0
        inbox.put(b"t", b"3" * 5)
        assert inbox.dropped == 1
        inbox.put(b"t", b"4" * 11)
        assert inbox.dropped == 3
        assert inbox.take() == (b"t", b"4" * 11)
        inbox.put(b"t", b"")
        inbox.put(b"t", b"5" * 10)
        assert inbox.dropped == 3

    def test_an_error_comes_after_what_came_before_it(self, inbox):
        """And once; the descriptor says so."""
        assert inbox.put(b"t", b"1")
        inbox.fail(StoreUnavailable("away"))
        inbox.put(b"t", b"2")
        assert [inbox.take(), inbox.take()] == [(b"t", b"1"), (b"t", b"2")]
        assert is_readable(inbox)
        with pytest.raises(StoreUnavailable, match="away"):
            inbox.take()
        assert inbox.take() is None
        assert not is_readable(inbox)
        inbox.fail(StoreUnavailable("away"))
        inbox.recover()
        assert inbox.take() is None
        assert not is_readable(inbox)

    def test_a_closed_one_stays_empty_and_readable(self, inbox):
        """Whatever still arrives."""
        inbox.put(b"t", b"1")
        inbox.close()
        inbox.put(b"t", b"2")
        inbox.fail(StoreUnavailable("away"))
        for _ in range(2):
            assert inbox.take() is None
            assert is_readable(inbox)
        assert inbox.closed

    def test_every_message_is_taken_or_counted(self):
        """By eight threads that wait on the descriptor, of what two put in."""
        inbox, taken = RedisInbox(50, lambda: None), []

        def take():
            poller = select.poll()
            poller.register(inbox.fileno(), select.POLLIN)
            while not inbox.closed:
                poller.poll(10_000)
                while (message := inbox.take()) is not None:
                    taken.append(message)

        def put():
            for number in range(20_000):
                if inbox.put(b"t", b"%d" % number):
                    inbox.announce()

        takers = [threading.Thread(target=take) for _ in range(8)]
        putters = [threading.Thread(target=put) for _ in range(2)]
        for thread in (*takers, *putters):
            thread.start()
        for thread in putters:
            thread.join()
        # Not until it is unreadable: it is so for a moment while one looks whether it is empty.
        wait_until(lambda: len(taken) + inbox.dropped == 40_000, "each is taken or counted")
        wait_until(lambda: not is_readable(inbox), "all is taken")
        inbox.close()
        for thread in takers:
            thread.join()
        assert len(taken) + inbox.dropped == 40_000
        assert len(taken) >= 50

    def test_the_descriptor_goes_with_the_object(self):
        """And not before: others may wait on it."""
        inbox = RedisInbox(1, lambda: None)
        descriptor = inbox.fileno()
        inbox.close()
        os.fstat(descriptor)
        del inbox
        gc.collect()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)

    def test_order_and_count_under_any_use(self):
        """It is a queue that forgets its oldest."""
        dice, inbox, model, dropped = random.Random(3), RedisInbox(5, lambda: None), [], 0
        for number in range(5000):
            if dice.random() < 0.55:
                if inbox.put(b"t", b"%d" % number):
                    inbox.announce()
                model.append((b"t", b"%d" % number))
                dropped += len(model) > 5
                del model[:-5]
            else:
                assert inbox.take() == (model.pop(0) if model else None)
            if model:
                assert is_readable(inbox)
        assert inbox.dropped == dropped
