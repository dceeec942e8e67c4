"""Calls over Redis: what every transport does, and what is certain when something breaks."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import gc
import logging
import os
import random
import re
import signal
import threading
import time
from math import inf
from pathlib import Path

import numpy as np
import pytest
from child_processes import Child
from rpc_helpers import NODE, SECRET, NodeProcess, NodeThread, a_backend
from transport_contract import TransportContract, listen, run
from transport_helpers import Answers, ask, eventually, miss_deadline

from hornbeam_state import codec
from hornbeam_state.backends.redis import batches
from hornbeam_state.errors import ConfigError, DeadlineExceeded, NodeDown, Overloaded
from hornbeam_state.transports.redis import RedisServer, aconnect, connect, envelope, inbox, intake
from hornbeam_state.transports.redis import server as redis_server
from hornbeam_state.transports.redis.bodies import Body
from hornbeam_state.transports.redis.envelope import Answer, Envelope, Kind, fields_of
from hornbeam_state.transports.redis.keys import InboxKeys, NodeKeys

KEYS = NodeKeys(NODE)


@pytest.fixture
def server(valkey):
    with NodeThread(valkey.url) as running:
        yield running


@pytest.fixture
def open_channel(valkey):
    """Return what connects to a node, and closes it after."""
    with contextlib.ExitStack() as stack:

        def open_(node=NODE, url=valkey.url, **options):
            backend = a_backend(url)
            stack.callback(backend.close)
            return stack.enter_context(contextlib.closing(connect(backend, node, **options)))

        yield open_


@pytest.fixture
def channel(open_channel, server):
    return open_channel()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "ran"


@pytest.fixture
def signed(valkey, open_channel):
    """A node and a channel that sign, and a way behind their backs."""
    with NodeThread(valkey.url, secret=SECRET) as node, valkey.admin() as admin:
        yield node, open_channel(secret=SECRET), admin


@pytest.fixture
def quickly(monkeypatch):
    """Have casts that were left taken over soon."""
    monkeypatch.setattr(intake, "ABANDONED_MS", 200)
    monkeypatch.setattr(intake, "_TEND_EVERY_S", 0.05)
    monkeypatch.setattr(intake, "_BLOCK_S", 0.05)


@pytest.fixture
def watchful(monkeypatch):
    """Have a node notice soon that a process does not read its answers any more."""
    monkeypatch.setattr(inbox, "ALIVE_MS", 400)
    monkeypatch.setattr(inbox, "_ALIVE_EVERY_S", 0.05)
    monkeypatch.setattr(inbox, "_BLOCK_S", 0.05)
    monkeypatch.setattr(redis_server, "_WATCH_EVERY_S", 0.5)


class TestContract(TransportContract):
    pass


def test_a_channel_knows_what_the_node_says(channel):
    assert channel.peer == {"pid": os.getpid(), "said": {}}
    assert channel.connected


async def test_a_channel_is_made_on_a_loop(valkey, server):
    backend = a_backend(valkey.url)
    channel = await aconnect(backend, NODE)
    assert await channel.acall(ask("echo", 1)) == [1]
    channel.close()
    await backend.aclose()


def test_the_rest_of_the_time_travels_along(channel):
    [left] = channel.call(ask("timeout", timeout=60.5))
    assert 30 < left <= 60.5
    assert channel.call(ask("timeout", timeout=float("inf"))) == [float("inf")]


def test_channels_of_a_process_share_threads(valkey, server, open_channel):
    with contextlib.closing(a_backend(valkey.url)) as backend:
        before = own_threads()
        channels = [connect(backend, NODE) for _ in range(5)]
        assert len(own_threads() - before) == 2
        assert [channel.call(ask("echo", 1)) for channel in channels] == [[1]] * 5
        for channel in channels[1:]:
            channel.close()
            channel.close()
        assert channels[0].call(ask("echo", 1)) == [1]
        channels[0].close()
        eventually(lambda: own_threads() <= before)


def own_threads():
    """Return the threads that channels have; a node in this process has others."""
    names = ("hornbeam-calls", "hornbeam-inbox")
    return {thread for thread in threading.enumerate() if thread.name in names}


# What is large.


@pytest.mark.parametrize("size", [2**18 - 100, 2**18, 2**20, 2**20 + 1, 3_000_001])
def test_values_of_any_size_come_back(channel, size):
    data = os.urandom(size)
    assert channel.call(ask("echo", data, "x", data)) == [data, "x", data]


@pytest.mark.slow
def test_an_array_of_100_mb_comes_back(channel, valkey):
    array = np.random.default_rng(0).random(12_500_000)
    [result] = channel.call(ask("echo", array, timeout=60))
    assert np.array_equal(result, array)
    with valkey.admin() as admin:
        eventually(lambda: not list(admin.scan_iter("hb:*:part:*")))


def test_chunks_of_any_size_come_in_order(channel, listening):
    data = os.urandom(700_000)
    chunks = listen(channel, listening, ask("", data, count=5))
    assert chunks == [[number, data] for number in range(5)]


def test_what_is_too_large_is_refused_on_both_sides(valkey, open_channel):
    with NodeThread(valkey.url, most_bytes=400_000):
        small, large = open_channel(most_bytes=300_000), open_channel()
        with pytest.raises(TypeError, match="300000 are the most"):
            small.call(ask("echo", b"x" * 300_001))
        with pytest.raises(TypeError, match="400000 are the most"):
            large.call(ask("echo", b"x" * 500_000))
        with pytest.raises(TypeError, match="300000 are the most"):
            small.call(ask("give", bytes=350_000))
        with pytest.raises(TypeError, match="options of"):
            small.call(ask("echo", big="x" * 300_000))
        assert small.call(ask("echo", 1)) == [1]


# Who may run a call.


def test_a_call_that_nobody_took_is_cancelled_for_certain(open_channel, valkey, way):
    """And the node, when it comes, does not run it."""
    channel = open_channel()
    with pytest.raises(DeadlineExceeded) as caught:
        run(channel, way, ask("hang", label="late", timeout=0.05))
    assert not caught.value.sent
    assert channel.pending == 0
    with NodeThread(valkey.url) as server:
        assert channel.call(ask("echo", 1)) == [1]
        assert server.handler.events == []


def test_large_values_of_a_call_that_never_runs_are_removed(valkey, open_channel):
    channel = open_channel()
    future = channel.submit(ask("echo", os.urandom(600_000)))
    with valkey.admin() as admin:
        eventually(lambda: admin.xlen(KEYS.calls))
        assert list(admin.scan_iter("hb:*:part:*"))
        future.cancel()
        eventually(lambda: not list(admin.scan_iter("hb:*:part:*")))


def test_processes_that_ended_long_ago_are_forgotten(valkey, monkeypatch):
    monkeypatch.setattr(intake, "_FORGET_MS", 100)
    with valkey.admin() as admin:
        for _ in range(3):
            with NodeThread(valkey.url) as server:
                eventually(lambda: admin.exists(KEYS.calls) and admin.xinfo_groups(KEYS.calls))
                eventually(lambda: admin.xinfo_consumers(KEYS.calls, "hb"))
                assert server.server.error is None
            time.sleep(0.15)
        assert len(admin.xinfo_consumers(KEYS.calls, "hb")) <= 1


def test_a_call_that_runs_was_sent(channel, server):
    error = miss_deadline(
        lambda seconds: channel.call(ask("hang", label="x", timeout=seconds)),
        lambda: server.handler.events,
    )
    assert error.sent


def test_calls_that_wait_run_when_the_node_comes(open_channel, valkey):
    channel = open_channel()
    futures = [channel.submit(ask("echo", number)) for number in range(200)]
    futures[7].cancel()
    with NodeThread(valkey.url, concurrency=3):
        for number, future in enumerate(futures):
            if number != 7:
                assert future.result(20) == [number]


def test_a_node_given_up_tells_what_had_begun(valkey, open_channel):
    with NodeThread(valkey.url, concurrency=2) as server:
        channel = open_channel()
        began = [channel.submit(ask("hang", label=f"{n}")) for n in range(2)]
        eventually(lambda: len(server.handler.events) == 2)
        waits = [channel.submit(ask("echo", n)) for n in range(3)]
        with valkey.admin() as admin:
            eventually(lambda: admin.xlen(KEYS.calls) == 3)
            channel.fail("gpu@ml-1 is gone")
            eventually(lambda: admin.xlen(KEYS.calls) == 0)
        for futures, sent in ((began, True), (waits, False)):
            for future in futures:
                error = future.exception(20)
                assert isinstance(error, NodeDown)
                assert str(error) == "gpu@ml-1 is gone"
                assert error.sent is sent
        assert not channel.connected
        with pytest.raises(NodeDown, match="is gone") as caught:
            channel.call(ask("echo"))
        assert not caught.value.sent


@pytest.mark.parametrize("way", ["call", "acall", "submit", "stream", "astream"])
def test_a_closed_channel_fails_whoever_waits(channel, way):
    outcomes = []

    def wait():
        try:
            if "stream" in way:
                listen(channel, way, ask("", pause=0.01))
            else:
                run(channel, way, ask("hang", label="x"))
        except Exception as error:
            outcomes.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    eventually(lambda: channel.pending)
    time.sleep(0.05)
    channel.close()
    channel.close()
    thread.join(20)
    assert [type(error) for error in outcomes] == [NodeDown]


def test_a_node_killed_before_it_took_a_call_does_not_run_it_later(valkey, open_channel, file):
    """It had read the call, but not taken it: so the caller still could."""
    channel = open_channel()
    with NodeProcess(valkey.url, file) as node:
        assert channel.call(ask("work", label="first"))
        node.stop()
        late = channel.submit(ask("work", label="late", timeout=0.3))
        kept = channel.submit(ask("work", label="kept"))
        error = late.exception(20)
        assert isinstance(error, DeadlineExceeded)
        assert not error.sent
        node.kill()
    with NodeProcess(valkey.url, file) as node:
        assert kept.result(20)
        assert node.ran() == ["first", "first-done", "kept", "kept-done"]


def test_a_node_killed_while_it_runs_a_call_does_not_run_it_again(valkey, open_channel, file):
    channel = open_channel()
    with NodeProcess(valkey.url, file) as node:
        running = channel.submit(ask("work", label="once", seconds=60))
        eventually(lambda: node.ran() == ["once"])
        node.kill()
    with NodeProcess(valkey.url, file) as node:
        assert channel.call(ask("work", label="next"))
        assert node.ran() == ["once", "next", "next-done"]
    channel.fail("it is gone")
    assert running.exception(20).sent


def test_a_stopped_node_runs_nothing_that_is_late(valkey, open_channel, file):
    channel = open_channel()
    with NodeProcess(valkey.url, file) as node:
        node.stop()
        with pytest.raises(DeadlineExceeded) as caught:
            channel.call(ask("work", label="late", timeout=0.2))
        assert not caught.value.sent
        node.go_on()
        assert channel.call(ask("work", label="next"))
        assert node.ran() == ["next", "next-done"]


@pytest.mark.slow
def test_no_call_runs_twice_whatever_dies(valkey, open_channel, tmp_path):
    """Calls and cancellations from threads, while the node is killed and stopped all the time."""
    channel, file = open_channel(), tmp_path / "ran"
    outcomes: dict[str, object] = {}
    ending = threading.Event()

    def call(worker):
        number = 0
        while not ending.is_set():
            number += 1
            label = f"{worker}-{number}"
            timeout = random.choice((0.05, 0.3, 5))
            try:
                channel.call(ask("work", label=label, seconds=0.002, timeout=timeout))
                outcomes[label] = True
            except (DeadlineExceeded, NodeDown) as error:
                outcomes[label] = error

    threads = [threading.Thread(target=call, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for number in range(8):
        with NodeProcess(valkey.url, file) as node:
            time.sleep(random.uniform(0.1, 0.6))
            if number % 2:
                node.stop()
                time.sleep(0.4)
                node.go_on()
                time.sleep(0.2)
    ending.set()
    for thread in threads:
        thread.join(30)
    with NodeProcess(valkey.url, file) as node:
        assert channel.call(ask("work", label="last"))
        began = collections.Counter(label for label in node.ran() if not label.endswith("-done"))
    assert max(began.values()) == 1
    assert len(outcomes) > 200
    for label, outcome in outcomes.items():
        if outcome is True:
            assert began[label] == 1
        elif not outcome.sent:
            assert began[label] == 0


def test_two_processes_of_one_name_share_the_calls(valkey, open_channel, tmp_path):
    channel, gate = open_channel(), tmp_path / "gate"
    with (
        NodeProcess(valkey.url, tmp_path / "a") as first,
        NodeProcess(valkey.url, tmp_path / "b") as second,
    ):
        # None ends before each has some, however late one of them wakes.
        asks = [ask("work", label=f"{n}", gate=str(gate)) for n in range(300)]
        futures = [channel.submit(each) for each in asks]
        eventually(lambda: first.ran() and second.ran())
        gate.touch()
        pids = {future.result(20)[0] for future in futures}
        ran = [label for label in first.ran() + second.ran() if "done" not in label]
        assert len(pids) == 2
        assert sorted(map(int, ran)) == list(range(300))


def test_the_time_of_the_caller_does_not_matter(valkey, open_channel, monkeypatch):
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    with NodeThread(valkey.url, secret=SECRET):
        channel = open_channel(secret=SECRET)
        assert channel.call(ask("echo", 1)) == [1]
        [left] = channel.call(ask("timeout", timeout=60))
        assert 30 < left <= 60


def test_a_server_with_another_clock_is_noticed(signed):
    """As after a failover to a machine whose clock is wrong."""
    _, channel, _ = signed
    channel._client.clock.set(0)
    assert channel.call(ask("echo", 1)) == [1]


# Bounds.


def test_no_more_calls_wait_than_may(valkey, open_channel, way):
    with NodeThread(valkey.url, concurrency=1, most_waiting=3) as server:
        channel = open_channel()
        running = channel.submit(ask("hang", label="x"))
        eventually(lambda: server.running() == 1)
        waiting = [channel.submit(ask("hang", label="x")) for _ in range(3)]
        with valkey.admin() as admin:
            eventually(lambda: admin.xlen(KEYS.calls) == 3)
        with pytest.raises(Overloaded, match="3 calls wait"):
            run(channel, way, ask("echo"))
        for future in waiting:
            future.cancel()
        running.cancel()
        with valkey.admin() as admin:
            eventually(lambda: admin.xlen(KEYS.calls) == 0)
        assert run(channel, way, ask("echo", 1)) == [1]


def test_late_calls_make_room(valkey, open_channel):
    """Those of a caller that died, while the node is away."""

    def work():
        channel = connect(a_backend(valkey.url), NODE)
        futures = [channel.submit(ask("echo")) for _ in range(1024)]
        while any(one.entry is None for one in channel.waiting.values()):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)
        return len(futures)

    Child(work).outcome(code=-signal.SIGKILL)
    channel = open_channel()
    with valkey.admin() as admin:
        assert admin.xlen(KEYS.calls) == 1024
        with pytest.raises(Overloaded):
            channel.call(ask("echo"))
        _let_time_pass(admin, seconds=60)
    with pytest.raises(DeadlineExceeded):
        channel.call(ask("echo", timeout=0.1))


def _let_time_pass(admin, seconds):
    """Make the calls that wait as late as they are after so long."""
    entries = admin.xrange(KEYS.calls)
    with admin.pipeline() as pipe:
        for entry, fields in entries:
            pipe.xdel(KEYS.calls, entry)
            pipe.xadd(KEYS.calls, fields | {b"d": b"%d" % (int(fields[b"d"]) - 1000 * seconds)})
        pipe.execute()


@pytest.mark.slow
async def test_ten_thousand_callers_of_a_slow_node_are_served_or_refused(valkey, open_channel):
    with NodeThread(valkey.url, concurrency=4, most_waiting=100):
        channel = open_channel(most_pending=20_000)
        calls = [channel.acall(ask("echo", n, seconds=0.01)) for n in range(10_000)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        served = [one for one in outcomes if isinstance(one, list)]
        refused = [one for one in outcomes if isinstance(one, Overloaded)]
        assert len(served) + len(refused) == 10_000
        assert len(served) >= 100
        assert channel.pending == 0


def test_a_caller_that_stops_reading_does_not_fill_the_server(
    valkey, server, open_channel, monkeypatch
):
    monkeypatch.setattr(redis_server, "_WATCH_EVERY_S", 0.1)

    def work():
        own = connect(a_backend(valkey.url), NODE)
        next(own.stream(ask("", b"x" * 100_000, label="slow")))
        os.kill(os.getpid(), signal.SIGSTOP)

    child = Child(work)
    _, status = os.waitpid(child.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert open_channel().call(ask("echo", 1)) == [1]
    with valkey.admin() as admin:
        inboxes = list(admin.scan_iter("hb:*:rpc:inbox:*"))
        eventually(lambda: any(admin.xlen(key) >= 80 for key in inboxes))
        assert all(admin.xlen(key) < 100 for key in inboxes)
        child.kill()
        admin.delete(*admin.scan_iter("hb:*:rpc:alive:*"))  # as they expire
        eventually(lambda: server.handler.events)  # it is noticed that nobody reads any more


# Casts.


def test_a_cast_is_done(channel, server):
    channel.cast(ask("hang", label="cast"))
    eventually(lambda: server.handler.events == ["cast began"])


async def test_a_cast_is_done_when_the_node_comes(valkey, open_channel):
    channel = open_channel()
    await channel.acast(ask("hang", label="cast"))
    with NodeThread(valkey.url) as server:
        await asyncio.to_thread(eventually, lambda: server.handler.events == ["cast began"])


def test_casts_of_one_key_are_done_once(channel, server, valkey):
    for _ in range(3):
        channel.cast(ask("hang", label="one"), key="k")
    channel.cast(ask("hang", label="other"), key="l")
    eventually(lambda: len(server.handler.events) == 2)
    assert sorted(server.handler.events) == ["one began", "other began"]


def test_large_values_of_casts_of_one_key_do_not_mix(valkey, open_channel):
    channel = open_channel()
    first, second = os.urandom(600_000), os.urandom(700_000)
    channel.cast(ask("note", first), key="k")
    channel.cast(ask("note", second), key="k")
    handler, seen = Answers(), []

    async def note(request):
        seen.append(request.values)

    handler.note = note
    with NodeThread(valkey.url, handler=handler), valkey.admin() as admin:
        eventually(lambda: not admin.xlen(KEYS.calls))
        assert seen == [[first]]
        eventually(lambda: not list(admin.scan_iter("hb:*:part:*")))


def test_a_cast_whose_node_died_is_done_by_the_next(valkey, open_channel, file, quickly):
    channel = open_channel()
    with NodeProcess(valkey.url, file) as node:
        channel.cast(ask("work", label="cast", seconds=60))
        eventually(lambda: node.ran() == ["cast"])
        node.kill()
    handler = Answers()
    handler.work = lambda request: handler.hang(request)
    with NodeThread(valkey.url, handler=handler):
        eventually(lambda: handler.events == ["cast began"])


def test_a_cast_that_was_done_is_not_done_again(valkey, open_channel, server, quickly):
    """Its node died between doing it and saying so; here somebody puts it into the stream again."""
    channel = open_channel()
    server.handler.note = _noted(server.handler)
    with valkey.admin() as admin:
        server.close()
        channel.cast(ask("note"))
        [(_, fields)] = admin.xrange(KEYS.calls)
        with NodeThread(valkey.url, handler=server.handler):
            eventually(lambda: server.handler.events == ["noted"])
            eventually(lambda: admin.xlen(KEYS.calls) == 0)
            admin.xadd(KEYS.calls, fields)
            eventually(lambda: admin.xlen(KEYS.calls) == 0)
            assert server.handler.events == ["noted"]


def _noted(handler):
    async def note(request):
        handler.events.append("noted")

    return note


def test_a_cast_that_fails_is_tried_again_and_then_kept(valkey, open_channel, quickly, caplog):
    handler = Answers()
    handler.poison = _raising(handler)
    with NodeThread(valkey.url, handler=handler), valkey.admin() as admin:
        channel = open_channel()
        channel.cast(ask("poison", "payload"))
        eventually(lambda: admin.xlen(KEYS.dead))
        [(_, letter)] = admin.xrange(KEYS.dead)
        assert handler.events == ["tried"] * intake.MOST_DELIVERIES
        assert letter[b"reason"] == b"it raised ValueError"
        assert admin.xlen(KEYS.calls) == 0
        assert "payload" not in caplog.text
        assert channel.call(ask("echo", 1)) == [1]


def _raising(handler):
    async def poison(request):
        handler.events.append("tried")
        raise ValueError("no: payload")

    return poison


@pytest.mark.slow
def test_a_cast_that_kills_its_node_is_kept_in_the_end(valkey, open_channel, file, quickly):
    channel = open_channel()
    channel.cast(ask("work", label="deadly", dies=True, timeout=float("inf")))
    with valkey.admin() as admin:
        for number in range(1, intake.MOST_DELIVERIES + 1):
            with NodeProcess(valkey.url, file) as node:
                eventually(lambda number=number, node=node: node.ran() == ["deadly"] * number)
        with NodeThread(valkey.url):
            eventually(lambda: admin.xlen(KEYS.dead))
        [(_, letter)] = admin.xrange(KEYS.dead)
        assert letter[b"reason"] == b"it was begun 5 times, and never ended"


# What is forged, altered, sent twice or makes no sense.


def test_signed_calls_of_all_kinds(signed, way):
    _, channel, _ = signed
    array = np.arange(200_000)
    values = run(channel, way, ask("echo", 1, array))
    assert values[0] == 1
    assert np.array_equal(values[1], array)
    assert list(channel.stream(ask("", count=3))) == [[0], [1], [2]]


def test_a_cancellation_is_signed_too(signed):
    node, channel, _ = signed
    future = channel.submit(ask("hang", label="x"))
    eventually(lambda: node.handler.events)
    channel._client.backend.publish(b"rpc:" + NODE.encode(), codec.encode([b"", b"\0" * 16]))
    future.cancel()
    eventually(lambda: node.handler.events == ["x began", "x cancelled"])


@pytest.mark.parametrize("signer", ["node", "caller"])
def test_both_sides_sign_or_none(valkey, open_channel, signer):
    of_node, of_caller = (SECRET, None) if signer == "node" else (None, SECRET)
    with (
        NodeThread(valkey.url, secret=of_node),
        pytest.raises(ConfigError, match="HORNBEAM_SECRET"),
    ):
        open_channel(secret=of_caller)


def test_what_cannot_be_signed_fails_that_call_only(signed, way):
    _, channel, _ = signed
    with pytest.raises(TypeError):
        run(channel, way, ask("echo", odd=object()))
    assert run(channel, way, ask("echo", 1)) == [1]


def test_a_short_secret_is_refused(open_channel):
    with pytest.raises(ConfigError, match="16 at least"):
        open_channel(secret="short")


def _dead_reason(admin):
    eventually(lambda: admin.xlen(KEYS.dead) or None)
    [(_, letter)] = admin.xrange(KEYS.dead)
    return letter[b"reason"].decode()


def _captured(channel, admin, node, **options):
    """Return the fields of a call, caught on its way."""
    node.close()
    future = channel.submit(ask("hang", label="captured", **options))
    eventually(lambda: admin.xlen(KEYS.calls))
    [(_, fields)] = admin.xrange(KEYS.calls)
    return fields, future


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({b"s": b""}, "not signed", id="unsigned"),
        pytest.param({b"s": b"x" * 32}, "signature is wrong", id="forged"),
        pytest.param({b"h": b"hb\x01\x08rubbish"}, "signature is wrong", id="altered head"),
        pytest.param({b"d": b"soon"}, "no deadline", id="no deadline"),
    ],
)
def test_what_is_not_signed_right_is_refused(signed, change, reason, caplog):
    node, channel, admin = signed
    fields, future = _captured(channel, admin, node)
    future.cancel()
    eventually(lambda: not admin.xlen(KEYS.calls))
    admin.xadd(KEYS.calls, fields | change)
    with NodeThread(node.url, secret=SECRET) as other:
        assert reason in _dead_reason(admin)
        assert channel.call(ask("echo", 1)) == [1]
        assert other.handler.events == []
    assert "captured" not in caplog.text


def test_altered_values_are_refused(signed):
    node, channel, admin = signed
    fields, future = _captured(channel, admin, node)
    admin.delete(KEYS.calls)
    body = fields[b"b"]
    admin.xadd(KEYS.calls, fields | {b"b": body[:-1] + b"\xff"})
    with NodeThread(node.url, secret=SECRET) as other:
        error = future.exception(20)
        assert "not those that were signed" in str(error)
        assert other.handler.events == []


def test_a_call_that_is_sent_again_is_refused(signed, caplog):
    node, channel, admin = signed
    fields, future = _captured(channel, admin, node)
    with NodeThread(node.url, secret=SECRET) as other:
        eventually(lambda: other.handler.events == ["captured began"])
        admin.xadd(KEYS.calls, fields)
        eventually(lambda: "was here before" in caplog.text)
        assert other.handler.events == ["captured began"]
        future.cancel()
        eventually(lambda: len(other.handler.events) == 2)
        admin.xadd(KEYS.calls, fields)
        eventually(lambda: not admin.xlen(KEYS.calls))
        assert channel.call(ask("echo", 1)) == [1]
        assert len(other.handler.events) == 2


def test_a_call_that_is_sent_again_can_be_cancelled(channel, server, valkey, caplog):
    """As a server may do that lost what became of it; nobody signs here."""
    with valkey.admin() as admin:
        fields, future = _captured(channel, admin, server, timeout=600)
        with NodeThread(server.url) as other:
            eventually(lambda: other.handler.events == ["captured began"])
            admin.xadd(KEYS.calls, fields)
            eventually(lambda: "began before" in caplog.text)
            future.cancel()
            eventually(lambda: other.handler.events == ["captured began", "captured cancelled"])


def test_a_call_for_another_node_is_refused(signed):
    node, channel, admin = signed
    fields, future = _captured(channel, admin, node)
    other_keys = NodeKeys("other@ml-1")
    admin.xadd(other_keys.calls, fields)
    with NodeThread(node.url, "other@ml-1", secret=SECRET) as other:
        eventually(lambda: admin.xlen(other_keys.dead))
        assert other.handler.events == []
    future.cancel()


def test_a_longer_deadline_written_beside_a_signed_call_does_not_count(signed, monkeypatch):
    monkeypatch.setattr(envelope, "SKEW_MS", 0)  # what a caller may be wrong about the time
    node, channel, admin = signed
    seconds, _ = admin.time()
    channel._client.clock.set(1000 * (seconds - 4))  # so it is signed as four seconds old
    fields, future = _captured(channel, admin, node, timeout=3)
    future.cancel()
    late = {**fields, b"d": b"%d" % ((seconds + 3600) * 1000)}
    admin.xadd(KEYS.calls, late)
    with NodeThread(node.url, secret=SECRET) as other:
        eventually(lambda: not admin.xlen(KEYS.calls))
        assert channel.call(ask("echo", 1)) == [1]
        assert other.handler.events == []


def test_a_forged_answer_is_not_believed(signed, caplog):
    node, channel, admin = signed
    future = channel.submit(ask("hang", label="x"))
    eventually(lambda: node.handler.events)
    [pending] = channel.waiting.values()
    data = Body(["forged"]).joined()
    answer = Answer(Kind.RESULTS, pending.id, 0, 0, len(data), data)
    admin.xadd(InboxKeys(channel._client.id).inbox, {"m": answer.to_bytes(), "s": b""})
    eventually(lambda: "an answer is refused" in caplog.text)
    assert not future.done()
    future.cancel()


def test_a_fault_of_what_watches_is_told(valkey, watchful, caplog):
    class Faulty(Answers):
        def greet(self, hello):
            if self.events:
                raise ZeroDivisionError
            return super().greet(hello)

    with NodeThread(valkey.url, handler=Faulty()) as node:
        node.handler.events.append("began")
        eventually(lambda: "misses who has gone" in caplog.text)


def test_a_closing_node_signs_no_answer_to_what_is_not_signed(signed):
    """Else who has no secret could tell a caller that its call, which runs, was never begun."""
    node, channel, admin = signed
    running = channel.submit(ask("hold", "done"))
    eventually(lambda: node.running() == 1)
    closing = threading.Thread(target=node.close, args=(20,))
    closing.start()
    eventually(lambda: node.server._runner.closing)
    [pending] = channel.waiting.values()
    forged = _head(1.0, id=pending.id, inbox=channel._client.id)
    _await_a_look(node, admin.xadd(KEYS.calls, {b"d": b"99999999999999", b"h": forged}))
    node.release()
    assert running.result(10) == ["done"]
    closing.join()


def _await_a_look(node, entry):
    """Wait until a closing node has looked whether it is to refuse a call, and has said so."""
    eventually(lambda: node.server._refuse_from == b"(" + entry)
    time.sleep(0.2)


def test_a_closing_node_does_not_refuse_a_call_that_runs_when_it_is_sent_again(signed):
    node, channel, admin = signed
    node.close()
    future = channel.submit(ask("hold", "done"))
    eventually(lambda: admin.xlen(KEYS.calls))
    [(_, fields)] = admin.xrange(KEYS.calls)
    with NodeThread(node.url, secret=SECRET) as other:
        eventually(lambda: other.running() == 1)
        closing = threading.Thread(target=other.close, args=(20,))
        closing.start()
        eventually(lambda: other.server._runner.closing)
        _await_a_look(other, admin.xadd(KEYS.calls, fields))
        other.release()
        assert future.result(10) == ["done"]
        closing.join()


def _head(timeout, *, id=bytes(16), inbox=b""):
    return Envelope(
        kind=Kind.CALL,
        id=id,
        node=NODE,
        inbox=inbox,
        size=0,
        sent=1,
        target="",
        method="echo",
        options={},
        timeout=timeout,
    ).head()


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({b"x": b"y"}, id="no fields of ours"),
        pytest.param({b"d": b"99999999999999", b"h": b"rubbish"}, id="no head"),
        pytest.param({b"d": b"99999999999999", b"h": b"hb\x01\x08\x80\xff"}, id="damaged head"),
        pytest.param({b"d": b"9" * 5000, b"h": b""}, id="a deadline of 5000 digits"),
        pytest.param(
            {b"d": b"99999999999999", b"h": _head(-inf)}, id="a timeout of minus infinity"
        ),
    ],
)
def test_a_poisoned_entry_becomes_a_dead_letter_at_once(channel, valkey, server, fields, caplog):
    with valkey.admin() as admin:
        admin.xadd(KEYS.calls, fields)
        assert _dead_reason(admin).startswith("refused")
        assert channel.call(ask("echo", 1)) == [1]
        assert admin.xlen(KEYS.calls) == 0
        assert admin.xpending(KEYS.calls, "hb")["pending"] == 0


def test_rubbish_in_an_inbox_harms_nobody(channel, valkey):
    with valkey.admin() as admin:
        name = InboxKeys(channel._client.id).inbox
        for fields in ({"x": "y"}, {"m": "z"}, {"m": b"hb\x01\x08" + b"\xff" * 60}):
            admin.xadd(name, fields)
        assert channel.call(ask("echo", 1)) == [1]


# Servers that go and come.


@pytest.mark.slow
def test_a_server_that_starts_again_is_used_again(make_server, open_channel):
    valkey = make_server()
    with NodeThread(valkey.url) as server:
        channel = open_channel(url=valkey.url)
        assert channel.call(ask("echo", 1)) == [1]
        lost = channel.submit(ask("hang", label="lost", timeout=3))
        eventually(lambda: server.handler.events)
        valkey.stop()
        with pytest.raises(NodeDown) as caught:
            channel.call(ask("echo", timeout=5))
        assert not caught.value.sent
        valkey.start()
        assert isinstance(lost.exception(20), DeadlineExceeded)
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(NodeDown, DeadlineExceeded):
                assert channel.call(ask("echo", 2, timeout=2)) == [2]
                break
            assert time.monotonic() < deadline


@pytest.mark.slow
def test_a_server_that_stalls_hangs_nobody(make_server, open_channel):
    valkey = make_server()
    with NodeThread(valkey.url) as server:
        backend = a_backend(valkey.url, timeout=0.5)
        channel = connect(backend, NODE)
        waiting = channel.submit(ask("hang", label="x", timeout=1))
        eventually(lambda: server.handler.events)
        valkey.stall()
        started = time.monotonic()
        with pytest.raises((NodeDown, DeadlineExceeded)):
            channel.call(ask("echo", timeout=1))
        assert isinstance(waiting.exception(10), DeadlineExceeded)
        channel.close()
        assert time.monotonic() - started < 10
        valkey.resume()
        backend.close()


@pytest.mark.slow
def test_calls_go_on_after_a_failover(make_watched, open_channel):
    watched = make_watched()
    with NodeThread(watched.url):
        channel = open_channel(url=watched.url)
        assert channel.call(ask("echo", 1)) == [1]
        watched.fail_over()
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(NodeDown, DeadlineExceeded):
                assert channel.call(ask("echo", 2, timeout=2)) == [2]
                break
            assert time.monotonic() < deadline


def test_redis_itself_carries_calls(redis_server, open_channel, quickly):
    handler = Answers()
    handler.poison = _raising(handler)
    with NodeThread(redis_server.url, handler=handler, secret=SECRET):
        channel = open_channel(url=redis_server.url, secret=SECRET)
        data = os.urandom(700_000)
        assert channel.call(ask("echo", data)) == [data]
        assert list(channel.stream(ask("", data, count=2))) == [[0, data], [1, data]]
        with pytest.raises(DeadlineExceeded):
            channel.call(ask("hang", label="call", timeout=0.1))
        channel.cast(ask("poison"))
        with redis_server.admin() as admin:
            eventually(lambda: admin.xlen(KEYS.dead))


def test_a_cluster_carries_calls(cluster, open_channel):
    """Nodes and inboxes are spread over its servers."""
    array = np.arange(100_000)
    with contextlib.ExitStack() as stack:
        names = [f"gpu{number}@ml" for number in range(4)]
        for name in names:
            stack.enter_context(NodeThread(cluster.url, name))
        for name in names:
            channel = open_channel(name, url=cluster.url)
            assert np.array_equal(channel.call(ask("echo", array))[0], array)
            assert list(channel.stream(ask("", count=3))) == [[0], [1], [2]]
            channel.cast(ask("hang", label="x"))


@pytest.mark.parametrize("where", ["valkey", "cluster"])
def test_a_call_that_a_stalled_server_may_have_taken_may_have_been_sent(where, request):
    """Else it would be sent once more, and run twice."""
    group = request.getfixturevalue(where)
    servers = getattr(group, "nodes", [group])
    with (
        NodeThread(group.url),
        contextlib.closing(a_backend(group.url, timeout=0.5)) as backend,
        contextlib.closing(connect(backend, NODE)) as channel,
    ):
        assert channel.call(ask("echo", 1)) == [1]
        for server in servers:
            server.stall()
        try:
            with pytest.raises(NodeDown) as caught:
                channel.call(ask("hang", label="x"))
        finally:
            for server in servers:
                server.resume()
        assert caught.value.sent
        # It came; whether it also begins depends on when the node hears that nobody waits.
        eventually(lambda: _added(group) == 2)


def _added(group):
    """Return how many calls ever came to the node."""
    command = batches.Command((b"XINFO", b"STREAM", KEYS.calls), KEYS.bucket)
    with contextlib.closing(a_backend(group.url)) as backend:
        (reply,) = backend.link.run(batches.ask(command, repeatable=True))
    return fields_of(reply)[b"entries-added"]


def test_the_rights_in_the_documentation_are_enough(make_server, open_channel):
    """And each side has its own."""
    valkey = make_server()
    text = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    for rule in re.findall(r"    (ACL SETUSER (?:.+\\\n)*.+)", text):
        valkey.ask(*rule.replace("\\\n", " ").replace("PASSWORD", "secret").split())
    url = valkey.url.replace("://", "://{}:secret@")
    data = os.urandom(700_000)
    with NodeThread(url.format("node"), secret=SECRET) as server:
        channel = open_channel(url=url.format("caller"), secret=SECRET)
        assert channel.call(ask("echo", data)) == [data]
        assert list(channel.stream(ask("", count=2))) == [[0], [1]]
        channel.cast(ask("hang", label="cast"))
        eventually(lambda: server.handler.events[1:] == ["cast began"])
        miss_deadline(
            lambda seconds: channel.call(ask("hang", label="call", timeout=seconds)),
            lambda: "call began" in server.handler.events,
        )
        eventually(lambda: "call cancelled" in server.handler.events)
        valkey.ask("XADD", KEYS.calls, "*", "rub", "bish")
        eventually(lambda: valkey.ask("XLEN", KEYS.dead))
        server.close()
    with pytest.raises(Exception, match="does not let this user"):
        a_backend(url.format("caller")).keyspace("app").put(b"x", b"y")


# Nodes that close, and forks.


def test_a_closing_node_finishes_what_runs_and_refuses_what_waits(valkey, open_channel):
    with NodeThread(valkey.url, concurrency=1) as server:
        channel = open_channel()
        running = channel.submit(ask("hold", "done"))
        eventually(lambda: server.running() == 1)
        waiting = channel.submit(ask("echo", "waits"))
        with valkey.admin() as admin:
            eventually(lambda: admin.xlen(KEYS.calls) == 1)
        closing = threading.Thread(target=server.close, args=(20,))
        closing.start()
        error = waiting.exception(10)
        assert isinstance(error, NodeDown)
        assert not error.sent
        assert not running.done()
        server.release()
        assert running.result(10) == ["done"]
        closing.join()


def test_a_closing_node_refuses_what_comes(valkey, open_channel):
    """Also while it waits for what runs."""
    with NodeThread(valkey.url, concurrency=1) as server:
        channel = open_channel()
        running = channel.submit(ask("hold", "done"))
        eventually(lambda: server.running() == 1)
        closing = threading.Thread(target=server.close, args=(20,))
        closing.start()
        eventually(lambda: server.server._runner.closing)
        with pytest.raises(NodeDown, match="closing") as caught:
            channel.call(ask("echo", "late"))
        assert not caught.value.sent
        assert not running.done()
        server.release()
        closing.join()
        assert running.result(10) == ["done"]


def test_a_node_that_closes_at_once_tells_its_callers(channel, server):
    future = channel.submit(ask("hang", label="x"))
    eventually(lambda: server.handler.events)
    server.close()
    server.close()
    error = future.exception(10)
    assert isinstance(error, NodeDown)
    assert error.sent
    assert server.handler.events == ["x began", "x cancelled"]


def test_a_server_starts_once(server):
    with pytest.raises(ConfigError, match="starts once"):
        server.run(server.server.start())


def test_a_caller_that_dies_ends_its_calls(valkey, server, watchful):
    def work():
        own = connect(a_backend(valkey.url), NODE)
        own.submit(ask("hang", label="child"))
        time.sleep(60)

    child = Child(work)
    eventually(lambda: server.handler.events)
    child.kill()
    eventually(lambda: server.handler.events == ["child began", "child cancelled"])


def test_a_forked_child_calls_for_itself(valkey, server, channel):
    future = channel.submit(ask("hold", "late"))
    chunks = channel.stream(ask("", count=3, hold_at=1))

    def work():
        found = []
        for fn in (lambda: future.result(5), lambda: list(chunks)):
            with contextlib.suppress(NodeDown):
                fn()
                found.append("not failed")
        try:
            channel.call(ask("echo"))
        except NodeDown as error:
            found.append(error.sent)
        channel.close()
        with contextlib.closing(connect(a_backend(valkey.url), NODE)) as own:
            found += own.call(ask("echo", "own"))
        return found

    assert Child(work).value() == [False, "own"]
    server.release()
    assert future.result(10) == ["late"]
    assert list(chunks) == [[0], [1], [2]]
    assert channel.call(ask("echo", 1)) == [1]


def test_nothing_is_left_over(valkey):
    def use():
        with NodeThread(valkey.url):
            backend = a_backend(valkey.url)
            channel = connect(backend, NODE)
            channel.call(ask("echo", 1))
            next(channel.stream(ask("", pause=0.001)))
            # A chunk on its way to an inbox that is gone would make it anew, for a minute.
            eventually(lambda: any("ended" in event for event in channel.call(ask("told"))))
            channel.close()
            backend.close()

    gc.collect()
    threads, files = threading.active_count(), _files()
    for _ in range(2):
        use()
    eventually(lambda: threading.active_count() <= threads)
    gc.collect()
    eventually(lambda: _files() <= files)
    with valkey.admin() as admin:
        assert not list(admin.scan_iter("hb:*:rpc:inbox:*"))


def _files():
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_a_node_without_a_server_says_so(make_server):
    valkey = make_server()
    valkey.stop()
    backend = a_backend(valkey.url, timeout=0.2)
    with pytest.raises(Exception, match="cannot be reached"):
        await RedisServer(backend, NODE, Answers()).start()
    with pytest.raises(Exception, match="cannot be reached"):
        await aconnect(backend, NODE)
    await backend.aclose()


def test_messages_of_the_log_hold_no_secret(signed, caplog):
    caplog.set_level(logging.DEBUG)
    _, channel, _ = signed
    channel.call(ask("echo", "payload"))
    assert SECRET not in caplog.text
    assert "payload" not in caplog.text
