"""What only the Redis backend does: its layout, its failures, its locks."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import shutil
import subprocess
import threading
import time
import traceback
import weakref
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot
from redis_servers import free_port, wait_until

from hornbeam_state.backends.base import COUNTER_MAX, COUNTER_MIN
from hornbeam_state.backends.redis.alink import CONNECTIONS
from hornbeam_state.backends.redis.backend import RedisBackend
from hornbeam_state.backends.redis.batches import Batch
from hornbeam_state.backends.redis.breaker import Breaker
from hornbeam_state.backends.redis.steps import (
    BUCKETS,
    _bounds,
    _within_64_bits,
    bucket_of,
    milliseconds,
    space_steps,
)
from hornbeam_state.backends.redis.topology import SLOT_OF_BUCKET
from hornbeam_state.config import StoreConfig
from hornbeam_state.errors import (
    ConfigError,
    HornbeamError,
    StoreFull,
    StoreUnavailable,
    WrongType,
)

TIMEOUT = 0.5  # where it is to run out
PATIENCE = 5  # more than anything takes that waits for nothing, or for a short timeout
HUSH = "a-password"


@pytest.fixture
def connect():
    """Return what makes a backend."""
    backends = []

    def make(url, timeout=10):
        backends.append(RedisBackend(StoreConfig.from_url(url, timeout=timeout)))
        return backends[-1]

    yield make
    for backend in backends:
        backend.close()


@pytest.fixture
def connect_to_fake(make_fake, connect):
    """Return what makes a fake server, and the app's keys on it."""

    def make(reply, **options):
        fake = make_fake(reply)
        return fake, connect(fake.url, **options).keyspace("app")

    return make


@pytest.fixture
def app(valkey, connect):
    """The app's keys on a shared, empty server."""
    return connect(valkey.unix_url).keyspace("app")


@pytest.fixture
def admin(valkey):
    with valkey.admin() as admin:
        yield admin


def clients(admin):
    """Return the connections that a server has."""
    return {client["id"] for client in admin.client_list()}


def failure_of(call, *args):
    """Return the error that a call raises, and how long it took."""
    started = time.monotonic()
    with pytest.raises(HornbeamError) as caught:
        call(*args)
    return caught.value, time.monotonic() - started


def everything_about(error):
    """Return all that a log would show of an error."""
    return "".join(traceback.format_exception(error)) + repr(error)


class TestPure:
    """What needs no server."""

    @pytest.mark.parametrize(
        ("ttl", "expected"),
        [
            pytest.param(1, 1000, id="second"),
            pytest.param(0.0001, 1, id="at-least-one"),
            pytest.param(0.0015, 2, id="rounded-up"),
            pytest.param(1e300, 10**13, id="longest"),
        ],
    )
    def test_ttl_in_milliseconds(self, ttl, expected):
        """A time to live never becomes zero, which would mean something else."""
        assert milliseconds(ttl) == expected

    @pytest.mark.parametrize(
        ("prefix", "expected"),
        [
            pytest.param(b"", (b"-", b"+"), id="all"),
            pytest.param(b"ab", (b"[ab", b"(ac"), id="plain"),
            pytest.param(b"a\xff", (b"[a\xff", b"(b"), id="carries"),
            pytest.param(b"\xff\xff", (b"[\xff\xff", b"+"), id="no-upper-end"),
        ],
    )
    def test_bounds_of_a_prefix(self, prefix, expected):
        """The range holds what starts with the prefix and nothing else."""
        assert _bounds(prefix) == expected

    @given(
        st.integers(COUNTER_MIN, COUNTER_MAX),
        st.integers(-(2**66), 2**66) | st.sampled_from([2**63, -(2**63), 2**64 - 1, 1 - 2**64]),
    )
    def test_steps_of_a_large_delta(self, start, delta):
        """Each step fits into INCRBY, and one overflows exactly if the sum does."""
        total, overflows = start, False
        for step in _within_64_bits(delta):
            assert COUNTER_MIN <= step <= COUNTER_MAX
            if not overflows:
                total += step
                overflows = not COUNTER_MIN <= total <= COUNTER_MAX
        assert overflows == (not COUNTER_MIN <= start + delta <= COUNTER_MAX)
        assert overflows or total == start + delta

    @pytest.mark.parametrize(
        ("key", "bucket"), [(b"key", 41), (b"", 0), ("schlüssel".encode(), 54), (b"k" * 4096, 32)]
    )
    def test_buckets_are_fixed_for_good(self, key, bucket):
        """Another bucket would lose what is stored already."""
        assert BUCKETS == 64
        assert bucket_of(key) == bucket

    @pytest.mark.parametrize("space", ["app", "sys", "cache"])
    def test_each_script_stays_in_one_slot(self, space):
        """All keys of a script hash to one slot, so that a Cluster runs it."""
        steps = space_steps(space)
        items = {b"{k%d}" % number: b"v" for number in range(200)}
        operations = [
            *(steps.put(key, b"v", 1) for key in items),
            *(steps.cas(key, None, b"v", 1) for key in items),
            *(steps.incr(key, 1, 1) for key in items),
            *(steps.delete(key) for key in items),
            steps.put_many(items, 1),
            steps.keys(b""),
            steps.usage(b""),
            steps.clear(b""),
        ]
        batches = [request for request in map(next, operations) if isinstance(request, Batch)]
        calls = [command for batch in batches for command in batch.commands if command.script]
        assert len(calls) >= 400
        for words, bucket, _ in calls:
            slots = {key_slot(key) for key in words[3 : 3 + int(words[2])]}
            assert slots == {SLOT_OF_BUCKET[bucket]}

    def test_an_unknown_option_is_refused_at_once(self):
        """The URL is checked before anything connects."""
        for option in ("frobnicate=1", "db=x", "ssl_cert_reqs=maybe"):
            config = StoreConfig.from_url(f"rediss://:{HUSH}@h?{option}")
            with pytest.raises(ConfigError) as caught:
                RedisBackend(config)
            assert option.partition("=")[0].split("_")[0] in str(caught.value).lower()
            assert HUSH not in everything_about(caught.value)


