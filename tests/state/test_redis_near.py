"""Reads of the cache from memory, over real servers: freshness, faults, cost."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import re
import select
import socket
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import redis.connection
from redis._parsers import _HiredisParser, _RESP3Parser
from redis_servers import wait_until

from hornbeam_state.backends.redis import feed as redis_feed
from hornbeam_state.backends.redis import near_cache
from hornbeam_state.backends.redis.backend import RedisBackend
from hornbeam_state.backends.redis.feed import Feed
from hornbeam_state.backends.redis.near_cache import NearCache
from hornbeam_state.backends.redis.tracking import Tracker
from hornbeam_state.config import StoreConfig
from hornbeam_state.errors import StoreUnavailable
from hornbeam_state.store import Store


@pytest.fixture(params=["valkey", "redis_server"])
def server(request):
    """Each kind of server, empty, shared with other tests: not to be stopped."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def connect():
    """Return what makes a backend: each is like another process to the others."""
    backends = []

    def make(url, timeout=10, **options):
        backends.append(RedisBackend(StoreConfig.from_url(url, timeout=timeout, **options)))
        return backends[-1]

    yield make
    for backend in backends:
        backend.close()
    wait_until(lambda: near_threads() == [], "the threads have ended")


@pytest.fixture(autouse=True)
def _ageless(monkeypatch):
    """Have no entry go because of its age: what is seen was heard, however slow the machine."""
    monkeypatch.setattr(near_cache, "LONGEST", 1000.0)


@pytest.fixture
def here(server, connect):
    """The cache of a process that listens."""
    return listening(connect(server.unix_url)).keyspace("cache")


@pytest.fixture
def elsewhere(server, connect):
    """The cache of a process that keeps nothing near."""
    return connect(server.unix_url, near_size=0).keyspace("cache")


@pytest.fixture
def deaf(monkeypatch):
    """Return what has every process ignore word of changes from then on."""

    def ignore(self, feed):
        for _ in feed.changes(0.0):
            pass

    return lambda: monkeypatch.setattr(Tracker, "_apply", ignore)


def listening(backend):
    """Have a backend hear of changes."""
    answer_of(backend.keyspace("cache").get, b"-")  # a short timeout may be too short just now
    wait_until(lambda: backend._near.enabled, "it listens")
    return backend


def caught_up(cache, elsewhere):
    """Wait until a process has heard of all that was written up to now."""
    near = cache._near
    near.keep(b"last", b"", near.token(b"last"), time.monotonic(), None)
    elsewhere.put(b"last", b"")
    wait_until(lambda: b"last" not in near._entries, "it has heard")


def reads(server):
    """Return how many commands that read a value a server has carried out."""
    with server.admin() as admin:
        stats = admin.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("get", "mget"))


def listeners(server):
    """Return the connections that a server tells of changes."""
    with server.admin() as admin:
        return [client for client in admin.client_list() if "B" in client["flags"]]


def near_threads():
    return [thread for thread in threading.enumerate() if thread.name == "hornbeam-near"]


def open_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


