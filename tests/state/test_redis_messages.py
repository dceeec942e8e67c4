"""Messages on real servers: who shares a connection, who may, and what a fork does."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import socket
import subprocess
import threading
import time
import tracemalloc

import pytest
from message_helpers import (
    TOPIC,
    descriptors,
    failure_of,
    is_readable,
    listeners,
    next_of,
    published,
    subscriptions,
    threads,
)
from redis_servers import free_port, wait_until

from hornbeam_state.backends.base import Topics
from hornbeam_state.backends.redis import inbox as redis_inbox
from hornbeam_state.backends.redis.backend import RedisBackend
from hornbeam_state.config import StoreConfig
from hornbeam_state.errors import StoreUnavailable
from hornbeam_state.pubsub import Message, Subscription
from hornbeam_state.store import Store

TIMEOUT = 0.6


class TestConnections:
    """Which subscriptions share one, and when it goes."""

    def test_disjoint_subscriptions_share_one(self, make_server, connect, subscribing):
        """And one thread."""
        server = make_server()
        backend = connect(server.url)
        inboxes = [
            subscribing(backend, Topics((b"name/%d" % number,), (b"room/%d/" % number,)))
            for number in range(200)
        ]
        assert [(client["sub"], client["psub"]) for client in listeners(server)] == [("200", "200")]
        wait_until(lambda: threads() == ["hornbeam-messages"], "those of other tests have ended")
        assert backend.publish(b"name/7", b"1") == 1
        assert backend.publish(b"room/7/x", b"2") == 1
        assert [next_of(inboxes[7]), next_of(inboxes[7])] == [
            (b"name/7", b"1"),
            (b"room/7/x", b"2"),
        ]
        for inbox in inboxes:
            inbox.close()
        assert subscriptions(server) == 0

    def test_overlapping_ones_are_counted_each(self, valkey, connect, subscribing):
        """However they overlap, and in more than one process."""
        one, other = connect(valkey.url), connect(valkey.unix_url)
        asked = [
            Topics((b"ab", b"x"), ()),
            Topics((b"ab",), ()),
            Topics((), (b"a",)),
            Topics((b"y",), (b"ab",)),
            Topics((), (b"",)),
            Topics((b"abc",), ()),
        ]
        inboxes = [(topics, subscribing(one, topics)) for topics in asked]
        inboxes += [(topics, subscribing(other, topics)) for topics in asked]
        for topic in (b"ab", b"a", b"abc", b"x", b"y", b"z"):
            matching = [inbox for topics, inbox in inboxes if topics.match(topic)]
            assert one.publish(topic, b"v") == len(matching)
            for inbox in matching:
                assert next_of(inbox) == (topic, b"v")
        assert [inbox.take() for _, inbox in inboxes] == [None] * 12

    def test_it_goes_a_moment_after_its_last_subscription(self, make_server, connect):
        """The thread too; before, it is used again."""
        server = make_server()
        backend = connect(server.url)
        for _ in range(3):
            with server.admin() as admin:
                before = admin.info("stats")["total_connections_received"]
            for _ in range(20):
                inbox = backend.subscribe(TOPIC, 10)
                assert backend.publish(b"t", b"v") == 1
                inbox.close()
                assert backend.publish(b"t", b"v") == 0
            with server.admin() as admin:
                # The backend's own, for publishing, and this admin's; some, if time flies.
                assert admin.info("stats")["total_connections_received"] < before + 10
            wait_until(lambda: not threads(), "the thread has ended")
        backend.close()
        with server.admin() as admin:
            wait_until(lambda: len(admin.client_list()) == 1, "the connections are gone")

    def test_a_dropped_inbox_is_unsubscribed(self, make_server, connect):
        """Nobody could take from it."""
        server = make_server()
        backend = connect(server.url)
        stays = backend.subscribe(TOPIC, 10)
        backend.subscribe(Topics((b"t", b"u"), (b"v",)), 10)
        gc.collect()
        wait_until(lambda: subscriptions(server) == 1, "the other one is unsubscribed")
        assert backend.publish(b"t", b"v") == 1
        assert next_of(stays) == (b"t", b"v")

    def test_a_dropped_backend_leaves_nothing(self, make_server):
        """No thread, no connection, no descriptor; with subscriptions that nobody closed."""
        server = make_server()
        with server.admin() as admin:
            admin.ping()
            gc.collect()
            before = descriptors()
            store = Store(StoreConfig.from_url(server.url))
            subscriptions = [store.subscribe("t", "u*") for _ in range(3)]
            assert store.publish("u1", 5) == 3
            assert subscriptions[0].get(5) == Message("u1", 5)
            del store, subscriptions
            gc.collect()
            wait_until(lambda: not threads(), "the thread has ended")
            wait_until(lambda: len(admin.client_list()) == 1, "the connections are gone")
            gc.collect()
            wait_until(lambda: descriptors() <= before, "the descriptors are closed")

    def test_databases_are_apart(self, valkey, connect, subscribing):
        """Though Pub/Sub knows none."""
        backends = [connect(f"{valkey.url}/{number}") for number in (0, 1)]
        backends.append(connect(f"{valkey.unix_url}?db=11"))
        inboxes = [subscribing(backend, Topics((b"t",), (b"p",))) for backend in backends]
        for number, backend in enumerate(backends):
            for topic in (b"t", b"p1"):
                assert backend.publish(topic, b"%d" % number) == 1
                assert next_of(inboxes[number]) == (topic, b"%d" % number)
        assert [inbox.take() for inbox in inboxes] == [None] * 3

    def test_topics_of_any_bytes(self, valkey, connect, subscribing):
        """As names and as prefixes, all on one connection or two."""
        backend = connect(valkey.url)
        topics = [bytes([byte]) * 2 for byte in range(256)] + [
            b"*?",
            b"\r\n$3\r\n",
            b"[^a]",
            b"\\*",
        ]
        named = subscribing(backend, Topics(tuple(topics), ()), 1000)
        begun = subscribing(backend, Topics((), tuple(topics)), 1000)
        sent = [(topic, b"v") for topic in topics]
        assert {backend.publish(*message) for message in sent} == {2}
        for inbox in (named, begun):
            assert [next_of(inbox) for _ in sent] == sent
            assert inbox.take() is None

    def test_tls(self, make_server, connect, redis_binary, tmp_path):
        """What was decrypted ahead is not left lying; large messages go through."""
        openssl = shutil.which("openssl") or pytest.skip("openssl is not installed")
        certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
        subprocess.run(
            [
                *(openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
                *("-nodes", "-keyout", key, "-out", certificate, "-days", "2"),
                *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
            ],
            check=True,
            capture_output=True,
        )
        port = free_port()
        make_server(
            *("--tls-port", str(port), "--tls-auth-clients", "no"),
            *("--tls-cert-file", certificate, "--tls-key-file", key),
            *("--tls-ca-cert-file", certificate),
            binary=redis_binary,
        )
        backend = connect(f"rediss://localhost:{port}/0?ssl_ca_certs={certificate}")
        inboxes = [backend.subscribe(Topics((), (b"t",)), 1000) for _ in range(2)]
        sizes = [0, 1, 16_383, 16_384, 16_385, 65_536, 4_000_000, *range(1, 20_000, 97)]
        for size in sizes:
            assert backend.publish(b"t", b"v" * size) == 2
        for inbox in inboxes:
            assert [len(next_of(inbox)[1]) for _ in sizes] == sizes
            inbox.close()
        assert backend.publish(b"t", b"v") == 0


class TestReaders:
    """Those who take messages, or do not."""

    def test_a_slow_one_under_a_fast_publisher(self, make_server, connect):
        """What it loses is counted exactly, takes no room, and slows nobody down.

        The server would part with a connection that is read from too slowly.
        """
        server = make_server("--client-output-buffer-limit", "pubsub 8mb 8mb 1")
        backend = connect(server.url)
        slow, quick = backend.subscribe(TOPIC, 10), backend.subscribe(TOPIC, 10_000)
        tracemalloc.start()
        try:
            with server.admin() as admin:
                for published in range(100, 4100, 100):
                    pipeline = admin.pipeline(transaction=False)
                    for _ in range(100):
                        pipeline.publish("hb:0:m:t", b"v" * 10_000)
                    assert pipeline.execute() == [2] * 100
                    for _ in range(100):
                        next_of(quick)
                    rest = published - 10
                    wait_until(lambda rest=rest: slow.dropped == rest, "all but ten are dropped")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert (slow.gaps, quick.gaps, quick.dropped) == (0, 0, 0)
        assert peak < 20_000_000  # of 40 MB

    def test_bytes_are_bounded(self, valkey, connect, monkeypatch):
        """Over messages of any number."""
        monkeypatch.setattr(redis_inbox, "INBOX_BYTES", 1_000_000)
        backend = connect(valkey.url)
        inbox = backend.subscribe(TOPIC, 1000)
        for number in range(30):
            backend.publish(b"t", bytes([number]) * 100_000)
        wait_until(lambda: inbox.dropped == 20, "the oldest are dropped")
        assert [next_of(inbox)[1][0] for _ in range(10)] == list(range(20, 30))
        backend.publish(b"t", b"v" * 3_000_000)
        assert len(next_of(inbox)[1]) == 3_000_000

    def test_two_event_loops_and_a_thread(self, valkey, connect):
        """They share a subscription: each message goes to one of them."""
        store = Store(StoreConfig.from_url(valkey.url, timeout=10))
        subscription, seen = store.subscribe("t", maxsize=10_000), []

        async def follow():
            async for message in subscription:
                seen.append(message.data)

        def iterate():
            seen.extend(message.data for message in subscription)

        jobs = [lambda: asyncio.run(follow())] * 2 + [iterate]
        workers = [threading.Thread(target=job) for job in jobs]
        for worker in workers:
            worker.start()
        for number in range(500):
            assert store.publish("t", number) == 1
        wait_until(lambda: len(seen) == 500, "all have come")
        store.close()
        for worker in workers:
            worker.join(10)
            assert not worker.is_alive()
        assert sorted(seen) == list(range(500))

    def test_each_loop_has_subscriptions_of_its_own(self, valkey, connect):
        """Made on one, they end with it or not."""
        backend = connect(valkey.url)
        outlives = []

        async def main(number):
            inbox = await backend.asubscribe(TOPIC, 10)
            outlives.append(await backend.asubscribe(TOPIC, 10))
            assert await backend.apublish(b"t", b"%d" % number) == number + 2
            assert (await asyncio.to_thread(next_of, inbox))[1] == b"%d" % number
            inbox.close()

        for number in range(3):
            asyncio.run(main(number))
        assert backend.publish(b"t", b"v") == 3
        assert [next_of(inbox)[1] for inbox in outlives] == [b"0", b"1", b"2"]

    def test_closing_the_store_ends_iterating(self, valkey, connect):
        """Neither a thread nor a task goes on asking a closed inbox."""
        backend = connect(valkey.url)
        subscription = Subscription(backend, b"", TOPIC, 10).open()
        other = Subscription(backend, b"", TOPIC, 10).open()
        backend.close()
        assert list(subscription) == []
        with pytest.raises(RuntimeError, match="closed"):
            other.get(5)
        with pytest.raises(RuntimeError, match="closed"):
            asyncio.run(other.aget(5))

    def test_closing_while_others_subscribe(self, valkey, connect):
        """Each either has a subscription or an error, and none hangs."""
        backend, outcomes = connect(valkey.url), []

        def subscribe():
            for _ in range(50):
                try:
                    outcomes.append(backend.subscribe(TOPIC, 10).closed)
                except StoreUnavailable as error:
                    outcomes.append("closed meanwhile" in str(error))

        workers = [threading.Thread(target=subscribe) for _ in range(4)]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            backend.close()
        for worker in workers:
            worker.join()
        assert len(outcomes) == 200
        backend.close()
        gc.collect()
        wait_until(lambda: backend.publish(b"t", b"v") == 0, "nothing is subscribed")


class TestRights:
    """What a user may subscribe to."""

    @pytest.fixture(params=["valkey", "redis"])
    def user(self, request, make_server, connect):
        """Return what makes a user with some rights, and a backend for that user."""
        server = make_server(binary=request.getfixturevalue(f"{request.param}_binary"))

        def make(*rights):
            with server.admin() as admin:
                admin.execute_command("ACL", "SETUSER", "u", "reset", "on", ">pw", *rights)
            return connect(server.url.replace("://", "://u:pw@"))

        make.server = server
        return make

    def test_no_channels(self, user, subscribing):
        """The message says which rights are missing; the server is not taken to be down."""
        backend = user("~hb:*", "+@all", "resetchannels")
        for topics in (TOPIC, Topics((), (b"t",))) * 3:
            message, _ = failure_of(subscribing, backend, topics)
            assert "channels" in message
            assert "ACL SETUSER" in message
        message, _ = failure_of(backend.publish, b"t", b"v")
        assert "channels" in message
        assert "may or may not" not in message

    def test_channels_but_no_patterns(self, user, subscribing):
        """A server compares a pattern with the rights to the letter; the names go on."""
        backend = user("~hb:*", "+@all", "resetchannels", "&hb:*")
        inbox = subscribing(backend)
        message, _ = failure_of(subscribing, backend, Topics((b"u",), (b"p",)))
        assert "topics that end in *" in message
        assert subscriptions(user.server) == 1
        assert backend.publish(b"t", b"v") == 1
        assert next_of(inbox) == (b"t", b"v")

    def test_rights_that_are_taken_away(self, user, connect):
        """The reader is told, and goes on when they are given back."""
        rights = ("~hb:*", "+@all", "resetchannels")
        user(*rights, "&hb:*")
        backend = connect(user.server.url.replace("://", "://u:pw@"), TIMEOUT)
        inbox = backend.subscribe(TOPIC, 10)
        user(*rights)
        assert is_readable(inbox, 10_000)
        with pytest.raises(StoreUnavailable, match="ACL SETUSER"):
            inbox.take()
        assert inbox.gaps == 1
        user(*rights, "&hb:*")
        published(backend, b"v")
        assert next_of(inbox) == (b"t", b"v")
        assert inbox.gaps == 1

    def test_a_wrong_password(self, make_server, connect, subscribing):
        """It is told at once."""
        server = make_server("--requirepass", "right")
        message, took = failure_of(subscribing, connect(server.url.replace("://", "://:wrong@")))
        assert "password" in message
        assert took < 5


class TestForks:
    """What a child has of its parent's subscriptions: nothing."""

    def in_child(self, work):
        child = os.fork()
        if child == 0:
            try:
                work()
                os._exit(0)
            except BaseException as error:
                print(repr(error), flush=True)
            finally:
                os._exit(1)
        return child

    def test_a_child_holds_no_connection(self, valkey, connect):
        """Nor does it end the parent's, whatever it does to its copies."""
        backend = connect(valkey.url)
        inboxes = [backend.subscribe(TOPIC, 10) for _ in range(3)]

        def work():
            assert not self.connections_to(valkey.port)
            for inbox in inboxes:
                assert inbox.take() is None
                inbox.close()
            assert backend.publish(b"t", b"from the child") == 3
            own = backend.subscribe(TOPIC, 10)
            assert backend.publish(b"t", b"to all") == 4
            assert next_of(own) == (b"t", b"to all")
            backend.close()
            inboxes.clear()
            gc.collect()

        child = self.in_child(work)
        assert os.waitpid(child, 0)[1] == 0
        assert backend.publish(b"t", b"from the parent") == 3
        for inbox in inboxes:
            payloads = [next_of(inbox)[1] for _ in range(3)]
            assert payloads == [b"from the child", b"to all", b"from the parent"]
            assert inbox.gaps == 0

    def test_the_server_sees_a_parent_go_whose_child_lives(self, make_server):
        """So that nothing is counted as delivered to the dead."""
        server = make_server()
        ready, tell = os.pipe()
        alive, hold = os.pipe()

        def parent():
            os.close(hold)
            backend = RedisBackend(StoreConfig.from_url(server.url))
            inboxes = [backend.subscribe(TOPIC, 10) for _ in range(2)]
            self.in_child(lambda: os.read(alive, 1))
            os.write(tell, b"%d" % len(inboxes))
            time.sleep(60)

        child = self.in_child(parent)
        assert os.read(ready, 1) == b"2"
        assert subscriptions(server) == 2
        os.kill(child, 9)
        os.waitpid(child, 0)
        wait_until(lambda: subscriptions(server) == 0, "the server sees it")
        for descriptor in (ready, tell, alive, hold):
            os.close(descriptor)

    def connections_to(self, port):
        """Return this process's connections to the port."""
        found = []
        for descriptor in descriptors():
            try:
                with socket.socket(fileno=os.dup(descriptor)) as one:
                    found.append(one.getpeername())
            except OSError:
                continue
        return [name for name in found if name and name[1:2] == (port,)]