class TestBreaker:
    """When calls are spared a server that is down."""

    def failing(self, breaker, now, times):
        for _ in range(times):
            breaker.failed(now, now)

    def test_it_opens_after_three_failures_in_a_row(self):
        """Fewer, or with a success between, change nothing."""
        breaker = Breaker(lease=1.0)
        self.failing(breaker, 0.0, 2)
        assert breaker.wait(0.0) == 0
        breaker.succeeded()
        self.failing(breaker, 0.0, 2)
        assert breaker.wait(0.0) == 0
        self.failing(breaker, 0.0, 1)
        assert breaker.wait(0.0) == pytest.approx(0.1)
        assert breaker.wait(0.06) == pytest.approx(0.04)

    def test_one_probe_goes_through_at_a_time(self):
        """The others wait until it has had its time."""
        breaker = Breaker(lease=1.0)
        self.failing(breaker, 0.0, 3)
        assert breaker.wait(0.1) == 0
        assert breaker.wait(0.1) == pytest.approx(1.0)
        assert breaker.wait(1.0) == pytest.approx(0.1)
        assert breaker.wait(1.1) == 0, "a probe that never reported blocks the next"

    def test_failed_probes_lengthen_the_pause(self):
        """It doubles up to two seconds, and is short again after a success."""
        breaker = Breaker(lease=1.0)
        self.failing(breaker, 0.0, 3)
        now, pauses = 0.0, []
        for _ in range(7):
            pauses.append(breaker.wait(now))
            now += pauses[-1]
            assert breaker.wait(now) == 0
            breaker.failed(now, now)
        assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0])
        breaker.succeeded()
        assert breaker.wait(now) == 0
        self.failing(breaker, now, 3)
        assert breaker.wait(now) == pytest.approx(0.1)

    def test_late_failures_do_not_lengthen_the_pause(self):
        """Thirty callers that waited on one stalled server are one piece of news."""
        breaker = Breaker(lease=1.0)
        for _ in range(30):
            breaker.failed(0.0, 1.0)
        assert breaker.wait(1.0) == pytest.approx(0.1)