class TestReading:
    """What is asked of the server, and what is not."""

    def test_a_hit_asks_nobody(self, server, here, elsewhere):
        here.put(b"k", b"v")
        caught_up(here, elsewhere)
        assert here.get(b"k") == b"v"
        before = reads(server)
        assert [here.get(b"k") for _ in range(50)] == [b"v"] * 50
        assert asyncio.run(here.aget(b"k")) == b"v"
        assert here.get_many([b"k", b"k"]) == [b"v", b"v"]
        assert asyncio.run(here.aget_many([b"k"])) == [b"v"]
        assert reads(server) == before

    def test_the_app_asks_every_time(self, server, here, connect):
        """Only the cache may be read from near."""
        for space in ("app", "sys"):
            keys = connect(server.unix_url).keyspace(space)
            keys.put(b"k", b"v")
            before = reads(server)
            assert [keys.get(b"k") for _ in range(5)] == [b"v"] * 5
            assert reads(server) == before + 5

    def test_many_are_asked_for_only_where_they_are_not_near(self, server, here, elsewhere):
        elsewhere.put_many({b"%d" % number: b"v%d" % number for number in range(10)})
        caught_up(here, elsewhere)
        assert here.get(b"3") == b"v3"
        asked = [b"3", b"x", b"5", b"3", b"5"]
        assert here.get_many(asked) == [b"v3", None, b"v5", b"v3", b"v5"]
        before = reads(server)
        assert here.get_many([b"5", b"3"]) == [b"v5", b"v3"]
        assert reads(server) == before
        assert here.get_many([]) == []

    def test_an_absent_key_is_asked_for_every_time(self, server, here):
        before = reads(server)
        assert [here.get(b"x") for _ in range(3)] == [None] * 3
        assert reads(server) == before + 3

    def test_callers_share_no_memory(self, server, connect):
        """Whoever changes what it got changes it for itself."""
        store = Store(
            StoreConfig.from_url(server.unix_url),
            space="cache",
            backend=listening(connect(server.unix_url)),
        )
        store.set("array", np.arange(4))
        store.set("list", [1, [2]])
        for _ in range(3):
            array, nested = store.get("array"), store.get("list")
            assert array.tolist() == [0, 1, 2, 3]
            assert nested == [1, [2]]
            array[:] = 9
            nested[1].append(3)

    def test_nothing_happens_before_the_first_read(self, server, connect):
        """Connecting and writing do not listen; reading the app's keys does not either."""
        backend = connect(server.unix_url)
        backend.check()
        backend.keyspace("cache").put(b"k", b"v")
        backend.keyspace("app").get(b"k")
        assert near_threads() == []

    def test_it_can_be_turned_off(self, server, elsewhere):
        """Then there is no thread and no connection for it."""
        elsewhere.put(b"k", b"v")
        before = reads(server)
        assert [elsewhere.get(b"k") for _ in range(3)] == [b"v"] * 3
        assert reads(server) == before + 3
        assert near_threads() == []

    def test_what_is_kept_stays_within_its_bound(self, server, connect, elsewhere):
        """While ten thousand large values are read."""
        size = 2 * 1024 * 1024
        backend = listening(connect(server.unix_url, near_size=size))
        cache = backend.keyspace("cache")
        for page in range(20):
            keys = [b"%d/%d" % (page, number) for number in range(500)]
            elsewhere.put_many(dict.fromkeys(keys, bytes(10_000)), 5)
            assert cache.get_many(keys) == [bytes(10_000)] * 500
            assert backend._near.used <= size
            elsewhere.delete(keys[0])
        entries = backend._near._entries
        assert sum(len(key) + len(value) for key, (value, _) in entries.items()) <= size


