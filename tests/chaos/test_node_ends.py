"""Nodes that are killed and stopped, and servers that go away, while calls are on their way."""

from __future__ import annotations

import contextlib
import time

import pytest
from node_load import SLACK_S, Load, ends_of, in_flight
from processes import wait_until
from redis_servers import Watched

from hornbeam_state.transports.redis.keys import NodeKeys

pytestmark = pytest.mark.slow


def test_a_killed_node(make_server, peer, runs):
    """Calls end within five seconds, and know whether they had begun; none begins later."""
    server = make_server()
    node, caller = peer(server.url, "gpu", host="ml-1"), peer(server.url, "web", host="web")
    name = node.serve("gpu", concurrency=4)
    stream = caller.begin("stream", name, "count", ["stream", 10**6, 0.01], 60_000)
    runs.wait_for("stream")
    calls = in_flight(caller, name, runs, number=12, running=3)
    since = time.monotonic()
    node.kill()
    assert ends_of([stream], since) == [True]
    assert sorted(ends_of(calls, since)) == [False] * 9 + [True] * 3
    since = time.monotonic()
    assert caller.outcome("call", name, "note", ["new"], 5000).error == "NodeDown"
    assert time.monotonic() - since < 1
    following = peer(server.url, "gpu-again", host="ml-1")
    assert following.serve("gpu", concurrency=4) == name
    assert caller.call(name, "note", "after") == "after"
    with server.admin() as admin:
        assert admin.xlen(NodeKeys(name).calls) == 0
    assert sorted(runs.all()) == ["after", "long-0", "long-1", "long-2", "stream"]


def test_a_killed_caller(make_server, peer, runs):
    """What it waited for is cancelled, whether it runs or waits; others find the places free."""
    server = make_server()
    node, caller = peer(server.url, "gpu", host="ml-1"), peer(server.url, "web", host="web")
    other = peer(server.url, "other", host="web-2")
    name = node.serve("gpu", concurrency=2)
    in_flight(caller, name, runs, number=6, running=2)
    caller.kill()
    began = time.monotonic()
    assert other.do("call", name, "note", ["other"], 60_000) == "other"
    assert time.monotonic() - began < 50
    for number in range(2):
        runs.wait_for(f"long-{number} cancelled")


def test_a_stopped_node_goes_on(make_server, peer, runs, tell):
    """Stopped for six seconds: what it answers then is dropped, and nothing runs twice."""
    server = make_server()
    node, caller = peer(server.url, "gpu", host="ml-1"), peer(server.url, "web", host="web")
    name = node.serve("gpu", concurrency=4)
    load = Load(caller, name, runs)
    calls = in_flight(caller, name, runs, number=3, running=3)
    for number in range(8):
        caller.cast(name, "note", f"cast-{number}")
    node.stop()
    since = time.monotonic()
    assert ends_of(calls, since) == [True] * 3
    time.sleep(2)  # the scenario: longer than it takes to be given up
    node.go_on()
    wait_until(lambda: caller.reaches(name), "it is back", 15)
    load.goes_on()
    for number in range(8):
        runs.wait_for(f"cast-{number}")
    tell(load.check())
    assert [runs.count(f"long-{number}") for number in range(3)] == [1] * 3


@pytest.mark.parametrize("keeps", ["nothing", "every write"])
def test_a_server_that_restarts(make_server, peer, runs, keeps, tell):
    """Calls end, later ones work, and casts that were taken are done if the server kept them."""
    options = ("--appendonly", "yes", "--appendfsync", "always") if keeps != "nothing" else ()
    server = make_server(*options)
    node, caller = peer(server.url, "gpu", host="ml-1"), peer(server.url, "web", host="web")
    name = node.serve("gpu", concurrency=2)
    load = Load(caller, name, runs)
    for turn in range(3):
        long = [
            caller.begin("call", name, "ahold", [f"long-{turn}-{way}", 60], 3000)
            for way in range(2)
        ]
        for number in range(4):
            caller.cast(name, "note", f"cast-{turn}-{number}")
        server.stop()
        time.sleep(0.5)  # the scenario: some calls find nobody there
        server.start()
        for call in long:
            end = call.result(10)
            assert end.error in ("DeadlineExceeded", "NodeDown", "StoreUnavailable")
            assert end.took < 3 + SLACK_S
        wait_until(lambda: caller.reaches(name), "calls work again", 15)
        load.goes_on()
    tell(load.check())
    stranger = peer(server.url, "stranger", host="new")
    wait_until(lambda: stranger.reaches(name), "one who comes later finds the node", 15)
    for turn in range(3):
        for number in range(4):
            if keeps != "nothing":
                runs.wait_for(f"cast-{turn}-{number}")
            assert runs.count(f"cast-{turn}-{number}") <= 2


