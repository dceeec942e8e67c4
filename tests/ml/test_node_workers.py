"""gunicorn's workers as nodes, each by the name of its slot."""

from __future__ import annotations

import os
import signal
import threading
from functools import partial

import httpx
import pytest
from gunicorn_process import Gunicorn, poll
from node_process import waits, write_module
from rpc_helpers import default_store_at

from hornbeam_ml import HornbeamError, predict
from hornbeam_ml.node import worker_node
from hornbeam_ml.node.worker_node import WorkerNode
from hornbeam_state import (
    NodeDown,
    call,
    node_info,
    nodes,
    rpc_call,
    serve_node,
)
from hornbeam_state.rpc.server import own_nodes

OFFERED = """
import os, time
from pathlib import Path
from hornbeam_ml import Serving
from hornbeam_state import expose, node

NAME = node()

@expose(module="work")
def pid():
    return os.getpid()

@expose(module="work")
def name():
    return NAME

@expose(module="work")
def wait_for(path):
    Path(path + ".began").touch()
    while not Path(path).exists():
        time.sleep(0.01)
    return "done"

squares = Serving(lambda: lambda batch: [item ** 2 for item in batch], name="squares")
"""
APPS = {
    "asgi": """
async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(os.getpid()).encode()})
""",
    "wsgi": """
def app(environ, start_response):
    start_response("200 OK", [])
    return [str(os.getpid()).encode()]
""",
}


@pytest.fixture(params=APPS)
def interface(request):
    return request.param


@pytest.fixture
def url(tmp_path):
    return f"lmdb://{tmp_path}/shared"


@pytest.fixture(autouse=True)
def default(url):
    """The default store is that of the workers."""
    with default_store_at(url) as made:
        yield made


@pytest.fixture
def gate(tmp_path):
    path = tmp_path / "gate"
    yield path
    path.touch()


@pytest.fixture
def start(tmp_path, url):
    """Return what starts a gunicorn whose workers are nodes."""

    def begin(interface="asgi", *options, name="web"):
        write_module(tmp_path, OFFERED + APPS[interface], "app")
        env = {"HORNBEAM_STORE": url, "HORNBEAM_NODE": name}
        return Gunicorn("app:app", *options, cwd=tmp_path, env=env)

    return begin


def names(count, match="web"):
    """Wait until there are so many nodes; return the parts of their names before the host."""
    found = poll(lambda: len(found := nodes(match)) == count and found, f"{count} nodes", 30)
    return [name.partition("@")[0] for name in found]


def test_each_worker_is_a_node_of_its_slot(start, interface):
    with start(interface, "--workers", "2") as server:
        server.ready()
        assert names(2) == ["web-0", "web-1"]
        for name in nodes("web"):
            assert rpc_call(name, "work", "pid") == node_info(name).pid
            assert rpc_call(name, "work", "name") == name
            assert node_info(name).servings == ("squares",)
        assert predict("squares", 7, where="remote") == 49


def test_a_call_that_blocks_holds_up_no_request(start, interface, gate):
    with start(interface) as server:
        server.ready()
        names(1)
        thread, outcomes = waits(nodes("web")[0], gate, "work")
        assert httpx.get(server.url, timeout=10).status_code == 200
        gate.touch()
        thread.join(10)
    assert outcomes == ["done"]


def test_a_worker_that_leaves_finishes_the_calls_it_has(start, interface, gate):
    with start(interface) as server:
        server.ready()
        names(1)
        (name,) = nodes("web")
        thread, outcomes = waits(name, gate, "work")
        os.kill(server.pid, signal.SIGTERM)
        poll(lambda: not nodes("web"), "it is no node any more")
        with pytest.raises(NodeDown) as caught:
            rpc_call(name, "work", "pid")
        assert not caught.value.sent
        assert server.process.poll() is None
        gate.touch()
        thread.join(10)
        assert server.process.wait(10) == 0
    assert outcomes == ["done"]


@pytest.mark.slow
def test_a_call_that_does_not_finish_ends_with_the_grace(start, interface, gate):
    with start(interface, "--graceful-timeout", "1") as server:
        server.ready()
        names(1)
        thread, outcomes = waits(nodes("web")[0], gate, "work")
        os.kill(server.pid, signal.SIGTERM)
        assert server.process.wait(10) == 0
        thread.join(10)
    assert [(type(outcome), outcome.sent) for outcome in outcomes] == [(NodeDown, True)]