class TestFreshness:
    """What others and this process write."""

    @pytest.mark.parametrize("change", ["put", "put_many", "incr", "cas", "delete", "clear"])
    def test_what_another_process_does_is_seen(self, here, elsewhere, change):
        elsewhere.put(b"k", b"1")
        assert here.get(b"k") == b"1"
        match change:
            case "put":
                elsewhere.put(b"k", b"2")
            case "put_many":
                elsewhere.put_many({b"k": b"2", b"x": b"2"})
            case "incr":
                elsewhere.incr(b"k", 1)
            case "cas":
                assert elsewhere.cas(b"k", b"1", b"2")
            case "delete":
                assert elsewhere.delete(b"k")
            case "clear":
                assert elsewhere.clear() == 1
        expected = None if change in ("delete", "clear") else b"2"
        wait_until(lambda: here.get(b"k") == expected, "it is seen")

    @pytest.mark.parametrize("command", ["FLUSHALL", "FLUSHDB"])
    def test_flushing_the_server_is_seen(self, server, here, elsewhere, command):
        elsewhere.put(b"k", b"v")
        assert here.get(b"k") == b"v"
        with server.admin() as admin:
            admin.execute_command(command)
        wait_until(lambda: here.get(b"k") is None, "it is seen")

    @pytest.mark.parametrize("ttl", [0.05, 0.3])
    def test_an_entry_expires_when_its_key_does(self, here, elsewhere, deaf, ttl):
        """Neither sooner nor later, without word of it from the server."""
        deaf()
        before = time.monotonic()
        elsewhere.put(b"k", b"v", ttl)
        after = last_hit = time.monotonic()
        while here.get(b"k") == b"v":
            last_hit, asked = time.monotonic(), last_hit
            assert asked < after + ttl + 0.001
        assert time.monotonic() > before + ttl - 0.001

    def test_an_expiry_that_is_brought_forward_is_seen(self, server, here, elsewhere):
        elsewhere.put(b"k", b"v", 1000)
        assert here.get(b"k") == b"v"
        with server.admin() as admin:
            [name] = admin.keys("hb:*:c:k")
            admin.pexpire(name, 1)
        wait_until(lambda: here.get(b"k") is None, "it expires")

    @pytest.mark.parametrize("twin", [False, True], ids=["sync", "async"])
    @pytest.mark.parametrize(
        ("operation", "expected"),
        [
            pytest.param(("put", b"k", b"2"), b"2", id="put"),
            pytest.param(("put_many", {b"k": b"2"}), b"2", id="put_many"),
            pytest.param(("add", b"k", b"2"), b"1", id="add"),
            pytest.param(("cas", b"k", b"1", b"2"), b"2", id="cas"),
            pytest.param(("incr", b"k", 1), b"2", id="incr"),
            pytest.param(("delete", b"k"), None, id="delete"),
            pytest.param(("clear",), None, id="clear"),
        ],
    )
    def test_a_process_reads_its_own_writes(self, here, deaf, twin, operation, expected):
        """At once, without word of it from the server."""
        here.put(b"k", b"1")
        assert here.get(b"k") == b"1"
        deaf()
        method, *args = operation
        if twin:
            asyncio.run(getattr(here, f"a{method}")(*args))
        else:
            getattr(here, method)(*args)
        assert here.get(b"k") == expected

    def test_a_failed_comparison_asks_again(self, here, elsewhere, deaf):
        """Else an update would compare with the same stale value again and again."""
        elsewhere.put(b"k", b"1")
        assert here.get(b"k") == b"1"
        deaf()
        elsewhere.put(b"k", b"2")
        assert not here.cas(b"k", b"1", b"3")
        assert here.get(b"k") == b"2"

    def test_a_write_of_unknown_outcome(self, make_server, connect):
        """Nobody in the process sees the old value after it, though it lies near."""
        server = make_server()
        backend = listening(connect(server.unix_url, timeout=0.3))
        cache = backend.keyspace("cache")
        connect(server.unix_url, near_size=0).keyspace("cache").put(b"k", b"1")
        wait_until(lambda: answer_of(cache.get, b"k") == b"1", "it is read")
        server.stall()
        with pytest.raises(StoreUnavailable) as held:
            cache.put(b"k", b"2")
        with pytest.raises(StoreUnavailable):
            cache.get(b"k")
        server.resume()
        wait_until(lambda: answer_of(cache.get, b"k") == b"2", "the write is seen")
        assert "may or may not" in str(held.value)

    def test_a_cancelled_write(self, make_server, connect):
        """As one that failed."""
        server = make_server()
        cache = listening(connect(server.unix_url)).keyspace("cache")

        async def main():
            await cache.aput(b"k", b"1")
            assert await cache.aget(b"k") == b"1"
            server.stall()
            task = asyncio.create_task(cache.aput(b"k", b"2"))
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            server.resume()
            assert await cache.aget(b"k") == b"2"

        asyncio.run(main())

    def test_cancelled_reads(self, here, elsewhere):
        """Hundreds of them leave nothing behind, and nothing wrong."""
        elsewhere.put_many({b"%d" % number: b"%d" % number for number in range(200)})

        async def main():
            for _ in range(5):
                here._near.flush()
                tasks = [asyncio.create_task(here.aget(b"%d" % number)) for number in range(200)]
                await asyncio.sleep(0.002)
                for task in tasks[::2]:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                values = await asyncio.gather(*(here.aget(b"%d" % n) for n in range(200)))
                assert values == [b"%d" % number for number in range(200)]

        asyncio.run(main())

    def test_two_event_loops(self, here, elsewhere):
        """One's write is read by the other at once."""
        with asyncio.Runner() as first, asyncio.Runner() as second:
            for number in range(20):
                first.run(here.aput(b"k", b"%d" % number))
                assert second.run(here.aget(b"k")) == b"%d" % number


def answer_of(call, *args):
    """Return what a call returns, or None while the server is not reached."""
    try:
        return call(*args)
    except StoreUnavailable:
        return None