def test_a_server_that_comes_back_as_it_was_before(make_server, peer, runs):
    """With calls in its snapshot that the node has run since: they do not run again."""
    server = make_server()
    node, caller = peer(server.url, "gpu", host="ml-1"), peer(server.url, "web", host="web")
    name = node.serve("gpu", concurrency=2)
    node.stop()
    calls = [caller.begin_call(name, "note", f"call-{number}") for number in range(20)]
    with server.admin() as admin:
        wait_until(lambda: admin.xlen(NodeKeys(name).calls) == 20, "the calls are in the stream")
        admin.save()
    node.go_on()
    assert [call.result(30).value for call in calls] == [f"call-{n}" for n in range(20)]
    server.stop()
    server.start()
    wait_until(lambda: caller.reaches(name), "calls work again", 15)
    with server.admin() as admin:
        wait_until(lambda: not admin.xlen(NodeKeys(name).calls), "the stream is empty")
    assert caller.call(name, "note", "last") == "last"
    assert sorted(runs.all()) == sorted([*(f"call-{number}" for number in range(20)), "last"])


def test_a_server_that_hangs(make_server, peer, runs, tell):
    """For three seconds, which the registry outlives: nobody is taken to be gone."""
    server = make_server()
    node, caller = peer(server.url, "gpu", host="ml-1"), peer(server.url, "web", host="web")
    name = node.serve("gpu", concurrency=4)
    load = Load(caller, name, runs)
    long = caller.begin_call(name, "hold", "long", 5)
    runs.wait_for("long")
    server.stall()
    time.sleep(3)  # the scenario
    server.resume()
    assert long.result(30).value == "long"
    wait_until(lambda: caller.reaches(name), "calls work again", 15)
    load.goes_on()
    tell(load.check())


def test_a_failover_with_calls_in_the_queue(valkey_binary, peer, runs, tell):
    """The node may take calls from the old primary that the new one still has."""
    with contextlib.closing(Watched(valkey_binary)) as group:
        group.start()
        node, caller = peer(group.url, "gpu", host="ml-1"), peer(group.url, "web", host="web")
        name = node.serve("gpu", concurrency=4)
        caller.call(name, "note", "warm")
        storm = caller.begin("storm", name, "storm", 900, 0.05, 20_000)
        wait_until(lambda: len(runs.all()) > 50, "they run")
        group.fail_over()
        done = storm.result(60)
        assert done.error is None, done.message
        wait_until(lambda: caller.reaches(name), "calls work again", 30)
        tell(runs.check(done.value["ends"]))


def test_failovers_behind_sentinel(valkey_binary, peer, runs, tell):
    """One that is asked for and one after a kill: no call runs twice, and later ones work."""
    with contextlib.closing(Watched(valkey_binary)) as group:
        group.start()
        node, caller = peer(group.url, "gpu", host="ml-1"), peer(group.url, "web", host="web")
        name = node.serve("gpu", concurrency=4)
        load = Load(caller, name, runs)
        old = group.primary
        group.fail_over()
        wait_until(lambda: caller.reaches(name), "calls work again", 30)
        load.goes_on(30)
        wait_until(lambda: old.role() == b"slave", "the old primary follows the new one", 30)
        wait_until(old.is_in_sync, "it replicates", 30)
        dead, heir = group.primary, group.replica
        dead.stop()
        wait_until(lambda: group.primary is heir, "the replica is promoted", 30)
        wait_until(lambda: caller.reaches(name), "calls work once more", 30)
        load.goes_on(30)
        tell(load.check())
