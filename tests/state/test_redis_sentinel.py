"""The Redis backend behind Sentinel: finding the primary, and following it."""

from __future__ import annotations

import asyncio
import time
import traceback

import pytest
from redis_load import Load
from redis_servers import Server, free_port, wait_until

from hornbeam_state.backends.redis.backend import RedisBackend
from hornbeam_state.backends.redis.steps import bucket_of
from hornbeam_state.config import StoreConfig
from hornbeam_state.errors import HornbeamError, StoreUnavailable

HUSH = "a-password"
NAMES = [b"n%d" % number for number in range(10)]


@pytest.fixture
def connect():
    backends = []

    def make(url, timeout=10):
        backends.append(RedisBackend(StoreConfig.from_url(url, timeout=timeout)))
        return backends[-1]

    yield make
    for backend in backends:
        backend.close()


@pytest.fixture(scope="session")
def two_servers(valkey_binary):
    servers = [Server(valkey_binary).start() for _ in range(2)]
    yield servers
    for server in servers:
        server.close()


@pytest.fixture
def pair(two_servers):
    """A primary, and a server that takes its place in `change_places`; both empty."""
    for server in two_servers:
        server.ask("REPLICAOF", "NO", "ONE")
        server.ask("FLUSHALL")
    return two_servers


@pytest.fixture
def make_sentinel(make_fake):
    """Return what starts a sentinel that names whom it is told to."""

    def make(server):
        def reply(number, data):
            fake.asked += 1
            port = b"%d" % fake.named.port
            return b"*2\r\n$9\r\n127.0.0.1\r\n$%d\r\n%s\r\n" % (len(port), port)

        fake = make_fake(reply)
        fake.named, fake.asked = server, 0
        fake.url = fake.url.replace("redis:", "redis+sentinel:") + "/shop"
        return fake

    return make


def copy(old, new):
    """Do what replication does, at once."""
    for key in old.ask("KEYS", "*"):
        new.ask("RESTORE", key, 0, old.ask("DUMP", key), "REPLACE")


def change_places(old, new):
    """Promote the one and demote the other, as an operator may, without ending a connection."""
    copy(old, new)
    old.ask("REPLICAOF", "127.0.0.1", free_port())


def failure_of(call, *args):
    """Return the error that a call raises, and how long it took."""
    started = time.monotonic()
    with pytest.raises(HornbeamError) as caught:
        call(*args)
    return caught.value, time.monotonic() - started


both = pytest.mark.parametrize("twin", [False, True], ids=["sync", "async"])


@pytest.fixture
def calls():
    """Return what gives `get` and `incr` of a key space, sync or async."""
    runners = []

    def make(space, twin):
        if not twin:
            return space.get, space.incr
        runner = asyncio.Runner()
        runners.append(runner)
        return (
            lambda *args: runner.run(space.aget(*args)),
            lambda *args: runner.run(space.aincr(*args)),
        )

    yield make
    for runner in runners:
        runner.close()