class TestManyAtOnce:
    """Threads and tasks that read and write the same keys."""

    def test_no_reader_goes_back(self, here, elsewhere):
        """While another process counts, whoever reads sees each number or a later one."""
        seen, failures, done = [0], [], threading.Event()

        def read():
            try:
                while not done.is_set():
                    floor = seen[0]  # what any reader here has seen
                    number = int(here.get(b"n") or 0)
                    assert number >= floor
                    seen[0] = max(seen[0], number)
            except BaseException as error:
                failures.append(error)

        async def aread():
            while not done.is_set():
                floor = seen[0]
                number = int(await here.aget(b"n") or 0)
                assert number >= floor
                seen[0] = max(seen[0], number)
                await asyncio.sleep(0)

        def run_tasks():
            async def main():
                await asyncio.gather(*(aread() for _ in range(4)))

            try:
                asyncio.run(main())
            except BaseException as error:
                failures.append(error)

        readers = [threading.Thread(target=read) for _ in range(4)]
        readers.append(threading.Thread(target=run_tasks))
        for reader in readers:
            reader.start()
        try:
            for number in range(1, 401):
                elsewhere.put(b"n", b"%d" % number)
                if number % 100 == 0:
                    wait_until(lambda at=number: seen[0] >= at, "readers see it")
        finally:
            done.set()
            for reader in readers:
                reader.join()
        assert failures == []

    def test_own_writes_are_always_seen(self, here, elsewhere):
        """By every thread and task that writes, while others write and read the same keys."""
        failures, done = [], threading.Event()

        def stir():
            number = 0
            while not done.is_set():
                number += 1
                elsewhere.put(b"shared", b"%d" % number)
                here.get(b"shared")

        def write(name):
            try:
                for number in range(150):
                    here.put(name, b"%d" % number)
                    assert here.get(name) == b"%d" % number
                    assert here.get_many([b"shared", name])[1] == b"%d" % number
            except BaseException as error:
                failures.append(error)

        async def awrite(name):
            for number in range(50):
                await here.aput(name, b"%d" % number)
                assert await here.aget(name) == b"%d" % number

        stirring = threading.Thread(target=stir)
        writers = [threading.Thread(target=write, args=(b"%d" % n,)) for n in range(4)]
        for thread in (stirring, *writers):
            thread.start()

        async def main():
            await asyncio.gather(*(awrite(b"task/%d" % number) for number in range(8)))

        try:
            asyncio.run(main())
        finally:
            for thread in writers:
                thread.join()
            done.set()
            stirring.join()
        assert failures == []

    def test_one_counter_of_many_threads(self, here):
        """What a thread reads after its own increment is never below it."""
        failures = []

        def count():
            try:
                for _ in range(100):
                    mine = here.incr(b"n", 1)
                    assert int(here.get(b"n")) >= mine
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=count) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert here.get(b"n") == b"400"


