"""Calls between nodes over Redis: casts that are kept, dead letters, secrets, servers and nodes that go."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import gc
import operator
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from node_processes import MODULE, NodeProcess, beginning
from rpc_helpers import default_store_at
from transport_helpers import eventually, miss_deadline

from hornbeam_state import (
    ConfigError,
    DeadlineExceeded,
    HornbeamError,
    NodeDown,
    NotExposed,
    adead_letters,
    adrop_dead_letters,
    arepeat_dead_letters,
    arpc_cast,
    dead_letters,
    default_store,
    drop_dead_letters,
    expose,
    node_info,
    nodes,
    repeat_dead_letters,
    rpc_call,
    rpc_cast,
    rpc_stream,
    serve_node,
)
from hornbeam_state.rpc import carriers
from hornbeam_state.rpc.entries import Entry
from hornbeam_state.rpc.functions import default_caller
from hornbeam_state.transports.redis import intake
from hornbeam_state.transports.redis.keys import NodeKeys

SECRET = "correct horse battery staple"
tried: list[str] = []  # in this process: labels of casts, as they began


@expose(module="kept", name="work")
def work(label, gate=None, fails=()):
    tried.append(label)
    if tried.count(label) in fails:
        raise ValueError("its message is not told")
    if gate is not None:
        gates[gate].wait()


@expose(module="kept", name="awork")
async def awork(label, seconds):
    tried.append(label)
    await asyncio.sleep(seconds)
    tried.append(f"{label} done")


gates = collections.defaultdict(threading.Event)


@pytest.fixture
def use(monkeypatch):
    """Return what makes a store the default; nodes are as far as on another machine."""
    monkeypatch.setattr(carriers, "is_near", lambda entry: False)
    with contextlib.ExitStack() as stack:

        def use_(url, **options):
            monkeypatch.setenv("HORNBEAM_STORE", url)
            stack.enter_context(default_store_at(url, **options))
            return url

        yield use_


@pytest.fixture
def url(valkey, use):
    return use(valkey.url)


@pytest.fixture(autouse=True)
def nothing_ran():
    """Nothing was tried yet, and nothing waits for the next test."""
    tried.clear()
    gates.clear()
    yield
    for gate in gates.values():
        gate.set()


@pytest.fixture
def quickly(monkeypatch):
    """Have casts that were left taken over soon."""
    monkeypatch.setattr(intake, "ABANDONED_MS", 100)
    monkeypatch.setattr(intake, "_TEND_EVERY_S", 0.02)
    monkeypatch.setattr(intake, "_BLOCK_S", 0.02)


def answers(node):
    with contextlib.suppress(HornbeamError):
        return node.call("pid", timeout_ms=2000) == node.pid


class TestCasts:
    def test_what_waits_is_kept_while_the_node_starts_again(self, url):
        with serve_node("again", concurrency=1) as first:
            rpc_cast(first.name, "kept", "work", ["runs", "x"])
            eventually(lambda: tried == ["runs"])
            rpc_cast(first.name, "kept", "work", ["waits"])
            closing = threading.Thread(target=first.close, args=(10,))
            closing.start()
            eventually(
                lambda: first.name not in {one.name for one in default_caller().registry.live()}
            )
            time.sleep(0.2)
            assert tried == ["runs"]
            gates["x"].set()
            closing.join()
        with serve_node("again", concurrency=1) as second:
            assert second.name == first.name
            eventually(lambda: tried == ["runs", "waits"])

    def test_one_that_is_not_done_when_the_node_ends_is_done_by_the_next(self, url):
        with serve_node("again", concurrency=1) as first:
            rpc_cast(first.name, "kept", "awork", ["cast", 60])
            eventually(lambda: tried == ["cast"])
            first.close(drain=0)
        with serve_node("again") as second:
            eventually(lambda: tried == ["cast", "cast"])
            second.close(drain=0)

    def test_one_that_raises_is_tried_again(self, url, quickly, caplog):
        with serve_node("tries") as node:
            rpc_cast(node.name, "kept", "work", ["cast"], {"fails": (1, 2)})
            eventually(lambda: tried == ["cast"] * 3)
            time.sleep(0.3)
            assert tried == ["cast"] * 3
            assert dead_letters(node.name) == []
        assert "the cast of kept.work raised ValueError" in caplog.text
        assert "is not told" not in caplog.text

    def test_casts_of_one_key_run_once(self, url):
        with serve_node("once", concurrency=1) as node:
            for label in ("first", "second"):
                rpc_cast(node.name, "kept", "work", [label], key="k")
            asyncio.run(arpc_cast(node.name, "kept", "work", ["third"], key="k"))
            rpc_cast(node.name, "kept", "work", ["other"], key="l")
            eventually(lambda: "other" in tried)
            assert tried == ["first", "other"]

    @pytest.mark.parametrize(("key", "error"), [("", ValueError), (1, TypeError)])
    def test_a_key_is_a_text(self, url, key, error):
        with pytest.raises(error, match="key"):
            rpc_cast("gpu@ml-1", "kept", "work", key=key)

    def test_a_large_one_arrives_whole(self, url):
        array, seen = np.arange(200_000), []
        expose(seen.append, module="kept", name="large")
        with serve_node("large") as node:
            rpc_cast(node.name, "kept", "large", [array])
            eventually(lambda: seen)
            assert np.array_equal(seen[0], array)

    def test_what_was_exposed_after_the_first_cast_is_found(self, url):
        with serve_node("late") as node:
            rpc_cast(node.name, "kept", "work", ["early"])
            with pytest.raises(NotExposed, match=r"kept\.later is not exposed by late@"):
                rpc_cast(node.name, "kept", "later")
            expose(lambda: tried.append("later"), module="kept", name="later")

            def is_taken():
                with contextlib.suppress(NotExposed):
                    rpc_cast(node.name, "kept", "later")
                    return True

            eventually(is_taken)
            eventually(lambda: "later" in tried)

    def test_a_cast_to_nobody_is_refused(self, url):
        """It might wait for ever."""
        with pytest.raises(NodeDown, match="no node nobody@nowhere") as caught:
            rpc_cast("nobody@nowhere", "kept", "work", ["x"])
        assert caught.value.sent is False

    @pytest.mark.slow
    def test_a_cast_whose_node_is_killed_is_done_by_the_next(self, url, tmp_path):
        gate = tmp_path / "gate"
        with NodeProcess(url, "killed") as node:
            rpc_cast(node.name, MODULE, "stop_until", [str(gate)])
            eventually(beginning(gate).exists)
            node.kill()
        beginning(gate).unlink()
        with NodeProcess(url, "killed"):
            eventually(beginning(gate).exists)
            gate.touch()


class TestDeadLetters:
    @pytest.fixture
    def node(self, url, quickly):
        with serve_node("dead") as node:
            rpc_cast(node.name, "kept", "work", ["poison"], {"fails": (1, 2, 3, 4, 5)})
            eventually(lambda: dead_letters(node.name))
            yield node.name

    def test_a_cast_that_raises_five_times_is_one(self, node):
        [letter] = dead_letters(node)
        assert tried == ["poison"] * intake.MOST_DELIVERIES
        assert (letter.node, letter.function) == (node, "kept.work")
        assert letter.reason == "it raised ValueError"
        assert letter.is_cast
        assert abs(letter.since - time.time()) < 60

    def test_it_runs_when_it_is_repeated(self, node):
        assert repeat_dead_letters(node, ["0-1"]) == 0
        assert repeat_dead_letters(node) == 1
        eventually(lambda: tried == ["poison"] * 6)
        assert dead_letters(node) == []
        assert repeat_dead_letters(node) == 0

    def test_it_is_gone_when_it_is_dropped(self, node):
        [letter] = dead_letters(node)
        assert drop_dead_letters(node, []) == 0
        assert drop_dead_letters(node, [letter.id]) == 1
        assert drop_dead_letters(node, [letter.id]) == 0
        assert dead_letters(node) == []

    async def test_the_twins_do_the_same(self, node):
        [letter] = await adead_letters(node)
        assert await arepeat_dead_letters(node, [letter.id]) == 1
        assert await adrop_dead_letters(node, [letter.id]) == 0

    def test_signed_ones_are_signed_anew(self, url, quickly, monkeypatch):
        monkeypatch.setenv("HORNBEAM_SECRET", SECRET)
        with serve_node("signed") as node:
            rpc_cast(node.name, "kept", "work", ["poison"], {"fails": (1, 2, 3, 4, 5)})
            eventually(lambda: dead_letters(node.name))
            monkeypatch.setenv("HORNBEAM_SECRET", "another secret, of one who may not")
            [letter] = dead_letters(node.name)
            assert (letter.function, letter.is_cast) == (None, False)
            assert repeat_dead_letters(node.name) == 0
            monkeypatch.setenv("HORNBEAM_SECRET", SECRET)
            assert repeat_dead_letters(node.name) == 1
            eventually(lambda: tried == ["poison"] * 6)

    def test_what_makes_no_sense_is_one_that_cannot_be_repeated(self, url, valkey):
        with serve_node("poisoned") as node, valkey.admin() as admin:
            admin.xadd(NodeKeys(node.name).calls, {"rub": "bish"})
            [letter] = eventually(lambda: dead_letters(node.name))
            assert (letter.function, letter.is_cast) == (None, False)
            assert repeat_dead_letters(node.name) == 0
            assert drop_dead_letters(node.name, [letter.id]) == 1

    async def test_a_store_without_a_server_keeps_none(self, use):
        use("memory://")
        assert dead_letters("gpu@ml-1") == await adead_letters("gpu@ml-1") == []
        assert repeat_dead_letters("gpu@ml-1") == await arepeat_dead_letters("gpu@ml-1") == 0
        assert drop_dead_letters("gpu@ml-1", ["0-1"]) == 0
        assert await adrop_dead_letters("gpu@ml-1", ["0-1"]) == 0


class TestSecrets:
    def test_signed_calls_of_all_kinds(self, url, monkeypatch):
        monkeypatch.setenv("HORNBEAM_SECRET", SECRET)
        with NodeProcess(url, "signed") as node:
            array = np.arange(200_000)
            assert np.array_equal(node.call("echo", array), array)
            assert list(rpc_stream(node.name, MODULE, "count", [3])) == [0, 1, 2]
            rpc_cast(node.name, MODULE, "note", ["cast"])
            eventually(lambda: node.call("told")[-1] == "cast")

    @pytest.mark.parametrize("signer", ["node", "caller"])
    def test_both_sides_sign_or_none(self, url, monkeypatch, signer):
        environ = {"HORNBEAM_SECRET": SECRET} if signer == "node" else {}
        with NodeProcess(url, "secret", environ=environ) as node:
            if signer == "caller":
                monkeypatch.setenv("HORNBEAM_SECRET", SECRET)
            with pytest.raises(ConfigError, match="HORNBEAM_SECRET"):
                node.call("echo", 1)

    def test_who_has_another_secret_is_not_heard(self, url, monkeypatch):
        with NodeProcess(url, "secret", environ={"HORNBEAM_SECRET": SECRET}) as node:
            monkeypatch.setenv("HORNBEAM_SECRET", "another secret, of one who may not")
            miss_deadline(
                lambda seconds: node.call("note", "never", timeout_ms=1000 * seconds),
                lambda: dead_letters(node.name),
            )
            reasons = {letter.reason for letter in dead_letters(node.name)}
            assert reasons == {"refused: its signature is wrong"}
            default_caller().close()
            monkeypatch.setenv("HORNBEAM_SECRET", SECRET)
            assert node.call("told") == []


class TestEnds:
    def test_calls_for_a_process_that_lost_its_name_are_refused_by_the_next(self, url, tmp_path):
        """None is lost, none runs twice, and whoever is told that it was not sent may be sure."""
        file = tmp_path / "ran"
        outcomes, halted = {}, []
        with NodeProcess(url, "again", concurrency=1) as first, ThreadPoolExecutor(12) as pool:
            assert first.call("pid") == first.pid

            def one(label):
                try:
                    outcomes[label] = first.call("append", str(file), label, timeout_ms=15_000)
                except NodeDown as error:
                    outcomes[label] = error

            first.signal(signal.SIGSTOP)
            halted += [pool.submit(one, f"{number}") for number in range(12)]
            eventually(
                lambda: sum(link.channel.pending for link in default_caller()._links._links) == 12
            )
            first.kill()
            with NodeProcess(url, "again", concurrency=1) as second:
                for each in halted:
                    each.result()
                eventually(lambda: answers(second))
        ran = collections.Counter(file.read_text().split()) if file.exists() else {}
        assert len(outcomes) == 12
        for label, outcome in outcomes.items():
            if isinstance(outcome, NodeDown):
                assert not outcome.sent
                assert ran.get(label, 0) == 0
            else:
                assert ran[label] == 1

    @pytest.mark.slow
    def test_a_killed_node_far_away_fails_its_calls_within_five_seconds(
        self, url, gate, monkeypatch
    ):
        """Nobody here can see its process."""
        monkeypatch.setattr(Entry, "is_alive", lambda self: None)
        with NodeProcess(url, "far", concurrency=1) as node, ThreadPoolExecutor(2) as pool:
            running = pool.submit(node.call, "stop_until", str(gate))
            eventually(beginning(gate).exists)
            waiting = pool.submit(node.call, "note", "never")
            eventually(lambda: default_caller()._links.pending(node.name) == 2)
            began = time.monotonic()
            node.kill()
            for future, sent in ((running, True), (waiting, False)):
                error = future.exception()
                assert time.monotonic() - began < 5
                assert isinstance(error, NodeDown)
                assert error.sent is sent
            began = time.monotonic()
            with pytest.raises(NodeDown, match="no node"):
                node.call("echo", 1)
            assert time.monotonic() - began < 1

    @pytest.mark.slow
    def test_a_stopped_node_runs_nothing_that_was_given_up(self, url):
        with NodeProcess(url, "stopped") as node:
            assert node.call("told") == []
            node.signal(signal.SIGSTOP)
            with pytest.raises((NodeDown, DeadlineExceeded)) as caught:
                node.call("note", "never", timeout_ms=None)
            assert not caught.value.sent
            node.signal(signal.SIGCONT)
            eventually(lambda: answers(node))
            assert node.call("told") == []

    @pytest.mark.slow
    def test_a_server_that_starts_again_empty_is_used_again(self, make_server, use, gate):
        valkey = make_server()
        use(valkey.url, timeout=0.5)
        with NodeProcess(valkey.url, "gpu") as node, ThreadPoolExecutor(1) as pool:
            running = pool.submit(node.call, "stop_until", str(gate), timeout_ms=None)
            eventually(beginning(gate).exists)
            valkey.stop()
            with pytest.raises(HornbeamError):
                node.call("echo", 1, timeout_ms=2000)
            time.sleep(1)  # whoever watches nodes has noticed
            valkey.start()
            eventually(lambda: answers(node))
            assert node.name in nodes()
            gate.touch()
            assert running.result(20) == "done"
            rpc_cast(node.name, MODULE, "note", ["cast"])
            eventually(lambda: "cast" in node.call("told"))

    def test_a_closing_node_leaves_nothing_open(self, url):
        """Neither threads nor descriptors, of the node or of its callers."""

        def one():
            with serve_node("brief") as node:
                rpc_call(node.name, "kept", "work", ["x"])
                rpc_cast(node.name, "kept", "work", ["y"])
                rpc_call(node.name, "kept", "work", [b"x" * 300_000])
            default_caller().close()
            default_store().close()  # it keeps as many connections as were in use at once

        one()
        before = count_open()
        for _ in range(3):
            one()
        eventually(lambda: all(map(operator.le, count_open(), before)))


def count_open():
    gc.collect()
    return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))


class TestServers:
    """One of each kind; what they do when they fail is tested with the transport."""

    def check(self, url):
        with NodeProcess(url, "gpu") as node:
            assert nodes() == [node.name]
            array = np.arange(100_000)
            assert np.array_equal(node.call("echo", array), array)
            assert list(rpc_stream(node.name, MODULE, "count", [3])) == [0, 1, 2]
            rpc_cast(node.name, MODULE, "note", ["cast"])
            eventually(lambda: "cast" in node.call("told"))
            assert dead_letters(node.name) == []

    def test_a_cluster_carries_calls(self, cluster, use):
        self.check(use(cluster.url))

    def test_a_primary_behind_sentinels_carries_calls(self, watched, use):
        self.check(use(watched.url))

    def test_redis_itself_carries_calls(self, redis_server, use):
        self.check(use(redis_server.url))


class TestRights:
    """Each role with the rights that the documentation gives it."""

    @pytest.fixture
    def urls(self, make_server):
        valkey = make_server()
        text = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
        rules = re.findall(r"    (ACL SETUSER (?:.+\\\n)*.+)", text)
        for rule in rules:
            valkey.ask(*rule.replace("\\\n", " ").replace("PASSWORD", "secret").split())
        assert len(rules) == 2
        url = valkey.url.replace("://", "://{}:secret@")
        return {role: url.format(role) for role in ("node", "caller")}

    def test_they_are_enough(self, urls, use, monkeypatch):
        monkeypatch.setenv("HORNBEAM_SECRET", SECRET)
        use(urls["caller"])
        with NodeProcess(urls["node"], "gpu", concurrency=1) as node:
            assert nodes() == [node.name]
            assert node_info(node.name).pid == node.pid
            data = b"x" * 300_000
            assert node.call("echo", data) == data
            assert list(rpc_stream(node.name, MODULE, "count", [3])) == [0, 1, 2]
            rpc_cast(node.name, MODULE, "note", ["cast"])
            eventually(lambda: node.call("told")[-1] == "cast")
            with pytest.raises(DeadlineExceeded):
                list(rpc_stream(node.name, MODULE, "acount", [10**9], timeout_ms=200))
            use(urls["node"])
            assert dead_letters(node.name) == []
            assert repeat_dead_letters(node.name) == 0
            assert drop_dead_letters(node.name, ["0-1"]) == 0
            node.close()
            assert node.wait() == 0

    def test_a_caller_cannot_pass_for_a_node(self, urls, use):
        use(urls["caller"])
        with pytest.raises(HornbeamError, match="does not let this user"):
            serve_node("impostor")
