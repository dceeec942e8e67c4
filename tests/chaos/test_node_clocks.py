"""Nodes and callers with wrong clocks: the server's clock is the one that counts."""

from __future__ import annotations

import time

import pytest
from peers import LONG_MS
from processes import wait_until

from hornbeam_state.transports.redis.keys import NodeKeys

pytestmark = pytest.mark.slow

SECRET = "correct horse battery staple"
HOUR = 3600.0


@pytest.mark.parametrize("ahead", [HOUR, -HOUR], ids=["fast", "slow"])
@pytest.mark.parametrize("who", ["node", "caller"])
def test_a_clock_that_is_wrong_by_an_hour(make_server, peer, runs, who, ahead):
    server = make_server()
    wrong = {"node": 0.0, "caller": 0.0} | {who: ahead}
    node = peer(server.url, "gpu", host="ml-1", secret=SECRET, ahead=wrong["node"])
    caller = peer(server.url, "web", host="web", secret=SECRET, ahead=wrong["caller"])
    name, keys = node.serve("gpu", concurrency=2), NodeKeys("gpu@ml-1")
    assert abs(caller.call(name, "clock") - time.time() - wrong["node"]) < 60

    late = caller.outcome("call", name, "ahold", ["late", 60], 300)
    assert (late.error, late.sent) == ("DeadlineExceeded", True)
    assert 0.3 <= late.took < 3
    runs.wait_for("late cancelled")

    caller.cast(name, "note", "cast")
    runs.wait_for("cast")

    with server.admin() as admin:
        wait_until(lambda: not admin.xlen(keys.calls), "the cast is over")
        node.stop()
        waits = caller.begin("call", name, "note", ["never"], 300)
        called = caller.begin_call(name, "note", "called")
        wait_until(lambda: admin.xlen(keys.calls) == 2, "the calls are in the stream")
        (_, first), (_, second) = admin.xrange(keys.calls)
        assert waits.result(30).error == "DeadlineExceeded"
        node.go_on()
        assert called.result(30).value == "called"
        for fields in (first, second):
            admin.xadd(keys.calls, fields)
        wait_until(lambda: not admin.xlen(keys.calls), "they are refused")
    assert caller.do("call", name, "note", ["last"], LONG_MS) == "last"
    assert runs.all() == ["late", "late cancelled", "cast", "called", "last"]
    assert "was here before" in node.log()

    time.sleep(5)  # the heartbeats go on, and nobody is given up
    assert caller.reaches(name)