class TestFaults:
    """The connection that hears of changes, and what happens to it."""

    def test_a_restarted_server(self, make_server, connect):
        """What was near is gone, and is kept again once the server is heard again."""
        server = make_server()
        backend = listening(connect(server.unix_url))
        cache = backend.keyspace("cache")
        cache.put(b"k", b"v")
        assert cache.get(b"k") == b"v"
        server.stop()
        wait_until(lambda: not backend._near.enabled, "the loss is noticed")
        with pytest.raises(StoreUnavailable):
            cache.get(b"k")
        server.start()
        wait_until(lambda: backend._near.enabled, "it listens again")
        wait_until(lambda: answer_of(backend.check) is None and cache_answers(cache), "it answers")
        assert cache.get(b"k") is None
        cache.put(b"k", b"w")
        caught_up(cache, connect(server.unix_url, near_size=0).keyspace("cache"))
        assert cache.get(b"k") == b"w"
        before = reads(server)
        assert cache.get(b"k") == b"w"
        assert reads(server) == before

    def test_a_killed_connection(self, server, here, elsewhere):
        """All that is near goes with it."""
        elsewhere.put(b"k", b"v")
        assert here.get(b"k") == b"v"
        lost = threading.Event()
        disable = here._near.disable
        here._near.disable = lambda: (disable(), lost.set())
        [listener] = listeners(server)
        with server.admin() as admin:
            admin.client_kill_filter(_id=listener["id"])
        assert lost.wait(10)
        wait_until(lambda: here._near.enabled, "it listens again")
        [other] = listeners(server)
        assert other["id"] != listener["id"]
        elsewhere.put(b"k", b"w")
        wait_until(lambda: here.get(b"k") == b"w", "changes are heard again")

    def test_a_stalled_server(self, make_server, connect, monkeypatch):
        """It is given up after the time it has to answer, and heard again when it goes on."""
        monkeypatch.setattr(redis_feed, "PING_EVERY", 0.1)
        server = make_server()
        backend = listening(connect(server.unix_url, timeout=1.5))
        cache = backend.keyspace("cache")
        cache.put(b"k", b"v")
        caught_up(cache, connect(server.unix_url, near_size=0).keyspace("cache"))
        assert cache.get(b"k") == b"v"
        server.stall()
        assert cache.get(b"k") == b"v"
        wait_until(lambda: not backend._near.enabled, "it is given up")
        assert len(backend._near) == 0
        server.resume()
        wait_until(lambda: backend._near.enabled, "it listens again")

    def test_a_connection_that_falls_silent(self, make_server, connect, monkeypatch):
        """Nothing arrives on it, while all others work: the health check notices."""
        monkeypatch.setattr(redis_feed, "PING_EVERY", 0.1)
        server = make_server()
        with Proxy(server.socket) as proxy:
            backend = listening(connect(proxy.url, timeout=1.5))
            here = backend.keyspace("cache")
            elsewhere = connect(server.unix_url, near_size=0).keyspace("cache")
            elsewhere.put(b"k", b"1")
            assert here.get(b"k") == b"1"
            proxy.silence(b"TRACKING")
            elsewhere.put(b"k", b"2")
            wait_until(lambda: answer_of(here.get, b"k") == b"2", "it is seen")
            wait_until(lambda: backend._near.enabled, "it listens again")

    def test_silence_is_bounded_by_the_hard_limit_too(self, make_server, connect, monkeypatch):
        """Where a server may take its time to answer."""
        monkeypatch.setattr(near_cache, "LONGEST", 0.5)
        server = make_server()
        with Proxy(server.socket) as proxy:
            backend = listening(connect(proxy.url, timeout=60))
            here = backend.keyspace("cache")
            elsewhere = connect(server.unix_url, near_size=0).keyspace("cache")
            elsewhere.put(b"k", b"1")
            assert here.get(b"k") == b"1"
            proxy.silence(b"TRACKING")
            elsewhere.put(b"k", b"2")
            wait_until(lambda: here.get(b"k") == b"2", "it is seen")
            assert backend._near.enabled, "the connection is not given up yet"

    def test_a_user_who_may_not(self, make_server, connect, caplog):
        """One line in the log, no thread, and everything else works."""
        server = make_server()
        with server.admin() as admin:
            admin.acl_setuser(
                "u", enabled=True, passwords="+secret", keys="*",
                commands=["+@all", "-client|tracking"],
            )  # fmt: skip
        url = server.url.replace("://", "://u:secret@")
        with caplog.at_level(logging.DEBUG, logger="hornbeam.store"):
            cache = connect(url).keyspace("cache")
            cache.put(b"k", b"v")
            assert cache.get(b"k") == b"v"
            wait_until(lambda: near_threads() == [], "the thread ends")
            before = reads(server)
            assert [cache.get(b"k") for _ in range(20)] == [b"v"] * 20
            assert reads(server) == before + 20
        [record] = caplog.records
        assert record.levelno == logging.WARNING
        assert "CLIENT TRACKING" in record.message
        assert "secret" not in record.message
        assert near_threads() == []

    def test_a_server_of_one_protocol(self, make_fake, connect, caplog):
        """One that does not know RESP3 is asked once."""

        def reply(number, data):
            if b"HELLO" in data:
                return b"-NOPROTO unsupported protocol version\r\n"
            return b"*1\r\n$-1\r\n" * data.count(b"MGET")

        fake = make_fake(reply)
        cache = connect(fake.url).keyspace("cache")
        assert cache.get(b"k") is None
        wait_until(lambda: caplog.records, "it is logged")
        wait_until(lambda: near_threads() == [], "the thread ends")
        assert cache.get(b"k") is None
        assert len(caplog.records) == 1
        assert sum(b"HELLO" in request for request in fake.requests) == 1

    @pytest.mark.parametrize("reply", [b"-BUSY running a script\r\n", b"-LOADING from disk\r\n"])
    def test_a_server_that_will_do_so_later(self, make_fake, connect, caplog, reply):
        """It is asked again."""

        def answer(number, data):
            if b"HELLO" in data:
                return reply
            return b"*1\r\n$-1\r\n" * data.count(b"MGET")

        fake = make_fake(answer)
        cache = connect(fake.url).keyspace("cache")
        assert cache.get(b"k") is None
        wait_until(
            lambda: sum(b"HELLO" in request for request in fake.requests) > 2, "it is asked again"
        )
        assert caplog.records == []

    def test_a_fault_of_ones_own(self, server, here, elsewhere, monkeypatch, caplog):
        """It is logged; what is near goes, and comes again."""
        apply, faults = Tracker._apply, iter([ZeroDivisionError])

        def fail_once(self, feed):
            for fault in faults:
                raise fault
            apply(self, feed)

        monkeypatch.setattr(Tracker, "_apply", fail_once)
        elsewhere.put(b"k", b"1")
        wait_until(lambda: caplog.records, "it is logged")
        assert caplog.records[0].exc_info[0] is ZeroDivisionError
        wait_until(lambda: here._near.enabled, "it listens again")
        assert here.get(b"k") == b"1"
        elsewhere.put(b"k", b"2")
        wait_until(lambda: here.get(b"k") == b"2", "changes are heard")

    @pytest.mark.parametrize("failing", ["pipe", "thread"])
    def test_nothing_to_spare(self, server, connect, monkeypatch, failing):
        """Without a descriptor or a thread more, reading goes on."""

        def refuse(*_):
            raise OSError if failing == "pipe" else RuntimeError

        backend = connect(server.unix_url)
        cache = backend.keyspace("cache")
        cache.put(b"k", b"v")
        before = open_descriptors()
        with monkeypatch.context() as patch:
            if failing == "pipe":
                patch.setattr(os, "pipe", refuse)
            else:
                patch.setattr(threading.Thread, "start", refuse)
            assert cache.get(b"k") == b"v"
        assert open_descriptors() == before
        listening(backend)