class TestLayout:
    """What lies on the server."""

    def test_names_are_fixed_for_good(self, app, valkey, connect, admin):
        """Other names would lose what is stored already."""
        app.put(b"key", b"v", 100)
        backend = connect(valkey.url)
        backend.keyspace("sys").put(b"key", b"v")
        backend.keyspace("cache").put(b"key", b"v")
        lock = backend.try_lock(b"key", 100)
        assert sorted(admin.keys()) == [
            b"hb:{b41}:a:key",
            b"hb:{b41}:ae",
            b"hb:{b41}:ai",
            b"hb:{b41}:c:key",
            b"hb:{b41}:l:key",
            b"hb:{b41}:s:key",
            b"hb:{b41}:si",
        ]
        assert admin.zrange("hb:{b41}:ai", 0, -1) == [b"key"]
        assert lock.release()

    def test_value_and_index_expire_at_the_same_moment(self, app, admin):
        """The index holds the very time that the value has."""
        app.put(b"key", b"v", 100)
        app.incr(b"n", 1, 200)
        bucket = bucket_of(b"n")
        assert admin.zscore("hb:{b41}:ae", "key") == admin.pexpiretime("hb:{b41}:a:key")
        assert admin.zscore(f"hb:{{b{bucket:02}}}:ae", "n") == admin.pexpiretime(
            f"hb:{{b{bucket:02}}}:a:n"
        )

    def test_listing_scans_nothing(self, app, admin):
        """Neither KEYS nor SCAN runs for the app's own keys."""
        app.put_many({b"a/%d" % number: b"v" for number in range(200)}, 100)
        admin.config_resetstat()
        assert len(app.keys(b"a/")) == 200
        assert app.usage(b"a/").entries == 200
        assert app.clear(b"a/1") == 111
        ran = set(admin.info("commandstats"))
        assert "cmdstat_evalsha" in ran
        assert not ran & {"cmdstat_scan", "cmdstat_keys"}

    def test_long_listings_come_in_pages(self, app):
        """More keys than a page holds, in one bucket, are all listed, counted and cleared."""
        names = [name for n in range(200_000) if bucket_of(name := b"%06d" % n) == 7][:2500]
        app.put_many(dict.fromkeys(names, b"v"))
        assert app.keys() == names
        assert app.usage().entries == 2500
        assert app.clear() == 2500
        assert app.keys() == []

    def test_dead_members_are_trimmed_by_writes(self, app, admin):
        """Keys that come and go for ever, as rate limits do, leave nothing behind."""
        for _ in range(5):
            for number in range(64):
                app.incr(b"rl:%d:%d" % (random.getrandbits(60), number), 1, 0.02)
            time.sleep(0.025)
        app.put_many({b"x%d" % number: b"v" for number in range(400)}, 100)
        members = sum(admin.zcard(name) for name in admin.keys("hb:{*}:ai"))
        expiries = sum(admin.zcard(name) for name in admin.keys("hb:{*}:ae"))
        assert (members, expiries) == (400, 400)

    @pytest.mark.parametrize("how", ["put", "incr", "cas"])
    def test_expiring_keys_leave_nothing_when_nobody_writes_any_more(self, app, admin, how):
        """Where every member of an index expires, so does the index, with the last of them."""
        write = {
            "put": lambda key, ttl: app.put(key, b"v", ttl),
            "incr": lambda key, ttl: app.incr(key, 1, ttl),
            "cas": lambda key, ttl: app.cas(key, None, b"v", ttl),
        }[how]
        app.put(b"key", b"v")
        for number in range(500):
            write(b"rl:%d" % number, 0.15 if number % 2 else 0.05)
        bucket = f"hb:{{b{bucket_of(b'key'):02}}}"
        assert admin.pexpiretime(f"{bucket}:ai") == -1
        app.delete(b"key")
        with admin.pipeline() as together:  # else they may expire in between
            together.pexpiretime(f"{bucket}:ai").pexpiretime(f"{bucket}:ae")
            assert len(set(together.execute())) == 1
        wait_until(lambda: admin.dbsize() == 0, "everything is gone")

    def test_an_index_stays_while_a_member_does(self, app, admin):
        """A value that no longer expires keeps its index from expiring, and the other way."""
        app.put(b"key", b"v", 100)
        assert admin.pexpiretime("hb:{b41}:ai") == admin.pexpiretime("hb:{b41}:a:key")
        app.put(b"key", b"v", 0.05)
        app.put(b"key", b"v")
        assert admin.pexpiretime("hb:{b41}:ai") == -1
        time.sleep(0.06)
        assert app.keys() == [b"key"]
        app.put(b"key", b"v", 0.05)
        wait_until(lambda: admin.dbsize() == 0, "everything is gone")

    def test_counting_trims_what_is_dead(self, app, admin):
        """Expired keys are not counted, however many."""
        names = [name for n in range(200_000) if bucket_of(name := b"%06d" % n) == 7][:2500]
        app.put_many(dict.fromkeys(names, b"v"), 0.02)
        app.put(b"here", b"v")
        wait_until(lambda: app.get(names[0]) is None, "the keys expire")
        assert app.usage().entries == 1
        assert admin.zcard("hb:{b07}:ai") == 0

    def test_a_value_that_vanished_is_not_listed(self, app, admin):
        """Evicted or deleted by hand: the value decides, not the index."""
        app.put_many({b"a": b"v", b"b": b"v"})
        bucket = bucket_of(b"a")
        admin.delete(f"hb:{{b{bucket:02}}}:a:a")
        assert app.keys() == [b"b"]
        assert app.incr(b"a", 1) == 1
        assert app.keys() == [b"a", b"b"]

    def test_scripts_come_back_after_a_flush(self, app, admin):
        """A server that forgot the scripts is given them again."""
        app.put(b"n", b"1")
        admin.script_flush()
        assert app.incr(b"n", 1) == 2
        admin.script_flush()
        app.put_many({b"%d" % number: b"v" for number in range(100)})
        admin.script_flush()
        assert len(app.keys()) == 101
        assert asyncio.run(self.flushed(app, admin)) == 3

    async def flushed(self, app, admin):
        admin.script_flush()
        return await app.aincr(b"n", 1)

    def test_reading_many_sees_writing_many_whole(self, app):
        """Items that are written together are never read half."""
        names = [b"%d" % number for number in range(20)]
        done = threading.Event()
        torn = []

        def read():
            while not done.is_set():
                torn.extend(seen for seen in [set(app.get_many(names))] if len(seen) > 1)

        app.put_many(dict.fromkeys(names, b"v"))
        reader = threading.Thread(target=read)
        reader.start()
        for number in range(200):
            app.put_many(dict.fromkeys(names, b"%d" % number))
        done.set()
        reader.join()
        assert torn == []

    def test_the_cache_makes_room_and_the_app_stays(self, make_server, connect):
        """Under a volatile eviction policy only entries of the cache are evicted."""
        server = make_server("--maxmemory", "8mb", "--maxmemory-policy", "volatile-lru")
        backend = connect(server.unix_url)
        backend.keyspace("app").put(b"mine", b"v" * 1500)
        cache = backend.keyspace("cache")
        for page in range(20):
            cache.put_many({b"%d/%d" % (page, n): b"v" * 1500 for n in range(300)})
        assert backend.keyspace("app").get(b"mine") == b"v" * 1500
        assert cache.usage().evictions > 0
        assert 100 < len(cache.keys()) < 6000


