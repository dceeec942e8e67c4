"""The Redis backend on a Cluster: routing, slots that move, nodes that fail."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
import traceback
from functools import partial

import pytest
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, ResponseError, TryAgainError
from redis_load import Load
from redis_servers import free_port, wait_until

from hornbeam_state.backends.redis.backend import RedisBackend
from hornbeam_state.backends.redis.batches import Command, ask_independently
from hornbeam_state.backends.redis.errors import may_have_happened
from hornbeam_state.backends.redis.flight import Flight
from hornbeam_state.backends.redis.steps import BUCKETS, bucket_of
from hornbeam_state.backends.redis.topology import (
    SLOT_OF_BUCKET,
    Address,
    Ask,
    ClusterMap,
    Later,
    Moved,
    redirection,
)
from hornbeam_state.config import StoreConfig
from hornbeam_state.errors import HornbeamError, StoreUnavailable

HUSH = "a-password"
NAMES = [b"n%d" % number for number in range(40)]
ASKED = Address("10.0.0.1", 7000)


@pytest.fixture
def connect():
    backends = []

    def make(url, timeout=10):
        backends.append(RedisBackend(StoreConfig.from_url(url, timeout=timeout)))
        return backends[-1]

    yield make
    for backend in backends:
        backend.close()


@pytest.fixture
def backend(cluster, connect):
    return connect(cluster.url)


@pytest.fixture
def app(backend):
    return backend.keyspace("app")


def failure_of(call, *args):
    """Return the error that a call raises, and how long it took."""
    started = time.monotonic()
    with pytest.raises(HornbeamError) as caught:
        call(*args)
    return caught.value, time.monotonic() - started


def name_on(server, cluster):
    """Return a key whose bucket the server owns."""
    return next(name for name in NAMES if cluster.owner(SLOT_OF_BUCKET[bucket_of(name)]) is server)


class TestPure:
    """What needs no server."""

    def test_slots_of_the_buckets(self):
        """They are those that the servers compute."""
        names = [b"hb:{b%02d}:a:key" % bucket for bucket in range(BUCKETS)]
        assert list(SLOT_OF_BUCKET) == [key_slot(name) for name in names]

    def test_reading_a_map(self):
        """Nodes without an address of their own have that of whom was asked."""
        reply = [
            [0, 8000, [b"", 7000, b"id"], [b"10.0.0.9", 7009, b"id", []]],
            [8001, 12000, [b"10.0.0.2", 7001, b"id"]],
            [12001, 16000, [b"?", 7002, b"id"]],
        ]
        found = ClusterMap.parse(reply, ASKED)
        second = Address("10.0.0.2", 7001)
        assert found.primaries == (ASKED, second)
        assert found.nodes == (ASKED, Address("10.0.0.9", 7009), second)
        for slot, owner in zip(SLOT_OF_BUCKET, found.owners, strict=True):
            assert owner == (ASKED if slot <= 8000 else second if slot <= 12000 else None)

    def test_a_slot_that_moved(self):
        """Its bucket goes along, the others stay; a primary nobody knew of becomes known."""
        before = ClusterMap.parse([[0, 16383, [b"10.0.0.1", 7000]]], ASKED)
        new = Address("10.0.0.5", 7005)
        after = before.moved(SLOT_OF_BUCKET[17], new)
        assert [bucket for bucket in range(BUCKETS) if after.owners[bucket] == new] == [17]
        assert after.primaries == (ASKED, new)
        assert before.owners[17] == ASKED

    @pytest.mark.parametrize(
        ("reply", "expected"),
        [
            pytest.param(b"value", None, id="answer"),
            pytest.param(ResponseError("ERR"), None, id="error"),
            pytest.param(
                MovedError("12 10.0.0.2:1"), Moved(12, Address("10.0.0.2", 1)), id="moved"
            ),
            pytest.param(MovedError("12 :1"), Moved(12, Address("10.0.0.1", 1)), id="moved-nearby"),
            pytest.param(AskError("12 ::1:1"), Ask(Address("::1", 1)), id="ask-ipv6"),
            pytest.param(TryAgainError("split"), Later(is_down=False), id="tryagain"),
            pytest.param(ClusterDownError("down"), Later(is_down=True), id="clusterdown"),
        ],
    )
    def test_redirections(self, reply, expected):
        assert redirection(reply, ASKED) == expected

    def test_one_flight_at_a_time(self):
        """Not more often than the interval, and not for ever if it never ends."""
        flight = Flight(lease=1.0, interval=0.25)
        assert flight.begin(10.0)
        assert not flight.begin(10.9, at_once=True)
        assert flight.begin(11.0), "the lease ran out"
        flight.end()
        assert not flight.begin(11.2)
        assert flight.begin(11.2, at_once=True)
        flight.end()
        assert flight.begin(11.5)


class TestRouting:
    """Each key on its node, and operations over all of them."""

    def test_keys_are_spread(self, app, cluster):
        """Every primary holds some, none of which it refused at first."""
        app.put_many(dict.fromkeys(NAMES, b"v"))
        assert all(node.ask("DBSIZE") for node in cluster.primaries)
        assert app.get_many([*NAMES, b"absent", NAMES[0]]) == [*[b"v"] * 40, None, b"v"]
        assert app.keys() == sorted(NAMES)
        assert app.usage().entries == 40
        assert app.clear() == 40
        assert not any(node.ask("DBSIZE") for node in cluster.primaries)

    @pytest.mark.parametrize("twin", [False, True], ids=["sync", "async"])
    def test_many_keys_take_one_round_trip(self, cluster, connect, twin):
        """Commands for one node go there together: a slow node does not add to another."""
        space = connect(cluster.url).keyspace("cache")
        space.put_many(dict.fromkeys(NAMES, b"v"))
        items = dict.fromkeys(NAMES, b"w")
        for node in cluster.primaries:
            node.ask("CLIENT", "PAUSE", 60_000, "WRITE")
        write = (
            partial(asyncio.run, space.aput_many(items)) if twin else partial(space.put_many, items)
        )
        thread = threading.Thread(target=write)
        thread.start()
        try:
            wait_until(lambda: all(map(self.keeps_waiting, cluster.primaries)), "all are asked")
        finally:
            for node in cluster.primaries:
                node.ask("CLIENT", "UNPAUSE")
            thread.join()
        assert space.get_many(NAMES) == [b"w"] * 40

    def keeps_waiting(self, node):
        """Return whether a node has a command that it does not carry out yet."""
        with node.admin() as admin:
            return any("b" in client["flags"] for client in admin.client_list())

    def test_the_cache_is_listed_and_cleared_on_every_primary(self, backend, cluster):
        cache = backend.keyspace("cache")
        cache.put_many(dict.fromkeys(NAMES, b"v"))
        assert cache.keys() == sorted(NAMES)
        assert asyncio.run(cache.akeys(b"n1")) == sorted(n for n in NAMES if n.startswith(b"n1"))
        assert cache.clear(b"n1") == 11
        assert len(cache.keys()) == 29

    def test_evictions_are_summed(self, backend, cluster):
        """What each primary had to make room for."""
        cache = backend.keyspace("cache")
        before = cache.usage().evictions
        cache.put_many({b"k%d" % number: b"v" * 100 for number in range(300)})
        try:
            for node in cluster.primaries:
                node.ask("CONFIG", "SET", "maxmemory-policy", "volatile-lru")
                node.ask("CONFIG", "SET", "maxmemory", "1")
            wait_until(lambda: cache.keys() == [], "all is evicted")
            assert cache.usage().evictions == before + 300
        finally:
            for node in cluster.primaries:
                node.ask("CONFIG", "SET", "maxmemory", "0")

    def test_scripts_come_back_after_a_flush(self, app, cluster):
        """Each node forgets and is told by itself."""
        app.put_many(dict.fromkeys(NAMES, b"1"))
        for node in cluster.primaries[:2]:
            node.ask("SCRIPT", "FLUSH")
        app.put_many(dict.fromkeys(NAMES, b"2"))
        assert asyncio.run(app.aincr(NAMES[0], 1)) == 3
        assert len(app.keys()) == 40

    def test_dialling(self, backend, cluster):
        """A connection of one's own goes to the primary of a bucket, or to each primary."""
        for bucket in (0, 17, 63):
            connection = backend._link.dial(bucket)
            connection.send_packed_command(
                connection.pack_command("INFO", "server"), check_health=False
            )
            port = cluster.owner(SLOT_OF_BUCKET[bucket]).port
            assert b"tcp_port:%d" % port in connection.read_response()
            connection.disconnect()
        found = backend._link.primaries()
        assert {address.port for address in found} == {node.port for node in cluster.primaries}
        for address in found:
            backend._link.dial_to(address).disconnect()

    def test_no_reply_reaches_another_caller(self, app):
        """Calls to several nodes are cancelled at random moments; each other gets its own."""
        dice = random.Random(17)
        app.put_many({name: name for name in NAMES})

        async def ask():
            names = dice.sample(NAMES, 12)
            await asyncio.sleep(dice.random() * 0.05)
            assert await app.aget_many(names) == names

        async def main():
            tasks = [asyncio.create_task(ask()) for _ in range(600)]
            for task in dice.sample(tasks, 300):
                asyncio.get_running_loop().call_later(0.01 + dice.random() * 0.1, task.cancel)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            cancelled = [r for r in results if isinstance(r, asyncio.CancelledError)]
            assert len(cancelled) + results.count(None) == 600
            assert await app.aget_many(NAMES) == NAMES
            return len(cancelled)

        assert asyncio.run(main()) > 20

    def test_a_child_of_a_fork_has_its_own(self, app):
        """With the map as it was known."""
        app.put_many(dict.fromkeys(NAMES, b"v"))
        child = os.fork()
        if child == 0:
            try:
                fine = app.get_many(NAMES) == [b"v"] * 40
                fine &= asyncio.run(app.aget_many(NAMES)) == [b"v"] * 40
                os._exit(0 if fine else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert app.get_many(NAMES) == [b"v"] * 40


class TestRefusals:
    """What is said about a wrong URL, and a Cluster that is not there."""

    def test_of_a_server_that_is_no_node(self, valkey, connect):
        error, _ = failure_of(connect(valkey.url.replace("redis:", "redis+cluster:")).check)
        assert isinstance(error, StoreUnavailable)
        assert "use redis://" in str(error)

    def test_of_a_node_taken_for_a_server(self, cluster, connect):
        plain = connect(cluster.primaries[0].url)
        calls = [plain.check, *(lambda n=n: plain.keyspace("app").get(n) for n in NAMES)]
        said = []
        for call in calls:
            try:
                call()
            except StoreUnavailable as error:
                said.append(str(error))
        assert len(said) > 10
        assert all("use redis+cluster://" in text for text in said)

    def test_a_node_that_is_not_there_is_passed_over(self, cluster, connect):
        """In the list of hosts, wherever it stands."""
        hosts = cluster.url.partition("://")[2]
        for _ in range(3):
            url = f"redis+cluster://127.0.0.1:{free_port()},nowhere.invalid,{hosts}"
            assert connect(url).keyspace("app").get(b"k") is None

    def test_a_node_that_does_not_answer_is_passed_over(self, cluster, make_fake, connect):
        """At the cost of its share of the timeout."""
        mute = make_fake(lambda number, data: b"").url.partition("://")[2]
        url = cluster.url.replace("://", f"://{mute},")
        for _ in range(4):
            space = connect(url, timeout=2).keyspace("app")
            assert space.get(b"k") is None
            assert asyncio.run(space.aget(b"k")) is None

    @pytest.mark.parametrize("twin", [False, True], ids=["sync", "async"])
    def test_nobody_there(self, connect, twin):
        url = f"redis+cluster://:{HUSH}@127.0.0.1:{free_port()},127.0.0.1:{free_port()}"
        space = connect(url).keyspace("app")

        def is_spared():
            error, took = failure_of(
                (lambda: asyncio.run(space.aincr(b"k", 1)))
                if twin
                else (lambda: space.incr(b"k", 1))
            )
            assert isinstance(error, StoreUnavailable)
            assert HUSH not in "".join(traceback.format_exception(error))
            assert took < 5
            return "next try" in str(error)

        assert not is_spared()
        wait_until(is_spared, "calls are spared")

    def test_passwords(self, make_cluster, connect):
        """They belong to all nodes."""
        cluster = make_cluster(node_timeout_ms=60_000)
        for node in cluster.nodes:
            node.ask("CONFIG", "SET", "requirepass", "open-sesame")
        hosts = cluster.url.partition("://")[2]
        for login, words in (
            ("", "asks for a password"),
            (f":{HUSH}@", "refused the user name or password"),
        ):
            backend = connect(f"redis+cluster://{login}{hosts}")
            for call in (backend.check, lambda b=backend: b.keyspace("app").incr(b"k", 1)):
                error, _ = failure_of(call)
                assert words in str(error)
                assert HUSH not in "".join(traceback.format_exception(error))
        space = connect(f"redis+cluster://:open-sesame@{hosts}").keyspace("app")
        assert space.incr(b"k", 1) == 1
        assert asyncio.run(space.aincr(b"k", 1)) == 2

    def test_an_old_primary_is_refused(self, make_fake, connect):
        """Each of them is looked at."""

        def reply(number, data):
            if b"SLOTS" in data:
                port = int(fake.url.rpartition(":")[2])
                return b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$9\r\n127.0.0.1\r\n:%d\r\n" % port
            texts = (b"server", b"redis", b"version", b"6.0.9", b"mode", b"cluster")
            return b"+PONG\r\n*6\r\n" + b"".join(b"+%s\r\n" % text for text in texts)

        fake = make_fake(reply)
        error, _ = failure_of(connect(fake.url.replace("redis:", "redis+cluster:")).check)
        assert "redis 6.0.9" in str(error)

    def test_slots_that_nobody_serves(self, make_server, connect):
        """A Cluster that is not complete says so, in time."""
        options = ("--cluster-enabled", "yes", "--cluster-port", free_port())
        node = make_server(*options)
        url = node.url.replace("redis:", "redis+cluster:")
        error, _ = failure_of(connect(url, timeout=0.5).check)
        assert "no node serves" in str(error)
        node.ask("CLUSTER", "ADDSLOTSRANGE", 0, 8000)
        node.ask("CONFIG", "SET", "cluster-require-full-coverage", "no")
        space = connect(url, timeout=0.5).keyspace("app")
        name = next(n for n in NAMES if SLOT_OF_BUCKET[bucket_of(n)] > 8000)
        for call in (lambda: space.incr(name, 1), lambda: asyncio.run(space.aincr(name, 1))):
            error, took = failure_of(call)
            assert isinstance(error, StoreUnavailable)
            assert "slots" in str(error)
            assert took < 5


class TestSlotsThatMove:
    """Keys that go to another node while they are in use."""

    def test_a_map_that_is_old_costs_no_error(self, app, cluster):
        """The node says where the slot went; nothing was done there."""
        slot = SLOT_OF_BUCKET[bucket_of(b"n0")]
        source = cluster.owner(slot)
        target = next(node for node in cluster.primaries if node is not source)
        app.put_many(dict.fromkeys(NAMES, b"1"))
        cluster.move(slot, target)
        try:
            assert app.incr(b"n0", 1) == 2
            assert app.get_many(NAMES) == [b"2", *[b"1"] * 39]
        finally:
            cluster.move(slot, source)
        assert asyncio.run(app.aincr(b"n0", 1)) == 3

    @pytest.mark.parametrize("space", ["app", "cache"])
    def test_every_increment_counts_once(self, backend, cluster, space):
        """Threads and tasks increment while slots go to and fro, key by key."""
        asked = sum(self.times_asked(node) for node in cluster.primaries)
        with Load(backend.keyspace(space), NAMES) as load:
            for name in NAMES[:3]:
                slot = SLOT_OF_BUCKET[bucket_of(name)]
                source = cluster.owner(slot)
                target = next(node for node in cluster.primaries if node is not source)
                for _ in range(2):
                    cluster.begin_move(slot, source, target)
                    cluster.move_keys(slot, source, target)
                    if space == "cache":  # what is one key is served in the midst of a move
                        before = load.acknowledged[name]
                        wait_until(lambda n=name, b=before: load.acknowledged[n] > b, "it is used")
                    cluster.end_move(slot, source, target)
                    load.wait_for_more("the load goes on")
                    source, target = target, source
        load.check()
        assert load.failed == 0, load.messages
        assert sum(self.times_asked(node) for node in cluster.primaries) > asked

    def times_asked(self, node):
        stats = node.ask("INFO", "commandstats")
        _, found, rest = stats.partition(b"cmdstat_asking:calls=")
        return int(rest.partition(b",")[0]) if found else 0

    def test_listing_a_bucket_in_two_halves(self, cluster, connect):
        """It waits, and fails in time; clearing may have removed some, and says so."""
        space = connect(cluster.url, timeout=0.5).keyspace("app")
        slot = SLOT_OF_BUCKET[7]
        names = [n for n in (b"k%d" % number for number in range(2000)) if bucket_of(n) == 7]
        source = cluster.owner(slot)
        target = next(node for node in cluster.primaries if node is not source)
        space.put_many(dict.fromkeys(names, b"v"), 100)
        cluster.begin_move(slot, source, target)
        try:
            source.ask("MIGRATE", "127.0.0.1", target.port, b"hb:{b07}:a:" + names[3], 0, 5000)
            for call in (space.keys, lambda: asyncio.run(space.akeys())):
                error, took = failure_of(call)
                assert "on its way to another node" in str(error)
                assert took < 5
            error, _ = failure_of(space.clear)
            assert "may or may not" in str(error)
            assert may_have_happened(error)
        finally:
            cluster.move_keys(slot, source, target)
            cluster.end_move(slot, source, target)
        assert 0 < len(space.keys()) < len(names)
        assert space.get(names[3]) == b"v"
        assert space.clear() > 0
        cluster.move(slot, source)

    @pytest.mark.parametrize("twin", [False, True], ids=["sync", "async"])
    def test_a_bucket_in_two_halves(self, cluster, connect, twin):
        """What needs both halves waits, and fails in time; what needs one is served."""
        space = connect(cluster.url, timeout=0.5).keyspace("app")
        slot = SLOT_OF_BUCKET[bucket_of(b"n0")]
        source = cluster.owner(slot)
        target = next(node for node in cluster.primaries if node is not source)
        space.put(b"n0", b"1", 100)
        cluster.begin_move(slot, source, target)
        try:
            source.ask(
                "MIGRATE", "127.0.0.1", target.port, f"hb:{{b{bucket_of(b'n0'):02}}}:ai", 0, 5000
            )
            assert (asyncio.run(space.aget(b"n0")) if twin else space.get(b"n0")) == b"1"
            error, took = failure_of(
                (lambda: asyncio.run(space.aincr(b"n0", 1)))
                if twin
                else (lambda: space.incr(b"n0", 1))
            )
            assert isinstance(error, StoreUnavailable)
            assert "on its way to another node" in str(error)
            assert took < 5
        finally:
            cluster.move_keys(slot, source, target)
            cluster.end_move(slot, source, target)
            cluster.move(slot, source)
        assert space.incr(b"n0", 1) == 2

    def test_a_bucket_in_two_halves_whose_nodes_fall_silent(self, cluster, connect):
        """The call tells both: it waited for the slot, and then nobody answered."""
        space = connect(cluster.url, timeout=1).keyspace("app")
        bucket = bucket_of(b"n0")
        slot = SLOT_OF_BUCKET[bucket]
        source = cluster.owner(slot)
        target = next(node for node in cluster.primaries if node is not source)
        space.put(b"n0", b"1", 100)
        cluster.begin_move(slot, source, target)
        stalling = threading.Timer(0.5, lambda: [node.stall() for node in (source, target)])
        try:
            source.ask("MIGRATE", "127.0.0.1", target.port, f"hb:{{b{bucket:02}}}:ai", 0, 5000)
            stalling.start()
            error, _ = failure_of(space.incr, b"n0", 1)
        finally:
            stalling.join()
            for node in (source, target):
                node.resume()
            cluster.move_keys(slot, source, target)
            cluster.end_move(slot, source, target)
            cluster.move(slot, source)
        assert isinstance(error, StoreUnavailable)
        assert "did not answer" in str(error)
        assert "may or may not" in str(error)
        assert may_have_happened(error)
        assert "before, a slot is on its way to another node" in str(error)


class TestNodesThatFail:
    """One node's trouble stays its own, and ends by itself."""

    def test_a_stalled_node_leaves_the_others_alone(self, make_cluster, connect):
        """Its own calls fail in time; its circuit breaker is not theirs."""
        cluster = make_cluster(node_timeout_ms=60_000)
        space = connect(cluster.url, timeout=0.5).keyspace("app")
        space.put_many(dict.fromkeys(NAMES, b"0"))
        stalled, healthy, _ = cluster.primaries
        slow, quick = name_on(stalled, cluster), name_on(healthy, cluster)
        stalled.stall()
        try:
            for call in (
                lambda: space.incr(slow, 1),
                lambda: asyncio.run(space.aincr(slow, 1)),
                lambda: space.put_many(dict.fromkeys(NAMES, b"1")),
                lambda: asyncio.run(space.aput_many(dict.fromkeys(NAMES, b"1"))),
            ):
                error, took = failure_of(call)
                assert isinstance(error, StoreUnavailable)
                assert took < 5
                assert space.get(quick) is not None
            assert any("next try" in str(failure_of(space.get, slow)[0]) for _ in range(4))
            for _ in range(20):
                assert space.get(quick) is not None
        finally:
            stalled.resume()
        wait_until(lambda: self.answers(space, slow), "the node serves again")

    def answers(self, space, name):
        try:
            return space.get(name) is not None
        except StoreUnavailable:
            return False

    def test_a_node_that_is_down_loses_no_lock_on_the_others(self, make_cluster, connect):
        """Those are renewed, though all renewals go out together."""
        cluster = make_cluster(node_timeout_ms=60_000)
        backend = connect(cluster.url, timeout=0.5)
        held = {name: backend.try_lock(name, 2.5) for name in NAMES[:12]}
        dead, *_ = cluster.primaries
        lost = {n for n in held if cluster.owner(SLOT_OF_BUCKET[bucket_of(n)]) is dead}
        assert 0 < len(lost) < 12
        dead.stall()
        try:
            wait_until(
                lambda: len(backend._keeper._leases) == 12 - len(lost),
                "the keeper gives up what it cannot renew",
            )
            time.sleep(0.6)
            for name in set(held) - lost:
                assert held[name].release() is True
            for name in lost:
                assert held[name].release() is False
        finally:
            dead.resume()

    @pytest.mark.parametrize("fault", ["stall", "stop"])
    def test_independent_commands_fail_each_for_itself(self, make_cluster, connect, fault):
        """What was done of others says nothing of the one that cannot be sent."""
        cluster = make_cluster(node_timeout_ms=60_000)
        backend = connect(cluster.url, timeout=0.5)
        dead, *_ = cluster.primaries
        lost = {n for n in range(BUCKETS) if cluster.owner(SLOT_OF_BUCKET[n]) is dead}
        words = [(b"INCR", b"hb:{b%02d}:n" % bucket) for bucket in range(BUCKETS)]
        steps = ask_independently([*map(Command, words, range(BUCKETS))], repeatable=False)
        getattr(dead, fault)()
        try:
            replies = backend._link.run(steps)
        finally:
            if fault == "stall":
                dead.resume()
        assert {n for n, reply in enumerate(replies) if reply != 1} == lost
        for bucket in lost:
            assert isinstance(replies[bucket], StoreUnavailable)
            assert may_have_happened(replies[bucket]) is (fault == "stall")
            assert ("may or may not" in str(replies[bucket])) is (fault == "stall")

    def test_a_replica_that_takes_over_on_request(self, make_cluster, connect):
        """Every increment counts once while primary and replica change places."""
        cluster = make_cluster(replicas=3, node_timeout_ms=60_000)
        space = connect(cluster.url).keyspace("app")
        with Load(space, NAMES) as load:
            for replica in cluster.replicas:
                replica.ask("CLUSTER", "FAILOVER")
                wait_until(lambda r=replica: r.role() == b"master", "the replica takes over")
                load.wait_for_more("the load goes on")
        load.check()
        assert load.failed == 0, load.messages
        assert load.longest < 10

    @pytest.mark.slow
    def test_a_primary_that_is_killed(self, make_cluster, connect):
        """Its replica takes over by itself; calls fail in time until then, and none hangs."""
        cluster = make_cluster(replicas=3)
        space = connect(cluster.url, timeout=0.5).keyspace("app")
        with Load(space, NAMES) as load:
            dead = cluster.primaries[0]
            names = [n for n in NAMES if cluster.owner(SLOT_OF_BUCKET[bucket_of(n)]) is dead]
            dead.stop()
            before = {name: load.acknowledged[name] for name in names}
            wait_until(
                lambda: all(load.acknowledged[name] > before[name] + 5 for name in names),
                "its keys are served again",
                30,
            )
            load.wait_for_more("the load goes on")
        load.check(may_lose=True)
        others = [name for name in NAMES if name not in names]
        for name in others:
            assert int(space.get(name)) >= load.acknowledged[name]
        assert load.failed > 0
        assert load.longest < 1.5

    @pytest.mark.slow
    def test_a_node_that_comes_back(self, make_cluster, connect):
        """Without a replica its keys are out of reach until it is there again."""
        cluster = make_cluster()
        for node in cluster.nodes:
            node.ask("CONFIG", "SET", "cluster-require-full-coverage", "no")
        space = connect(cluster.url, timeout=0.5).keyspace("app")
        with Load(space, NAMES) as load:
            dead = cluster.primaries[1]
            name = name_on(dead, cluster)
            dead.stop()
            failed = load.failed
            wait_until(lambda: load.failed > failed + 20, "calls fail")
            load.wait_for_more("the other nodes serve")
            dead.start()
            before = load.acknowledged[name]
            wait_until(lambda: load.acknowledged[name] > before + 5, "it serves again", 30)
        load.check(may_lose=True)
        assert load.longest < 1.5

    def test_a_cluster_that_is_down_is_left_alone(self, make_cluster, connect):
        """Calls wait a moment, then fail at once: request threads must not pile up."""
        cluster = make_cluster()
        space = connect(cluster.url, timeout=2).keyspace("app")
        space.put_many(dict.fromkeys(NAMES, b"v"))
        live, dead, _ = cluster.primaries
        name = name_on(live, cluster)
        dead.stop()
        wait_until(lambda: b"cluster_state:fail" in live.ask("CLUSTER", "INFO"), "it is down")
        for call in (lambda: space.get(name), lambda: asyncio.run(space.aget(name))) * 2:
            error, took = failure_of(call)
            assert isinstance(error, StoreUnavailable)
            assert took < 1.6
        assert any("next try" in str(failure_of(space.get, name)[0]) for _ in range(4))
        dead.start()
        wait_until(lambda: self.answers(space, name), "it serves again")

    def test_threads_find_the_map_together(self, cluster, connect):
        """One asks for it, the others wait for what it hears."""
        space = connect(cluster.url).keyspace("app")
        before = sum(self.times_asked(node) for node in cluster.primaries)
        barrier = threading.Barrier(16)
        seen = []

        def work():
            barrier.wait()
            seen.append(space.get(b"k"))

        threads = [threading.Thread(target=work) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [None] * 16
        assert sum(self.times_asked(node) for node in cluster.primaries) == before + 1

    def times_asked(self, node):
        stats = node.ask("INFO", "commandstats")
        _, found, rest = stats.partition(b"cmdstat_cluster|slots:calls=")
        return int(rest.partition(b",")[0]) if found else 0