def cache_answers(cache):
    try:
        cache.get(b"-")
    except StoreUnavailable:
        return False
    return True


class TestLife:
    """Beginning, ending, forking."""

    def test_closing_ends_it_and_reading_begins_anew(self, server, connect):
        """Nothing is left of it: no thread, no descriptor, no connection."""
        descriptors = open_descriptors()
        backend = listening(connect(server.unix_url))
        cache = backend.keyspace("cache")
        for number in range(3):
            cache.put(b"k", b"%d" % number)
            listening(backend)
            assert cache.get(b"k") == b"%d" % number
            run = backend._tracker._run
            backend.close()
            backend.close()
            assert run.over.is_set()
            wait_until(lambda: near_threads() == [], "the thread ends")
            assert len(backend._near) == 0
            wait_until(lambda: listeners(server) == [], "the server sees it")
            assert open_descriptors() == descriptors

    def test_closing_on_an_event_loop(self, server, connect):
        backend = connect(server.unix_url)

        async def main():
            await backend.keyspace("cache").aget(b"k")
            wait_until(lambda: backend._near.enabled, "it listens")
            await backend.aclose()

        asyncio.run(main())
        wait_until(lambda: near_threads() == [], "the thread ends")
        assert not backend._near.enabled

    def test_closing_while_it_connects(self, make_server, connect):
        """Takes no longer than the server has to answer."""
        server = make_server()
        backend = connect(server.unix_url, timeout=0.5)
        server.stall()
        with pytest.raises(StoreUnavailable):
            backend.keyspace("cache").get(b"k")
        backend.close()
        wait_until(lambda: near_threads() == [], "the thread ends")
        server.resume()

    def test_closing_and_reading_at_once(self, server, connect):
        """Readers in other threads never fail and never see a stale value."""
        backend = connect(server.unix_url)
        cache = backend.keyspace("cache")
        cache.put(b"k", b"v")
        failures, done = [], threading.Event()

        def read():
            try:
                while not done.is_set():
                    assert cache.get(b"k") == b"v"
            except BaseException as error:
                failures.append(error)

        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        for _ in range(20):
            backend.close()
            time.sleep(0.005)
        done.set()
        for reader in readers:
            reader.join()
        backend.close()
        assert failures == []
        wait_until(lambda: near_threads() == [], "the threads end")

    def test_a_backend_that_is_dropped_is_gone(self, server):
        """And its thread with it."""
        backend = listening(RedisBackend(StoreConfig.from_url(server.unix_url)))
        gone = weakref.ref(backend)
        del backend
        gc.collect()
        assert gone() is None
        wait_until(lambda: near_threads() == [], "the thread ends")
        wait_until(lambda: listeners(server) == [], "the server sees it")

    def test_a_forked_child_listens_for_itself(self, server, here, elsewhere):
        """It knows nothing at first, and leaves its parent's connection alone."""
        elsewhere.put(b"k", b"1")
        assert here.get(b"k") == b"1"
        [listener] = listeners(server)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            with contextlib.suppress(BaseException):
                assert near_threads() == []
                assert len(here._near) == 0
                assert not here._near.enabled
                assert here.get(b"k") == b"1"
                wait_until(lambda: here._near.enabled, "the child listens")
                assert here.get(b"k") == b"1"
                os.write(writer, b"1")
                wait_until(lambda: here.get(b"k") == b"2", "the child hears")
                status = 0
            os._exit(status)
        os.close(writer)
        assert os.read(reader, 1) == b"1"
        assert len(listeners(server)) == 2
        elsewhere.put(b"k", b"2")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        os.close(reader)
        wait_until(lambda: here.get(b"k") == b"2", "the parent hears")
        [still] = listeners(server)
        assert still["id"] == listener["id"]

    def test_a_child_does_not_keep_its_parents_connection(self, server, connect):
        """When the parent closes, the server sees it, though a child lives on."""
        backend = listening(connect(server.unix_url))
        to_child, go_on = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(go_on)
            os.read(to_child, 1)
            os._exit(0)
        [lost] = listeners(server)
        backend._tracker._run.connections[0]._sock.close()  # without a shutdown
        wait_until(
            lambda: lost["id"] not in [one["id"] for one in listeners(server)], "the server sees it"
        )
        os.close(go_on)
        os.waitpid(child, 0)
        os.close(to_child)