class TestRefusals:
    """What a server says no to, and how it is told."""

    @pytest.mark.parametrize("how", ["url", "unix_url"])
    def test_passwords(self, make_server, connect, how):
        """Each mistake is told from the others, and no message holds a password."""
        server = make_server("--requirepass", "open-sesame")
        base = getattr(server, how)
        scheme, _, rest = base.partition("://")
        cases = {
            base: "asks for a password",
            f"{scheme}://:{HUSH}@{rest}": "refused the user name or password",
            f"{scheme}://someone:{HUSH}@{rest}": "refused the user name or password",
            f"{base}?password={HUSH}": "refused the user name or password",
        }
        for url, words in cases.items():
            backend = connect(url)
            space = backend.keyspace("app")
            for error, _ in (
                failure_of(backend.check),
                failure_of(space.get, b"k"),
                failure_of(space.incr, b"k", 1),
                failure_of(lambda space=space: asyncio.run(space.aget(b"k"))),
                failure_of(lambda space=space: asyncio.run(space.aincr(b"k", 1))),
            ):
                assert isinstance(error, StoreUnavailable)
                assert words in str(error)
                assert HUSH not in everything_about(error) + repr(backend)
        connect(f"{scheme}://:open-sesame@{rest}").check()

    def test_a_password_too_many(self, valkey, connect):
        """A server without a password says so."""
        error, _ = failure_of(connect(valkey.url.replace("://", f"://:{HUSH}@")).check)
        assert "has no password" in str(error)
        assert HUSH not in everything_about(error)

    def test_nobody_there(self, connect):
        """A refused connection names the place and says that nothing happened."""
        backend = connect(f"redis://user:{HUSH}@127.0.0.1:{free_port()}")
        for call in (
            lambda: backend.keyspace("app").put(b"k", b"v"),
            lambda: asyncio.run(backend.keyspace("app").aput(b"k", b"v")),
        ):
            error, took = failure_of(call)
            assert isinstance(error, StoreUnavailable)
            assert "cannot be reached" in str(error)
            assert "redis://user:***@127.0.0.1" in str(error)
            assert "nothing was changed" in str(error)
            assert HUSH not in everything_about(error)
            assert took < PATIENCE

    @pytest.mark.parametrize("space", ["app", "cache"])
    def test_a_full_server(self, make_server, connect, space):
        """Writes say that it is full; what is there can be read, listed and removed."""
        server = make_server()
        keyspace = connect(server.unix_url).keyspace(space)
        keyspace.put_many({b"a": b"1", b"b": b"1"})
        with server.admin() as admin:
            admin.config_set("maxmemory", "1")
        for call in (
            lambda: keyspace.put(b"k", b"v"),
            lambda: keyspace.put_many({b"k%d" % number: b"v" for number in range(9)}),
            lambda: keyspace.add(b"k", b"v"),
            lambda: keyspace.incr(b"a", 1),
            lambda: asyncio.run(keyspace.aput(b"k", b"v")),
        ):
            error, _ = failure_of(call)
            assert isinstance(error, StoreFull)
            assert "maxmemory" in str(error)
        assert keyspace.keys() == [b"a", b"b"]
        assert keyspace.get(b"a") == b"1"
        assert keyspace.delete(b"a") is True
        assert keyspace.clear() == 1

    def test_a_replica(self, make_server, connect):
        """It is refused by `check`, and by a write that meets it later."""
        primary, replica = make_server("--repl-diskless-sync-delay", "0"), make_server()
        with replica.admin() as admin:
            admin.replicaof("127.0.0.1", primary.port)
            wait_until(lambda: admin.info()["master_link_status"] == "up", "it replicates")
        backend = connect(replica.url)
        for call in (
            lambda: backend.keyspace("app").put(b"k", b"v"),
            lambda: backend.keyspace("cache").put(b"k", b"v"),
            backend.check,
        ):
            error, _ = failure_of(call)
            assert isinstance(error, StoreUnavailable)
            assert "replica" in str(error)
            assert "primary" in str(error)

    def test_a_node_of_a_cluster(self, make_server, connect):
        """It is refused by `check`, and by what meets it later."""
        # The port of the cluster's own talk would be ours plus 10,000, which may be none.
        options = ("--cluster-enabled", "yes", "--cluster-port", free_port())
        backend = connect(make_server(*options).url)
        for call in (backend.check, lambda: backend.keyspace("app").put(b"k", b"v")):
            error, _ = failure_of(call)
            assert isinstance(error, StoreUnavailable)
            assert "redis+cluster://" in str(error)

    def test_a_user_with_too_few_rights(self, make_server, connect):
        """The message says which rights are missing."""
        server = make_server()
        with server.admin() as admin:
            admin.acl_setuser(
                "reader", enabled=True, passwords="+pw", keys=["hb:*"], commands=["+get"]
            )
        backend = connect(server.url.replace("://", "://reader:pw@"))
        assert backend.keyspace("app").get(b"k") is None
        error, _ = failure_of(backend.keyspace("app").put, b"k", b"v")
        assert isinstance(error, StoreUnavailable)
        assert "ACL SETUSER" in str(error)

    def test_a_database_too_many(self, valkey, connect):
        """The server's own words are passed on."""
        error, _ = failure_of(connect(f"{valkey.url}/9999").check)
        assert isinstance(error, StoreUnavailable)
        assert "out of range" in str(error)

    def test_tls(self, make_server, connect, redis_binary, tmp_path):
        """An encrypted connection is kept and reused; a certificate of nobody known is refused."""
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
        server = make_server(
            *("--tls-port", str(port), "--tls-auth-clients", "no"),
            *("--tls-cert-file", certificate, "--tls-key-file", key),
            *("--tls-ca-cert-file", certificate),
            binary=redis_binary,
        )
        url = f"rediss://localhost:{port}/0"
        error, _ = failure_of(connect(url).check)
        assert "certificate" in str(error).lower()
        space = connect(f"{url}?ssl_ca_certs={certificate}").keyspace("app")

        async def main():
            return [await space.aincr(b"n", 1) for _ in range(10)]

        with server.admin() as admin:
            before = admin.info("stats")["total_connections_received"]
            assert [space.incr(b"n", 1) for _ in range(10)] == list(range(1, 11))
            assert asyncio.run(main()) == list(range(11, 21))
            assert admin.info("stats")["total_connections_received"] == before + 2

    def test_databases_are_apart(self, valkey, connect):
        """The number in the URL is used, sync and async."""
        first, second = (connect(f"{valkey.url}/{number}").keyspace("app") for number in (0, 1))
        second.put(b"k", b"v")
        try:
            assert first.get(b"k") is None
            assert asyncio.run(second.aget(b"k")) == b"v"
        finally:
            second.delete(b"k")

    @pytest.mark.parametrize(
        ("reply", "kind", "words"),
        [
            pytest.param(
                b"-LOADING Redis is loading the dataset in memory\r\n",
                StoreUnavailable,
                "loading its data",
                id="loading",
            ),
            pytest.param(
                b"-MASTERDOWN Link with MASTER is down\r\n",
                StoreUnavailable,
                "lost its primary",
                id="masterdown",
            ),
            pytest.param(
                b"-MISCONF Redis is configured to save RDB snapshots\r\n",
                StoreUnavailable,
                "MISCONF",
                id="cannot-save",
            ),
            pytest.param(
                b"-BUSY Redis is busy running a script.\r\n", StoreUnavailable, "BUSY", id="busy"
            ),
            pytest.param(
                b"-ERR max number of clients reached\r\n",
                StoreUnavailable,
                "max number of clients",
                id="crowded",
            ),
            pytest.param(
                b"-ERR Error running script (call to f_1): @user_script:3: -OOM command not "
                b"allowed when used memory > 'maxmemory'.\r\n",
                StoreFull,
                "maxmemory",
                id="full-6.2",
            ),
            pytest.param(
                b"-ERR Error running script (call to f_1): @user_script:3: -READONLY You can't "
                b"write against a read only replica.\r\n",
                StoreUnavailable,
                "read-only replica",
                id="replica-6.2",
            ),
            pytest.param(
                b"HTTP/1.1 400 Bad Request\r\n\r\n",
                StoreUnavailable,
                "not Redis",
                id="http",
            ),
            pytest.param(b"", StoreUnavailable, "did not answer", id="mute"),
            pytest.param(None, StoreUnavailable, "ended the connection", id="rude"),
        ],
    )
    @pytest.mark.parametrize("twin", [False, True], ids=["sync", "async"])
    def test_other_answers(self, connect_to_fake, reply, kind, words, twin):
        """Whatever a server says becomes an error of ours that says what to do."""
        _, space = connect_to_fake(
            lambda number, data: reply, timeout=TIMEOUT if reply == b"" else 10
        )
        error, took = failure_of(
            (lambda: asyncio.run(space.aincr(b"k", 1))) if twin else (lambda: space.incr(b"k", 1))
        )
        assert type(error) is kind
        assert words in str(error)
        assert took < PATIENCE

    @pytest.mark.parametrize(
        ("hello", "words"),
        [
            pytest.param(("redis", "6.0.16"), "redis 6.0.16", id="old-redis"),
            pytest.param(("redis", "6.2.0"), None, id="redis"),
            pytest.param(("valkey", "7.2.5"), None, id="valkey"),
            pytest.param(("dragonfly", "1.0"), None, id="another"),
            pytest.param(None, "older than Redis 6.2", id="no-hello"),
        ],
    )
    def test_check_refuses_an_old_server(self, make_fake, connect, hello, words):
        """The oldest that the scripts run on is Redis 6.2 or Valkey 7.2."""
        answer = b"-ERR unknown command 'HELLO'\r\n"
        if hello:
            texts = ("server", hello[0], "version", hello[1], "role", "master")
            answer = b"*6\r\n" + b"".join(b"+%s\r\n" % text.encode() for text in texts)
        backend = connect(make_fake(lambda number, data: b"+PONG\r\n" + answer).url)
        if words is None:
            backend.check()
            return
        error, _ = failure_of(backend.check)
        assert isinstance(error, StoreUnavailable)
        assert words in str(error)