@pytest.mark.slow
def test_a_deploy_has_names_for_old_and_new_workers(start):
    with start("asgi", "--workers", "2") as server:
        server.ready()
        names(2)
        before = {node_info(name).pid for name in nodes("web")}
        os.kill(server.pid, signal.SIGHUP)

        def replaced():
            try:
                pids = [rpc_call(name, "work", "pid") for name in nodes("web")]
            except NodeDown:  # it left between the two
                return False
            return len(pids) == 2 and not before.intersection(pids)

        poll(replaced, "the new workers are nodes")
        assert "Not a node yet" not in server.log


@pytest.mark.slow
def test_a_killed_worker_is_followed_under_its_name(start):
    with start() as server:
        server.ready()
        names(1)
        first = rpc_call(nodes("web")[0], "work", "pid")
        os.kill(first, signal.SIGKILL)
        server.until(lambda: server.log.count("Serving as node web-0@") == 2, "it is a node again")
        assert rpc_call(nodes("web")[0], "work", "pid") != first


@pytest.mark.slow
def test_a_name_that_is_taken_keeps_no_app_from_serving(start):
    with serve_node("web-0") as present, start() as server:
        server.ready()
        server.logged("Not a node yet, trying again: the node name web-0@")
        present.close()
        server.logged("Serving as node web-0@")
        assert names(1) == ["web-0"]


def test_a_name_that_is_none_is_a_boot_error(start):
    with start(name="not a name") as server:
        assert server.process.wait(20) == 3
        assert "node name 'not a name@" in server.log


def test_without_the_variable_a_worker_is_no_node(monkeypatch):
    monkeypatch.delenv("HORNBEAM_NODE", raising=False)
    threads = set(threading.enumerate())
    node = WorkerNode()
    node.take_name(0)
    node.start()
    assert threads.issuperset(threading.enumerate())
    assert node.unfinished == 0
    node.leave(1.0)


def test_a_worker_that_starts_is_a_node_when_it_goes_on(default, monkeypatch):
    """Then it says that it is ready, and others leave."""
    monkeypatch.setattr(worker_node, "_FIRST_TRY_S", 20.0)
    monkeypatch.setenv("HORNBEAM_NODE", "first")
    node = WorkerNode()
    node.take_name(0)
    node.start()
    assert [one.name.partition("@")[0] for one in own_nodes()] == ["first-0"]
    node.leave(1.0)
    poll(lambda: not node.unfinished, "it has ended")


def said(server, line, times):
    return server.log.count(line) >= times


@pytest.mark.slow
def test_a_deploy_costs_no_call(start, interface):
    """Calls that go to any node find one all the time, before and after the workers change."""
    failed, stop = [], threading.Event()

    def work():
        while not stop.is_set():
            try:
                call("work.pid")
                predict("squares", 2, where="remote")
            except HornbeamError as error:
                failed.append(error)

    with start(interface, "--workers", "2") as server:
        names(2)
        caller = threading.Thread(target=work)
        caller.start()
        for begun, ended in ((4, 2), (6, 4), (8, 6)):
            server.process.send_signal(signal.SIGHUP)
            server.until(partial(said, server, "Serving as node", begun), "new workers", 60)
            server.until(partial(said, server, "Worker exiting", ended), "the old are gone", 60)
        stop.set()
        caller.join()
    assert failed == []


def test_a_worker_that_leaves_before_it_is_a_node(default, monkeypatch):
    monkeypatch.setenv("HORNBEAM_NODE", "late")
    with serve_node("late-0"):
        node = WorkerNode()
        node.take_name(0)
        node.start()
        assert node.unfinished == 1
        node.leave(1.0)
        poll(lambda: not node.unfinished, "it has ended")


def test_a_worker_whose_name_is_lost_gets_it_again(default, monkeypatch):
    monkeypatch.setenv("HORNBEAM_NODE", "lost")
    node = WorkerNode()
    node.take_name(3)
    node.start()
    (first,) = poll(own_nodes, "it is a node")
    first.close(0)
    (second,) = poll(own_nodes, "it is one again")
    assert second is not first
    assert second.name.startswith("lost-3@")
    node.leave(1.0)
    poll(lambda: not node.unfinished, "it has ended")
    assert not own_nodes()
