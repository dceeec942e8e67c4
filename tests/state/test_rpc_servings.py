"""Servings of nodes: called beside functions, in turns of their own."""

from __future__ import annotations

import threading

import pytest
from node_processes import MODULE, PATIENCE_MS, NodeProcess
from rpc_helpers import default_store_at
from transport_helpers import eventually

from hornbeam_state import (
    DeadlineExceeded,
    NotExposed,
    Overloaded,
    RemoteError,
    RpcError,
    node_info,
    rpc_call,
    rpc_cast,
    rpc_stream,
    traceparent,
)
from hornbeam_state.errors import NodeDown
from hornbeam_state.rpc import carriers
from hornbeam_state.rpc.functions import default_caller
from hornbeam_state.rpc.servings import serving_target
from hornbeam_state.transports.base import Request

TARGET = serving_target("bert")


@pytest.fixture(scope="module")
def shared(registry_url):
    """A node of one turn that all tests use, who leave it as it was."""
    with NodeProcess(registry_url, "shared", servings=["bert"], concurrency=1) as running:
        yield running


@pytest.fixture(autouse=True)
def caller(registry_url, transport, monkeypatch):
    """What makes calls over the store of the nodes; over Redis as if they were elsewhere."""
    if transport == "redis":
        monkeypatch.setattr(carriers, "is_near", lambda entry: False)
    with default_store_at(registry_url):
        yield default_caller()


def ask(caller, node, *items, method="run", timeout=PATIENCE_MS / 1000, **options):
    request = Request(target=TARGET, method=method, values=items, options=options, timeout=timeout)
    return caller.exchange(node.name, request)


def test_a_serving_gets_all_items_and_its_own_name(caller, shared):
    assert ask(caller, shared, 1, "b") == [1, "b", "bert", "run", None]


async def test_a_serving_is_called_from_a_coroutine(caller, shared):
    request = Request(target=TARGET, method="run", values=[1], timeout=PATIENCE_MS / 1000)
    assert (await caller.aexchange(shared.name, request))[0] == 1


def test_the_trace_goes_along(caller, shared):
    assert ask(caller, shared, 1, traceparent="00-ab")[-1] == "00-ab"
    assert traceparent.get() is None


def test_chunks_come_one_by_one(shared):
    with rpc_stream(shared.name, TARGET, "stream", ["a"], timeout_ms=PATIENCE_MS) as chunks:
        assert list(chunks) == [["a", 0], ["a", 1], ["a", 2]]


def test_a_serving_that_is_not_there_is_refused(shared):
    with pytest.raises(NotExposed, match="has no serving 'gpt'"):
        rpc_call(shared.name, serving_target("gpt"), "run", [1])


def test_names_and_casts_are_not_for_servings(shared):
    for make in (
        lambda: rpc_call(shared.name, TARGET, "run", [1], {"top": 2}),
        lambda: rpc_cast(shared.name, TARGET, "run", [1]),
    ):
        with pytest.raises(RpcError, match=r"calls of items, nothing else|is not exposed"):
            make()


def test_the_registry_tells_the_names(shared):
    assert node_info(shared.name).servings == ("bert",)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        pytest.param("value", ValueError, id="python's own as it is"),
        pytest.param("overloaded", Overloaded, id="hornbeam's own as it is"),
        pytest.param("exit", RemoteError, id="what would end the loop"),
        pytest.param("own", RemoteError, id="of a type that is unknown here"),
    ],
)
def test_errors_of_a_model(caller, shared, kind, expected):
    with pytest.raises(expected):
        ask(caller, shared, kind, method="raise")
    assert ask(caller, shared, 1)[0] == 1


def test_news_of_another_node_are_no_news_of_this_one(caller, shared):
    with pytest.raises(RemoteError, match="NodeDown"):
        ask(caller, shared, "down", method="raise")


def test_servings_take_no_turns_of_functions(caller, shared, tmp_path):
    gate = tmp_path / "gate"
    waits = [
        threading.Thread(target=ask, args=(caller, shared, str(gate)), kwargs={"method": "wait"})
        for _ in range(3)
    ]
    try:
        for each in waits:
            each.start()
        eventually(lambda: shared.call("told").count("began to wait") == 3)
        # Three, and the one that asks. What waits in Redis is a second old.
        eventually(lambda: shared.call("load") == (4, 0))
        assert ask(caller, shared, 1)[0] == 1
    finally:
        gate.touch()
        for each in waits:
            each.join(30)


def test_a_deadline_ends_the_call(caller, shared, tmp_path):
    gate = tmp_path / "gate"
    try:
        with pytest.raises(DeadlineExceeded):
            ask(caller, shared, str(gate), method="wait", timeout=0.1)
        eventually(lambda: shared.call("load") == (1, 0))
    finally:
        gate.touch()


def test_a_node_that_drains_finishes_calls_and_refuses_new_ones(caller, registry_url, tmp_path):
    gate, results = tmp_path / "gate", []
    with NodeProcess(registry_url, "leaving", servings=["bert"]) as leaving:
        asks = threading.Thread(
            target=lambda: results.extend(ask(caller, leaving, str(gate), method="wait"))
        )
        asks.start()
        eventually(lambda: "began to wait" in leaving.call("told"))
        leaving.close()

        def refused():
            try:
                rpc_call(leaving.name, MODULE, "pid")
            except NodeDown as error:
                return not error.sent
            return False

        eventually(refused)
        with pytest.raises(NodeDown) as caught:
            ask(caller, leaving, 1)
        gate.touch()
        asks.join(30)
        assert leaving.wait() == 0
    assert not caught.value.sent
    assert results[0] == str(gate)