class TestRetries:
    """What is asked twice, and what never."""

    @staticmethod
    def hangs_up_on(first):
        """Close the first connections after they got a command; answer the others 1."""
        return lambda number, data: None if number <= first else b":1\r\n"

    @pytest.mark.parametrize("twin", [False, True], ids=["sync", "async"])
    def test_a_read_is_asked_once_more(self, connect_to_fake, twin):
        """On a new connection; not a third time."""
        fake, space = connect_to_fake(self.hangs_up_on(1))
        assert (asyncio.run(space.attl(b"k")) if twin else space.ttl(b"k")) == 0.001
        assert len(fake.requests) == 2
        fake, space = connect_to_fake(self.hangs_up_on(9))
        failure_of((lambda: asyncio.run(space.attl(b"k"))) if twin else (lambda: space.ttl(b"k")))
        assert len(fake.requests) == 2

    @pytest.mark.parametrize("twin", [False, True], ids=["sync", "async"])
    def test_a_write_that_was_sent_is_not(self, connect_to_fake, twin):
        """The caller is told that nobody knows."""
        fake, space = connect_to_fake(self.hangs_up_on(1))
        error, _ = failure_of(
            (lambda: asyncio.run(space.aincr(b"k", 1))) if twin else (lambda: space.incr(b"k", 1))
        )
        assert "the write may or may not have happened" in str(error)
        assert len(fake.requests) == 1

    @pytest.mark.parametrize("how", ["url", "unix_url"])
    def test_a_restart_between_calls_fails_none(self, make_server, connect, how):
        """A pooled connection that the server closed is noticed before a write is sent on it."""
        server = make_server()
        space = connect(getattr(server, how)).keyspace("app")

        async def main():
            await asyncio.gather(*(space.aput(b"%d" % number, b"v") for number in range(5)))
            server.stop()
            server.start()  # blocks the loop, which cannot have noticed
            assert await asyncio.gather(*(space.aincr(b"n", 1) for _ in range(9)))

        space.put(b"k", b"v")
        server.stop()
        server.start()
        assert space.incr(b"n", 1) == 1
        asyncio.run(main())
        assert space.get(b"n") == b"9"

    def test_service_resumes_by_itself(self, make_server, connect):
        """Callers get errors while the server is gone, and answers when it is back."""
        server = make_server()
        space = connect(server.url).keyspace("app")
        stop = threading.Event()
        seen = []

        def work():
            while not stop.is_set():
                try:
                    space.incr(b"n", 1)
                    seen.append(True)
                except StoreUnavailable:
                    seen.append(False)
                    time.sleep(0.001)

        def works_again():
            return len(seen) > 20 and all(seen[-20:])

        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        wait_until(works_again, "the workers work")
        server.stop()
        wait_until(lambda: not any(seen[-20:]), "the workers notice")
        server.start()
        wait_until(works_again, "the workers work again")
        stop.set()
        for worker in workers:
            worker.join()
        assert int(space.get(b"n")) >= 20

    @pytest.mark.parametrize("how", ["url", "unix_url"])
    def test_a_stalled_server_costs_one_timeout(self, make_server, connect, monkeypatch, how):
        """Reads and writes fail in time, and none is sent again."""
        server = make_server()
        backend = connect(getattr(server, how), TIMEOUT)
        space = backend.keyspace("app")
        sent = []

        def note(send, *args):
            sent.append(args)
            return send(*args)

        for link in (backend._link, backend._alink):
            monkeypatch.setattr(link, "_send", partial(note, link._send))
        for name in (b"sync", b"async"):
            space.put(name, b"0")
        server.stall()
        calls = {
            "get": lambda: space.get(b"sync"),
            "incr": lambda: space.incr(b"sync", 1),
        }
        for name, call in calls.items():
            sent.clear()
            error, took = failure_of(call)
            assert isinstance(error, StoreUnavailable), name
            assert len(sent) == 1, name
            assert 0.9 * TIMEOUT < took < PATIENCE, name
            assert ("may or may not" in str(error)) is (name == "incr")
        sent.clear()
        error, took = failure_of(lambda: asyncio.run(space.aincr(b"async", 1)))
        assert len(sent) == 1
        assert took < PATIENCE
        assert "may or may not" in str(error)
        spared = [failure_of(space.get, b"sync") for _ in range(5)]
        assert any("next try" in str(error) and took < TIMEOUT / 2 for error, took in spared)
        server.resume()

        def answers():
            try:
                return space.get(b"sync") in (b"0", b"1") and space.get(b"async") in (b"0", b"1")
            except StoreUnavailable:
                return False

        wait_until(answers, "the backend answers again")

    def test_a_write_that_got_stuck_was_not_done(self, make_server, connect):
        """A server acts on whole commands only, so half of one changes nothing."""
        server = make_server()
        connect(server.url).keyspace("app").put(b"k", b"before")
        space = connect(server.url, TIMEOUT).keyspace("app")
        server.stall()
        error, took = failure_of(space.put, b"k", b"v" * 2**24)
        assert "nothing was changed" in str(error)
        assert took < 5
        server.resume()
        with server.admin() as admin:
            assert admin.get(f"hb:{{b{bucket_of(b'k'):02}}}:a:k") == b"before"

    def test_an_event_loop_runs_on_during_a_stall(self, make_server, connect):
        """Hundreds of waiting tasks fail together, in one timeout, while others run."""
        server = make_server()
        space = connect(server.unix_url, timeout=1).keyspace("app")
        longest = 0.0

        async def tick():
            nonlocal longest
            while True:
                started = time.monotonic()
                await asyncio.sleep(0.005)
                longest = max(longest, time.monotonic() - started)

        async def main():
            await space.aput(b"k", b"v")
            server.stall()
            ticker = asyncio.create_task(tick())
            started = time.monotonic()
            results = await asyncio.gather(
                *(space.aget(b"k") for _ in range(300)), return_exceptions=True
            )
            took = time.monotonic() - started
            ticker.cancel()
            server.resume()
            assert {type(result) for result in results} == {StoreUnavailable}
            assert any("busy" in str(result) for result in results)
            assert took < 4  # one after the other, on so many connections, it takes 5

        asyncio.run(main())
        assert longest < 0.9  # waiting for the server would take 1


