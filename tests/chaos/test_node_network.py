"""Three machines, Redis, a node and a caller, on a network that is cut and healed."""

from __future__ import annotations

import contextlib
import time

import pytest
from hosts import Network, ServerOn
from node_load import DOWN_S, Load, ends_of, in_flight
from processes import wait_until

pytestmark = pytest.mark.slow

BACK_S = 15.0
"""Until all is as before: sockets that were cut off wait for some seconds between their tries."""

HOW = pytest.mark.parametrize("how", ["down", "silent"])


@pytest.fixture
def network(valkey_binary, peer, runs):
    """Return the machines, with a node and a caller on theirs."""
    with Network("redis", "ml-1", "web", "ml-2") as made, contextlib.ExitStack() as stack:
        server = ServerOn(made["redis"], valkey_binary)
        stack.callback(server.close)
        server.start()
        made.url = server.url
        made.node = peer(server.url, "gpu", within=made["ml-1"].within)
        made.caller = peer(server.url, "web", within=made["web"].within)
        made.name = made.node.serve("gpu", concurrency=4)
        assert made.name == "gpu@ml-1"
        yield made


@HOW
def test_a_node_that_is_cut_off(network, runs, how, tell):
    """Its callers know within five seconds; healed, it is back by itself and does what waits."""
    node, caller = network.name, network.caller
    load = Load(caller, node, runs)
    calls = in_flight(caller, node, runs, number=3, running=3)
    since = time.monotonic()
    network.cut("ml-1", how)
    for number in range(5):
        caller.cast(node, "note", f"cast-{number}")
    assert ends_of(calls, since) == [True] * 3
    told = caller.outcome("call", node, "note", ["new"], 5000)
    assert (told.error, told.sent) == ("NodeDown", False)
    assert told.took < 1
    assert caller.do("nodes") == []
    time.sleep(2)  # the scenario: longer than any socket waits
    network.heal("ml-1")
    since = time.monotonic()
    wait_until(lambda: caller.reaches(node), "it is back", BACK_S)
    back = time.monotonic() - since
    load.goes_on()
    for number in range(5):
        runs.wait_for(f"cast-{number}")
    tell(f"back after {back:.1f} s; {load.check()}")
    assert runs.count("new") == 0
    assert [runs.count(f"long-{number}") for number in range(3)] == [1] * 3


def test_a_name_that_changes_hands(network, peer, runs, tell):
    """Cut off, a node loses its name to another machine: healed, it ends by itself."""
    name, caller = network.name, network.caller
    load = Load(caller, name, runs)
    network.cut("ml-1", "silent")
    heir = peer(network.url, "heir", within=network["ml-2"].within)
    assert heir.serve(name) == name  # which waits until the name is free
    wait_until(lambda: caller.reaches(name), "calls go to the other machine", BACK_S)
    load.goes_on()
    network.heal("ml-1")
    said = f"its name belongs to process {heir.pid} on ml-2"
    wait_until(lambda: said in network.node.log(), "the first one stops", BACK_S)
    load.goes_on()
    ids = {caller.call(name, "process_id") for _ in range(20)}
    assert ids == {heir.pid}
    stranger = peer(network.url, "stranger", within=network["web"].within)
    wait_until(lambda: stranger.reaches(name), "one who comes later finds it, too", BACK_S)
    tell(load.check())


@HOW
def test_a_caller_that_is_cut_off(network, runs, how, tell):
    """Its calls end by their deadlines or before; what it sent runs once."""
    node, caller = network.name, network.caller
    load = Load(caller, node, runs)
    calls = [caller.begin("call", node, "hold", [f"hold-{n}", 1], 4000) for n in range(4)]
    network.cut("web", how)
    new = caller.begin("call", node, "note", ["new"], 3000)
    for call in (*calls, new):
        end = call.result(20)
        assert end.error in ("NodeDown", "StoreUnavailable", "DeadlineExceeded")
        assert end.took < 8
    assert new.result().took < 6
    network.heal("web")
    since = time.monotonic()
    wait_until(lambda: caller.reaches(node), "it sees the node again", BACK_S)
    back = time.monotonic() - since
    load.goes_on()
    tell(f"back after {back:.1f} s; {load.check()}")
    assert max(runs.count(f"hold-{number}") for number in range(4)) <= 1
    assert runs.count("new") == 0


@HOW
def test_a_server_that_is_cut_off(network, runs, how, tell):
    """From everybody, and for longer than the registry remembers."""
    node, caller = network.name, network.caller
    load = Load(caller, node, runs)
    calls = [caller.begin("call", node, "ahold", [f"long-{n}", 60], 6000) for n in range(3)]
    for number in range(3):
        runs.wait_for(f"long-{number}")
    network.cut("redis", how)
    for call in calls:
        end = call.result(20)
        assert end.error in ("NodeDown", "StoreUnavailable", "DeadlineExceeded")
        assert end.took < 6 + DOWN_S
    network.heal("redis")
    since = time.monotonic()
    wait_until(lambda: caller.reaches(node), "all is as before", BACK_S)
    back = time.monotonic() - since
    load.goes_on()
    tell(f"back after {back:.1f} s; {load.check()}")
    assert [runs.count(f"long-{number}") for number in range(3)] == [1] * 3


def test_a_network_that_flaps(network, runs, tell):
    """Cuts that are shorter than it takes to be given up: calls go on, and nothing runs twice."""
    load = Load(network.caller, network.name, runs, timeout_ms=3000)
    for host in ("ml-1", "web", "redis") * 2:
        network.cut(host, "silent")
        time.sleep(0.7)  # the scenario
        network.heal(host)
        load.goes_on()
    assert network.caller.reaches(network.name)
    tell(load.check())
