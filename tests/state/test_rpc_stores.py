"""Nodes with each kind of store: nodes of one machine reach each other directly, whatever it is."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from node_processes import MODULE, NodeProcess, beginning
from rpc_helpers import default_store_at
from transport_helpers import eventually

from hornbeam_state import nodes, rpc_call, rpc_cast, serve_node
from hornbeam_state.rpc.functions import default_caller
from hornbeam_state.rpc.outcomes import unsent
from hornbeam_state.transports import local
from hornbeam_state.transports.redis.keys import NodeKeys


@pytest.fixture
def use(monkeypatch):
    """Return what makes a store the default, until the test ends."""
    with contextlib.ExitStack() as stack:

        def use_(url, **options):
            monkeypatch.setenv("HORNBEAM_STORE", url)
            stack.enter_context(default_store_at(url, **options))

        yield use_


def test_nodes_of_one_machine_need_a_server_only_to_find_each_other(
    make_server, use, gate, monkeypatch, caplog
):
    """While it restarts, calls go on; what it forgot comes back with the next heartbeat."""
    monkeypatch.setattr("hornbeam_state.rpc.links._DOUBT_S", 20.0)
    caplog.set_level(logging.DEBUG, "hornbeam.rpc")
    server = make_server()
    use(server.url)
    with NodeProcess(server.url, "gpu") as node, ThreadPoolExecutor(1) as pool:
        assert node.name in nodes()
        running = pool.submit(node.call, "stop_until", str(gate))
        eventually(beginning(gate).exists)
        server.stop()
        assert node.call("pid") == node.pid
        eventually(lambda: "cannot look after the nodes" in caplog.text)
        server.start()
        assert node.call("pid") == node.pid
        eventually(lambda: node.name in nodes())
        gate.touch()
        assert running.result() == "done"


def test_a_long_path_of_a_store_is_no_obstacle(tmp_path, use):
    """Sockets have short ones: the node listens elsewhere, and callers know where."""
    use(f"lmdb://{tmp_path / ('x' * 100)}")
    with serve_node("far") as served:
        assert rpc_call(served.name, MODULE, "pid") == os.getpid()


def test_a_process_may_be_a_store_of_its_own(use):
    use("memory://")
    with serve_node("alone", concurrency=1) as served:
        assert rpc_call(served.name, MODULE, "descend", [3]) == 3
    assert nodes() == []


def test_a_node_that_cannot_be_reached_by_its_socket_is_reached_by_redis(valkey, use, monkeypatch):
    """And one whose socket is there, by that."""
    use(valkey.url)
    with NodeProcess(valkey.url, "both") as node:
        assert node.call("pid") == node.pid
        assert not list_inboxes(valkey)
        default_caller().close()
        monkeypatch.setattr(local, "connect", refused)
        assert node.call("pid") == node.pid
        assert list_inboxes(valkey)


def test_casts_go_by_redis_where_it_is(valkey, use):
    """So that what is certain of them does not depend on where the node is."""
    use(valkey.url)
    with NodeProcess(valkey.url, "both") as node:
        node.signal(signal.SIGSTOP)
        rpc_cast(node.name, MODULE, "note", ["kept"])
        with valkey.admin() as admin:
            assert admin.xlen(NodeKeys(node.name).calls) == 1
        node.signal(signal.SIGCONT)
        assert eventually(lambda: node.call("told") == ["kept"])


def list_inboxes(valkey):
    with valkey.admin() as admin:
        return list(admin.scan_iter("hb:*:rpc:inbox:*")) + list(admin.scan_iter("hb:*:rpc:alive:*"))


def refused(*_args, **_options):
    raise unsent("nobody listens")