class TestDialling:
    """A connection of one's own, for those who wait for what a server says."""

    def test_it_goes_to_the_server(self, valkey, connect, admin):
        """It is connected, logged in, and nobody else's."""
        backend = connect(valkey.unix_url)
        before = clients(admin)
        connection = backend._link.dial()
        other = backend._link.dial_to(*backend._link.primaries())
        # The kernel accepts them; the server sees them a moment after.
        wait_until(lambda: len(clients(admin) - before) == 2, "the server sees both")
        backend.close()
        connection.send_packed_command(connection.pack_command("PING"), check_health=False)
        assert connection.read_response() == b"PONG"
        connection.disconnect()
        other.disconnect()

    def test_nobody_there(self, connect, make_server):
        """The errors are those of any call."""
        error, _ = failure_of(connect(f"redis://127.0.0.1:{free_port()}")._link.dial)
        assert isinstance(error, StoreUnavailable)
        assert "cannot be reached" in str(error)
        server = make_server("--requirepass", "open-sesame")
        error, _ = failure_of(connect(server.url.replace("://", f"://:{HUSH}@"))._link.dial)
        assert "refused the user name or password" in str(error)
        assert HUSH not in everything_about(error)


class TestAsyncio:
    """Event loops, tasks and their connections."""

    def test_tasks_share_a_bounded_number_of_connections(self, valkey, connect, admin):
        """A thousand tasks at once do not make a thousand connections."""
        before = clients(admin)
        space = connect(valkey.unix_url).keyspace("app")

        async def main():
            await asyncio.gather(*(space.aincr(b"n", 1) for _ in range(1000)))
            return clients(admin) - before

        assert len(asyncio.run(main())) <= CONNECTIONS
        assert space.get(b"n") == b"1000"

    def test_a_loop_takes_its_connections_with_it(self, valkey, connect, admin):
        """Loops come and go; nothing of them stays, on either side."""
        backend = connect(valkey.unix_url)
        before = clients(admin)
        loops = []

        async def main():
            loops.append(weakref.ref(asyncio.get_running_loop()))
            await asyncio.gather(*(backend.keyspace("app").aincr(b"n", 1) for _ in range(10)))

        for _ in range(10):
            asyncio.run(main())
        gc.collect()
        assert [loop() for loop in loops] == [None] * 10
        wait_until(lambda: clients(admin) <= before, "the server sees them closed")

    def test_an_error_that_is_kept_keeps_no_connection(self, valkey, connect, admin):
        """Its traceback leads to the frames of the call, as long as anyone looks at it."""
        before = clients(admin)
        backend = connect(valkey.url)
        space = backend.keyspace("app")
        space.put(b"k", b"v")
        backend.close()
        with asyncio.Runner() as runner:
            with pytest.raises(WrongType) as kept:
                runner.run(space.aincr(b"k", 1))
            backend.close()
            runner.run(asyncio.sleep(0))
            wait_until(lambda: clients(admin) <= before, "it is closed")
        assert kept.value.__traceback__ is not None

    def test_close_reaches_every_loop(self, valkey, connect, admin):
        """A loop in another thread closes its connections, and opens others when it needs them."""
        backend = connect(valkey.unix_url)
        space = backend.keyspace("app")
        before = clients(admin)
        with asyncio.Runner() as runner:
            loop = runner.get_loop()
            thread = threading.Thread(target=loop.run_forever)
            thread.start()
            asyncio.run_coroutine_threadsafe(space.aput(b"k", b"v"), loop).result()
            assert len(clients(admin) - before) == 1
            backend.close()
            wait_until(lambda: clients(admin) <= before, "the loop closes it")
            assert asyncio.run_coroutine_threadsafe(space.aget(b"k"), loop).result() == b"v"
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

    def test_a_backend_that_is_dropped_is_gone(self, valkey):
        """The hook for forks does not keep it alive."""
        backend = RedisBackend(StoreConfig.from_url(valkey.unix_url))
        backend.keyspace("app").put(b"k", b"v")
        gone = weakref.ref(backend)
        del backend
        gc.collect()
        assert gone() is None

    def test_a_child_holds_no_connection_of_its_parent(self, valkey, connect, admin):
        """When the parent closes, the server sees it, though a child lives on."""
        backend = connect(valkey.unix_url)
        before = clients(admin)
        reader, writer = os.pipe()

        async def main():
            await backend.keyspace("app").aput(b"k", b"v")
            backend.keyspace("app").put(b"k", b"v")
            child = os.fork()
            if child == 0:
                os.close(writer)
                os.read(reader, 1)
                os._exit(0)
            assert len(clients(admin) - before) == 2
            await backend.aclose()
            return child

        child = asyncio.run(main())
        wait_until(lambda: clients(admin) <= before, "the server sees it")
        os.close(writer)
        os.waitpid(child, 0)
        os.close(reader)

    @pytest.mark.parametrize("loops", ["asyncio", "uvloop"])
    def test_no_reply_reaches_another_caller(self, valkey, connect, loops):
        """Half of thousands of calls are cancelled at random moments; each other gets its own."""
        factory = asyncio.new_event_loop
        if loops == "uvloop":
            factory = pytest.importorskip("uvloop").new_event_loop
        space = connect(valkey.unix_url).keyspace("app")
        names = [b"key/%d" % number for number in range(100)]
        dice = random.Random(17)

        async def ask(name):
            await asyncio.sleep(dice.random() * 0.05)
            assert await space.aget(name) == name
            [value] = await space.aget_many([name])
            assert value == name

        async def storm():
            tasks = [asyncio.create_task(ask(name)) for name in names * 5]
            for task in dice.sample(tasks, len(tasks) // 2):
                asyncio.get_running_loop().call_later(0.01 + dice.random() * 0.06, task.cancel)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            return [result for result in results if isinstance(result, asyncio.CancelledError)]

        async def main():
            cancelled = 0
            for _ in range(4):
                cancelled += len(await storm())
                assert await asyncio.gather(*map(space.aget, names)) == names
            return cancelled

        space.put_many({name: name for name in names})
        with asyncio.Runner(loop_factory=factory) as runner:
            assert runner.run(main()) > 100

    def test_cancelled_calls_give_their_slots_back(self, make_server, connect):
        """More cancellations than connections, at a server that does not answer."""
        server = make_server()
        space = connect(server.unix_url, timeout=5).keyspace("app")

        async def main():
            await space.aput(b"k", b"v")
            for _ in range(3):
                server.stall()
                tasks = [asyncio.create_task(space.aget(b"k")) for _ in range(2 * CONNECTIONS)]
                await asyncio.sleep(0.02)
                for task in tasks:
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
                assert {type(result) for result in results} == {asyncio.CancelledError}
                server.resume()
                values = await asyncio.gather(*(space.aget(b"k") for _ in range(2 * CONNECTIONS)))
                assert set(values) == {b"v"}

        asyncio.run(main())


class TestLocks:
    """Renewal, loss, and owners that are no more."""

    @pytest.fixture
    def backend(self, valkey, connect):
        return connect(valkey.unix_url)

    def left(self, admin, name=b"lock"):
        [key] = admin.keys(b"hb:{*}:l:" + name) or [None]
        return admin.pttl(key) if key else None

    @pytest.mark.parametrize("twin", [False, True], ids=["sync", "async"])
    def test_a_held_lock_outlives_its_ttl(self, backend, admin, twin):
        """It is renewed in time, again and again, until it is released."""
        held = asyncio.run(backend.atry_lock(b"lock", 1)) if twin else backend.try_lock(b"lock", 1)
        renewals, last = 0, self.left(admin)
        while renewals < 4:
            left = self.left(admin)
            assert left is not None, "it expired while it was held"
            renewals, last = renewals + (left > last), left
            assert backend.try_lock(b"lock", 1) is None
            time.sleep(0.005)
        assert (asyncio.run(held.arelease()) if twin else held.release()) is True
        assert self.left(admin) is None

    def test_one_thread_renews_all_locks(self, backend, admin):
        """However many are held."""
        before = set(threading.enumerate())
        held = [backend.try_lock(b"lock%d" % number, 1.5) for number in range(50)]
        leases = [lock._lease for lock in held]
        first = [lease.expires for lease in leases]
        wait_until(
            lambda: all(lease.expires > was for lease, was in zip(leases, first, strict=True)),
            "all are renewed",
        )
        started = set(threading.enumerate()) - before
        assert [thread.name for thread in started] == ["hornbeam-locks"]
        assert [lock.release() for lock in held] == [True] * 50
        backend.close()
        wait_until(lambda: not any(map(threading.Thread.is_alive, started)), "the thread ends")
        assert backend.try_lock(b"lock", 30).release() is True

    @pytest.mark.parametrize("what", ["deleted", "stolen"])
    def test_a_lost_lock_is_noticed_at_release(self, backend, admin, what):
        """And whoever has it now keeps it."""
        held = backend.try_lock(b"lock", 30)
        [key] = admin.keys("hb:{*}:l:lock")
        if what == "deleted":
            admin.delete(key)
        else:
            admin.set(key, b"another's token", px=30_000)
        assert held.release() is False
        assert admin.exists(key) == (what == "stolen")

    def test_a_lock_lost_between_renewals_is_not_taken_back(self, backend, admin):
        """The keeper stops renewing what is not there any more."""
        held = backend.try_lock(b"lock", 0.1)
        admin.flushdb()
        wait_until(lambda: not backend._keeper._leases, "the keeper notices")
        assert self.left(admin) is None
        assert held.release() is False

    def test_a_dead_owners_lock_becomes_free(self, valkey, backend):
        """A process that is killed renews nothing."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                owner = RedisBackend(StoreConfig.from_url(valkey.unix_url))
                held = owner.try_lock(b"lock", 1)
                os.write(writer, b"1" if held else b"0")
                time.sleep(60)
            finally:
                os._exit(0)
        assert os.read(reader, 1) == b"1"
        assert backend.try_lock(b"lock", 30) is None
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
        wait_until(lambda: backend.try_lock(b"lock", 30) is not None, "it becomes free")

    def test_a_child_leaves_its_parents_lock_alone(self, backend, admin):
        """It neither frees it nor keeps it alive."""
        held = backend.try_lock(b"lock", 30)
        child = os.fork()
        if child == 0:
            free = held.release() is False and backend.try_lock(b"lock", 30) is None
            other = backend.try_lock(b"other", 30)
            os._exit(0 if free and other.release() and not backend._keeper._leases else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert self.left(admin) > 0
        assert held.release() is True

    def test_a_short_stall_loses_no_lock(self, make_server, connect):
        """A renewal that fails is tried again before the lock expires."""
        server = make_server()
        backend = connect(server.unix_url, TIMEOUT)
        held = backend.try_lock(b"lock", 6)
        backend._keeper._leases[held._lease.token].due = time.monotonic()
        server.stall()
        backend._keeper.keep(held._lease)  # wakes the keeper
        wait_until(lambda: held._lease.due > time.monotonic(), "a renewal fails")
        assert held._lease.expires < time.monotonic() + 5.9
        server.resume()
        wait_until(lambda: held._lease.expires > time.monotonic() + 5.5, "it is renewed")
        assert held.release() is True

    def test_a_stall_beyond_the_ttl_loses_the_lock(self, make_server, connect):
        """The owner learns of it even while the server is away."""
        server = make_server()
        backend = connect(server.unix_url, TIMEOUT)
        held = backend.try_lock(b"lock", 0.8)
        server.stall()
        wait_until(lambda: not backend._keeper._leases, "the keeper gives up")
        assert held.release() is False
        server.resume()

    def test_a_cancelled_attempt_leaves_no_lock_behind(self, make_server, connect):
        """The server may grant it to a task that is not there any more."""
        server = make_server()
        backend = connect(server.unix_url, timeout=5)

        async def main():
            await backend.keyspace("app").aget(b"k")
            server.stall()
            task = asyncio.create_task(backend.atry_lock(b"lock", 30))
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            server.resume()

        asyncio.run(main())
        wait_until(lambda: not backend._keeper._leases, "the keeper frees it")
        held = backend.try_lock(b"lock", 30)
        assert held is not None
        assert held.release() is True