class TestFinding:
    """Which sentinels are asked, and what is made of their answers."""

    def test_dead_sentinels_are_passed_over(self, watched, connect):
        """Wherever they stand in the list; afterwards the one that answered is asked first."""
        scheme, _, rest = watched.url.partition("://")
        backend = connect(f"{scheme}://127.0.0.1:{free_port()},nowhere.invalid,{rest}")
        assert backend.keyspace("app").incr(b"n", 1) == 1
        assert asyncio.run(backend.keyspace("app").aincr(b"n", 1)) == 2
        assert backend._routes._sentinels[0].port == watched.sentinels[0].port

    @both
    def test_a_mute_sentinel_costs_its_share_of_the_timeout(
        self, watched, make_fake, connect, calls, twin
    ):
        mute = make_fake(lambda number, data: b"").url.partition("://")[2]
        _, incr = calls(
            connect(watched.url.replace("://", f"://{mute},"), timeout=3).keyspace("app"), twin
        )
        started = time.monotonic()
        assert incr(b"n", 1) == 1
        assert 0.6 < time.monotonic() - started < 3

    @both
    def test_no_sentinel_at_all(self, connect, calls, twin):
        """The error comes in time, says so, and that nothing was changed."""
        url = f"redis+sentinel://:{HUSH}@127.0.0.1:{free_port()},127.0.0.1:{free_port()}/shop"
        _, incr = calls(connect(url, timeout=0.5).keyspace("app"), twin)

        def is_spared():
            error, took = failure_of(incr, b"n", 1)
            assert isinstance(error, StoreUnavailable)
            assert HUSH not in "".join(traceback.format_exception(error))
            assert took < 5
            if "next try" in str(error):
                return True
            assert "no sentinel answers" in str(error)
            assert "nothing was changed" in str(error)
            return False

        assert not is_spared()
        wait_until(is_spared, "calls are spared")

    @both
    def test_a_service_nobody_knows(self, watched, connect, calls, twin):
        _, incr = calls(connect(watched.url.replace("/shop", "/shoe")).keyspace("app"), twin)
        error, _ = failure_of(incr, b"n", 1)
        assert "know no service 'shoe'" in str(error)

    def test_a_data_node_in_the_place_of_a_sentinel(self, valkey, connect):
        url = valkey.url.replace("redis:", "redis+sentinel:") + "/shop"
        error, _ = failure_of(connect(url).check)
        assert "a sentinel refused" in str(error)

    def test_passwords(self, make_watched, connect):
        """The sentinels have their own; no message shows any."""
        watched = make_watched(sentinels=1, down_after_ms=60_000)
        for server in watched.servers:
            server.ask("CONFIG", "SET", "masterauth", "open-sesame")
            server.ask("CONFIG", "SET", "requirepass", "open-sesame")
        for sentinel in watched.sentinels:
            sentinel.ask("ACL", "SETUSER", "default", "resetpass", ">watch-word")
        place = watched.url.partition("://")[2]
        cases = {
            place: "a sentinel refused",
            f":open-sesame@{place}": "a sentinel refused",
            f":open-sesame@{place}?sentinel_password={HUSH}": "a sentinel refused",
            f"{place}?sentinel_password=watch-word": "asks for a password",
            f":{HUSH}@{place}?sentinel_password=watch-word": "refused the user name or password",
        }
        for rest, words in cases.items():
            backend = connect(f"redis+sentinel://{rest}")
            for call in (
                backend.check,
                lambda b=backend: b.keyspace("app").incr(b"n", 1),
                lambda b=backend: asyncio.run(b.keyspace("app").aincr(b"n", 1)),
            ):
                error, _ = failure_of(call)
                assert words in str(error)
                shown = "".join(traceback.format_exception(error))
                assert not any(secret in shown for secret in (HUSH, "open-sesame", "watch-word"))
        url = f"redis+sentinel://:open-sesame@{place}?sentinel_password=watch-word"
        space = connect(url).keyspace("app")
        assert space.incr(b"n", 1) == 1
        assert asyncio.run(space.aincr(b"n", 1)) == 2

    def test_databases_are_apart(self, watched, connect):
        """The number after the service is that of the data."""
        connect(f"{watched.url}/3").keyspace("app").put(b"k", b"v")
        assert connect(watched.url).keyspace("app").get(b"k") is None
        assert connect(f"{watched.url}/3").keyspace("app").get(b"k") == b"v"

    def test_dialling(self, watched, connect):
        """A connection of one's own goes to the primary."""
        link = connect(watched.url)._link
        assert [address.port for address in link.primaries()] == [watched.primary.port]
        connection = link.dial()
        connection.send_packed_command(connection.pack_command("ROLE"), check_health=False)
        assert connection.read_response()[0] == b"master"
        connection.disconnect()

    def test_dialling_a_replica_fails(self, pair, make_sentinel, connect):
        """A sentinel may be behind: what it names is looked at."""
        pair[1].ask("REPLICAOF", "127.0.0.1", free_port())
        backend = connect(make_sentinel(pair[1]).url, timeout=0.5)
        error, _ = failure_of(backend._link.dial)
        assert isinstance(error, StoreUnavailable)
        assert "replica" in str(error)