class TestSeveralServers:
    """A cache that lies on more than one server: all must be heard."""

    @pytest.fixture
    def track(self):
        """Return what makes a tracker over several backends' servers."""
        trackers = []

        def make(*backends, timeout=10):
            near = NearCache(1024 * 1024)
            links = {str(number): backend._link for number, backend in enumerate(backends)}
            several = SimpleNamespace(
                primaries=lambda: tuple(links),
                dial_to=lambda name, protocol: links[name].dial(protocol=protocol),
            )
            trackers.append(Tracker(several, near, timeout, "somewhere"))
            return trackers[-1], near

        yield make
        for tracker in trackers:
            tracker.close()

    def test_changes_on_each_are_heard(self, valkey, redis_server, connect, track):
        backends = [connect(server.unix_url, near_size=0) for server in (valkey, redis_server)]
        tracker, near = track(*backends)
        tracker.start()
        wait_until(lambda: near.enabled, "both are heard")
        for backend in backends:
            near.keep(b"k", b"v", near.token(b"k"), time.monotonic(), None)
            assert near.get(b"k", time.monotonic()) == b"v"
            backend.keyspace("cache").put(b"k", b"w")
            wait_until(lambda: len(near) == 0, "it is heard")

    def test_one_that_is_lost_is_enough(self, valkey, make_server, connect, track):
        """All that is near goes, since nobody knows what lies where."""
        server = make_server()
        tracker, near = track(*(connect(s.unix_url, near_size=0) for s in (valkey, server)))
        tracker.start()
        wait_until(lambda: near.enabled, "both are heard")
        server.stop()
        wait_until(lambda: not near.enabled, "the loss is noticed")
        wait_until(lambda: listeners(valkey) == [], "the other connection is closed too")
        server.start()
        wait_until(lambda: near.enabled, "both are heard again")

    def test_a_flood_from_one_does_not_drown_the_other(self, valkey, redis_server, connect, track):
        """It is read in turns."""
        flooding, other = (connect(s.unix_url, near_size=0) for s in (valkey, redis_server))
        tracker, near = track(flooding, other)
        tracker.start()
        wait_until(lambda: near.enabled, "both are heard")
        done = threading.Event()

        def flood():
            while not done.is_set():
                flooding.keyspace("cache").put_many({b"%d" % n: b"" for n in range(500)})

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            for _ in range(20):
                near.keep(b"k", b"v", near.token(b"k"), time.monotonic(), None)
                other.keyspace("cache").put(b"k", b"w")
                wait_until(lambda: near.get(b"k", 0.0) is None, "it is heard")
        finally:
            done.set()
            thread.join()
        assert near.enabled