class TestFollowing:
    """The primary becomes another server."""

    @both
    def test_a_write_goes_on_to_the_new_primary(self, pair, make_sentinel, connect, calls, twin):
        """The old one refuses, which did nothing: the same call is done by the new one."""
        old, new = pair
        sentinel = make_sentinel(old)
        get, incr = calls(connect(sentinel.url).keyspace("app"), twin)
        assert incr(b"n", 1) == 1
        change_places(old, new)
        sentinel.named = new
        assert incr(b"n", 1) == 2
        assert get(b"n") == b"2"

    @both
    def test_many_writes_go_on_together(self, pair, make_sentinel, connect, twin):
        """A transaction is repeated as a whole."""
        old, new = pair
        sentinel = make_sentinel(old)
        app, cache = map(connect(sentinel.url).keyspace, ("app", "cache"))
        app.put(b"k", b"v")
        change_places(old, new)
        sentinel.named = new
        items = dict.fromkeys(NAMES, b"v")
        if twin:
            asyncio.run(app.aput_many(items))
            asyncio.run(cache.aput_many(items))
        else:
            app.put_many(items)
            cache.put_many(items)
        assert app.get_many(NAMES) == cache.get_many(NAMES) == [b"v"] * len(NAMES)

    @both
    def test_it_waits_for_the_sentinels_to_agree(self, pair, make_sentinel, connect, calls, twin):
        """They name the old one for a while after it stepped down; then the call goes on."""
        old, new = pair
        sentinel = make_sentinel(old)
        _, incr = calls(connect(sentinel.url).keyspace("app"), twin)
        incr(b"n", 1)
        change_places(old, new)
        begun = sentinel.asked

        class Behind:
            @property
            def port(self):
                return (new if sentinel.asked > begun + 4 else old).port

        sentinel.named = Behind()
        assert incr(b"n", 1) == 2
        assert sentinel.asked > begun + 4

    @pytest.fixture
    def _two_seconds_to_spare(self, monkeypatch):
        """Have calls stop trying long before their time is up: the last try must have enough."""
        name = "hornbeam_state.backends.redis.sentinel.is_late"
        monkeypatch.setattr(name, lambda deadline, _: time.monotonic() > deadline - 2)

    @both
    @pytest.mark.usefixtures("_two_seconds_to_spare")
    def test_nobody_steps_up(self, pair, make_sentinel, connect, calls, twin):
        """The call fails in time, with what the last server said."""
        old, new = pair
        _, incr = calls(connect(make_sentinel(old).url, timeout=2.5).keyspace("app"), twin)
        incr(b"n", 1)
        change_places(old, new)
        error, took = failure_of(incr, b"n", 1)
        assert isinstance(error, StoreUnavailable)
        assert "replica" in str(error)
        assert took < 5

    @both
    def test_nobody_steps_up_and_the_sentinel_falls_silent(
        self, pair, make_fake, connect, calls, twin
    ):
        """Time runs out over asking it; what the last server said is still the reason."""
        old, new = pair
        port = b"%d" % old.port
        answers = [b"*2\r\n$9\r\n127.0.0.1\r\n$%d\r\n%s\r\n" % (len(port), port)]
        fake = make_fake(lambda number, data: answers[0] if answers else b"")
        url = fake.url.replace("redis:", "redis+sentinel:") + "/shop"
        _, incr = calls(connect(url, timeout=0.5).keyspace("app"), twin)
        incr(b"n", 1)
        change_places(old, new)
        answers.clear()
        error, took = failure_of(incr, b"n", 1)
        assert isinstance(error, StoreUnavailable)
        assert "replica" in str(error)
        assert took < 5

    @both
    def test_a_primary_that_was_replaced_is_left(self, pair, make_sentinel, connect, calls, twin):
        """Though it goes on serving, and its connections are open: nobody has told it yet."""
        old, new = pair
        sentinel = make_sentinel(old)
        get, incr = calls(connect(sentinel.url).keyspace("app"), twin)
        incr(b"n", 1)
        sentinel.named = new
        new.ask("SET", f"hb:{{b{bucket_of(b'n'):02}}}:a:n", "77")
        wait_until(lambda: get(b"n") == b"77", "the new primary is read")
        assert incr(b"n", 1) == 78

    @both
    def test_an_old_primary_that_comes_back_is_not_asked(
        self, make_server, make_sentinel, connect, calls, twin
    ):
        """It was killed and restarts as a primary, empty: its address is not trusted."""
        old, new = make_server(), make_server()
        sentinel = make_sentinel(old)
        get, incr = calls(connect(sentinel.url).keyspace("app"), twin)
        incr(b"n", 1)
        copy(old, new)
        old.stop()
        sentinel.named = new
        old.start()
        time.sleep(1.1)  # what was heard of the sentinel is old by then
        assert get(b"n") == b"1"
        assert incr(b"n", 1) == 2

    @both
    def test_sentinels_that_are_gone_stop_nothing(self, pair, make_sentinel, connect, calls, twin):
        """What is open goes on being used."""
        sentinel = make_sentinel(pair[0])
        _, incr = calls(connect(sentinel.url).keyspace("app"), twin)
        incr(b"n", 1)
        sentinel.close()
        started = time.monotonic()
        total = 1
        while time.monotonic() < started + 1.2:
            total += 1
            assert incr(b"n", 1) == total

    def test_the_sentinels_are_asked_once_a_second(self, pair, make_sentinel, connect):
        """By one of many callers."""
        sentinel = make_sentinel(pair[0])
        started = time.monotonic()
        with Load(connect(sentinel.url).keyspace("app"), NAMES) as load:
            wait_until(lambda: sentinel.asked > 2, "they are asked again")
            load.wait_for_more("the load goes on")
        load.check()
        assert load.failed == 0
        assert sentinel.asked <= 3 + (time.monotonic() - started)

    def test_a_switch_on_request(self, make_watched, connect):
        """Callers go on with the replica within a second or two; no increment counts twice."""
        watched = make_watched(sentinels=1, down_after_ms=60_000)
        space = connect(watched.url, timeout=3).keyspace("app")
        with Load(space, NAMES) as load:
            watched.fail_over()
            new = watched.primary
            before = new.ask("INFO", "commandstats")
            wait_until(lambda: new.ask("INFO", "commandstats") != before, "it is in use")
            routes = space._run.__self__._routes
            wait_until(lambda: routes._primary.port == new.port, "the new primary is known")
            load.wait_for_more("the load goes on")
        load.check(may_lose=True)  # what the old primary still took after the promotion
        assert load.longest < 7  # the old primary is not told before 8 have passed

    @pytest.mark.slow
    def test_a_primary_that_is_demoted_much_later(self, make_watched, connect):
        """By then nobody uses it; what was counted since is all there."""
        watched = make_watched()
        space = connect(watched.url, timeout=3).keyspace("app")
        space.put(b"k", b"before")
        old = watched.primary
        watched.fail_over()
        time.sleep(2)  # then nobody goes on without asking
        with Load(space, NAMES) as load:
            wait_until(lambda: old.role() == b"slave", "the old primary is demoted", 30)
            load.wait_for_more("the load goes on")
        load.check()
        assert load.failed == 0, load.messages

    @pytest.mark.slow
    @pytest.mark.parametrize("how", ["stop", "stall"])
    def test_a_primary_that_dies(self, make_watched, connect, how):
        """The sentinels promote its replica; calls fail in time until then, and none hangs."""
        watched = make_watched()
        space = connect(watched.url, timeout=0.5).keyspace("app")
        dead = watched.primary
        with Load(space, NAMES) as load:
            getattr(dead, how)()
            wait_until(lambda: load.failed > 0, "calls fail")
            wait_until(lambda: watched.primary is not dead, "the replica is promoted", 30)
            load.wait_for_more("it serves")
        load.check(may_lose=True)
        assert load.longest < 1.5
        if how == "stall":
            dead.resume()