@pytest.mark.parametrize(
    "parser",
    [
        pytest.param(_RESP3Parser, id="python"),
        pytest.param(
            _HiredisParser,
            id="hiredis",
            marks=pytest.mark.skipif(
                not redis.connection.HIREDIS_AVAILABLE, reason="hiredis is not installed"
            ),
        ),
    ],
)
class TestFeed:
    """What a server says, with each of redis-py's parsers."""

    @pytest.fixture
    def feed(self, server, parser):
        connection = redis.connection.UnixDomainSocketConnection(
            path=str(server.socket), protocol=3, parser_class=parser, socket_timeout=5
        )
        connection.connect()
        yield Feed(connection, 5.0, 0.0)
        connection.disconnect()

    def test_names_of_what_changes(self, feed, elsewhere):
        elsewhere.put(b"k", b"v")
        assert list(feed.changes(1.0)) == [[b"k"]]
        elsewhere.put_many({b"%d" % number: b"v" for number in range(100)})
        heard = set()
        while len(heard) < 100:
            for keys in feed.changes(1.0):
                heard.update(keys)
        assert heard == {b"%d" % number for number in range(100)}

    def test_everything(self, feed, server):
        with server.admin() as admin:
            admin.flushall()
        assert list(feed.changes(1.0)) == [None]

    def test_other_spaces_are_not_heard(self, feed, server, connect, elsewhere):
        backend = connect(server.unix_url)
        for space in ("app", "sys"):
            backend.keyspace(space).put(b"k", b"v")
        backend.try_lock(b"k", 5).release()
        elsewhere.put(b"c", b"v")
        assert list(feed.changes(1.0)) == [[b"c"]]

    def test_an_answer_changes_nothing(self, feed):
        feed.keep_up(100.0)
        assert list(feed.changes(100.5)) == []
        feed.keep_up(105.2)

    def test_no_answer_is_a_failure(self, feed):
        feed.keep_up(100.0)
        with pytest.raises(TimeoutError):
            feed.keep_up(105.0)

    def test_much_at_a_time_is_read_in_turns(self, feed, server):
        """And nothing of it is left lying."""
        with server.admin() as admin:
            for page in range(5):
                with admin.pipeline(transaction=False) as pipeline:
                    for number in range(200):
                        pipeline.set(f"hb:{{b{number % 64:02}}}:c:{page}/{number}", "v")
                    pipeline.execute()
        heard, turns = set(), 0
        while len(heard) < 1000:
            # The server may still be about to send some of it.
            assert feed.behind or select.select([feed], [], [], 10)[0]
            turns += 1
            heard.update(key for keys in feed.changes(1.0) for key in keys)
        assert not feed.behind
        assert turns > 1


class TestDial:
    """A connection of one's own."""

    @pytest.mark.parametrize("protocol", [2, 3])
    def test_it_is_connected_and_nobody_elses(self, server, connect, protocol):
        link = connect(server.url)._link
        connections = [link.dial(protocol=protocol) for _ in range(2)]
        for connection in connections:
            data = connection.pack_command(b"PING")
            connection.send_packed_command(data, check_health=False)
            assert connection.read_response() == b"PONG"
            connection.disconnect()
        assert link._pools == {}

    def test_failures_are_translated(self, make_fake, connect, tmp_path):
        fake = make_fake(lambda number, data: b"-NOAUTH no\r\n")
        for url in (fake.url, f"unix://{tmp_path}/nothing"):
            with pytest.raises(StoreUnavailable):
                connect(url)._link.dial(protocol=3)


class Proxy:
    """Passes bytes on between a TCP port and a server's socket, until it is told not to."""

    def __init__(self, path):
        self._path = str(path)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        self._pairs = []  # what each connection has said, and whether it is silenced
        self._sockets = [self._listener]
        self._threads = []

    def __enter__(self):
        self._spawn(self._accept)
        return self

    def __exit__(self, *_):
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join(5)

    def silence(self, word):
        """Let nothing more through on the connections on which the client has said a word."""
        for pair in self._pairs:
            if re.search(word, pair["said"]):
                pair["silent"] = True

    def _spawn(self, target, *args):
        self._threads.append(threading.Thread(target=target, args=args))
        self._threads[-1].start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._path)
                pair = {"said": b"", "silent": False}
                self._pairs.append(pair)
                self._sockets += [client, server]
                self._spawn(self._pass_on, pair, client, server, True)
                self._spawn(self._pass_on, pair, server, client, False)

    def _pass_on(self, pair, source, target, is_client):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if is_client:
                    pair["said"] += data
                if not pair["silent"]:
                    target.sendall(data)
