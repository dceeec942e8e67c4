"""`predict` on other nodes: found, chosen, repeated where that is safe, hedged where it is asked for."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading

import numpy as np
import pytest
from gunicorn_process import poll
from node_process import NodeCommand, write_module
from rpc_helpers import default_store_at

from hornbeam_ml import DeadlineExceeded, ModelError, Overloaded, Serving, apredict, predict
from hornbeam_ml.errors import ClientDisconnected
from hornbeam_ml.node.servings import serve
from hornbeam_ml.request import Request, set_current_request
from hornbeam_state import NodeDown, node_info, rpc_stream, traceparent
from hornbeam_state.rpc.functions import default_caller

MODELS = """
import asyncio, os, threading, time
from pathlib import Path
from hornbeam_ml import DONE, Overloaded, Serving
from hornbeam_state import node, traceparent

here = Path.cwd()
own = node().partition("@")[0]

def held(item):
    (here / f"{item}.{own}.began").touch()
    while not ((here / item).exists() or (here / f"{item}.{own}").exists()):
        time.sleep(0.01)
    return item

def load_where():
    return lambda batch: [(item, own) for item in batch]

def load_sizes():
    def model(batch):
        time.sleep(0.05)
        return [len(batch)] * len(batch)
    return model

def load_bad():
    def model(batch):
        if batch[0] == "value":
            raise ValueError("no such thing")
        raise Overloaded("what the model calls is full")
    return model

def load_held():
    return lambda batch: [held(item) for item in batch]

def load_hedged():
    def model(batch):
        return [(item if item.endswith("both") else held(item), own) for item in batch]
    return model

def load_chunks():
    def model(batch):
        for step in range(3):
            yield [(item, step) for item in batch]
        yield [DONE for _ in batch]
    return model

def preprocess(item):
    return (item, traceparent.get())

def meet(item):
    gate, number = item
    (here / f"{gate}.{number}.met").touch()
    while len(list(here.glob(f"{gate}.*.met"))) < 4 and not (here / gate).exists():
        time.sleep(0.01)
    return item

where = Serving(load_where, name="where", idempotent=True)
sizes = Serving(load_sizes, name="sizes", batch_size=64)
bad = Serving(load_bad, name="bad")
narrow = Serving(load_held, name="narrow", batch_size=1, queue_limit=1)
hedged = Serving(load_hedged, name="hedged", batch_size=1, streams=2, idempotent=True)
double = Serving(lambda: lambda batch: batch * 2, name="double", collate="stack")
chunks = Serving(load_chunks, name="chunks")
traced = Serving(lambda: lambda batch: batch, name="traced", preprocess=preprocess)
meeting = Serving(lambda: lambda batch: batch, name="meeting", preprocess=meet)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    made = tmp_path_factory.mktemp("nodes")
    write_module(made, MODELS)
    return made


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    return f"lmdb://{tmp_path_factory.mktemp('store')}"


@pytest.fixture(scope="module")
def nodes(directory, url):
    """Two nodes that all tests use, who leave them as they were."""
    with (
        NodeCommand(directory, url, "--name", "a", "--concurrency", "1") as a,
        NodeCommand(directory, url, "--name", "b", "--concurrency", "1") as b,
    ):
        yield {"a": a.ready(), "b": b.ready()}


@pytest.fixture(autouse=True)
def default(url, nodes):
    """The default store is that of the nodes."""
    with default_store_at(url) as made:
        yield made


@pytest.fixture
def gate(directory):
    """The name of a file that lets a held model go on, and of the files that say who holds it."""
    name = f"gate-{os.urandom(4).hex()}"
    yield directory / name
    (directory / name).touch()


def holders(gate):
    return {path.name.split(".")[1] for path in gate.parent.glob(f"{gate.name}.*.began")}


def in_thread(*args, request=None, **kwargs):
    """Predict in a thread; return it and the list for what came of it."""
    outcomes = []

    def run():
        set_current_request(request)
        try:
            outcomes.append(predict(*args, **kwargs))
        except Exception as error:
            outcomes.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcomes


class TestWhere:
    @pytest.mark.parametrize("where", ["auto", "remote"])
    def test_a_serving_that_only_nodes_have(self, where):
        assert predict("where", 1, where=where)[0] == 1

    async def test_its_twin(self):
        assert (await apredict("where", 1, where="remote"))[0] == 1

    def test_both_nodes_are_asked(self):
        """One is preferred for a second at most, when the other said that it had something to do."""
        asked = set()
        poll(lambda: asked.add(predict("where", 1)[1]) or asked == {"a", "b"}, "both were asked")

    def test_the_nearest_comes_first(self):
        with Serving(lambda: lambda batch: [(item, "here") for item in batch], name="where"):
            assert predict("where", 1) == (1, "here")
            assert predict("where", 1, where="remote")[1] != "here"

    def test_this_process_is_no_other_node(self):
        with Serving(lambda: lambda batch: batch, name="mine") as mine:
            mine.start()
            with serve("own") as server:
                assert node_info(server.name).servings == ("mine",)
                with pytest.raises(ModelError, match="no serving 'mine' on any of 2 other nodes"):
                    predict("mine", 1, where="remote")

    def test_what_is_nowhere_says_where_it_was_looked_for(self):
        said = (
            r"no serving is registered as 'nix'; registered: none; no model host; "
            r"no serving 'nix' on any of 2 other nodes"
        )
        with pytest.raises(ModelError, match=said):
            predict("nix", 1)
        with pytest.raises(ModelError, match=r"^no serving 'nix' on any of 2 other nodes$"):
            predict("nix", 1, where="remote")

    def test_a_place_that_there_is_not(self):
        with pytest.raises(ValueError, match="'auto', 'local', 'host', 'remote'"):
            predict("where", 1, where="cloud")


class TestCalls:
    def test_they_form_batches_whatever_the_concurrency(self):
        async def many():
            return await asyncio.gather(*(apredict("sizes", n, where="remote") for n in range(60)))

        assert max(asyncio.run(many())) > 8

    def test_arrays_arrive_as_arrays(self):
        array = np.arange(6, dtype=np.float32).reshape(2, 3)
        doubled = predict("double", array, where="remote")
        assert doubled.dtype == np.float32
        np.testing.assert_array_equal(doubled, 2 * array)

    def test_inline(self):
        assert predict("where", 1, where="remote", inline=True)[0] == 1

    def test_preprocess_runs_there_and_the_trace_goes_along(self):
        token = traceparent.set("00-ab-cd-01")
        try:
            assert predict("traced", 1, where="remote") == (1, "00-ab-cd-01")
        finally:
            traceparent.reset(token)

    def test_a_slow_preprocess_holds_up_nobody(self, gate):
        """Four wait for each other, on two nodes."""

        async def meet(number):
            item = [gate.name, number]
            return await apredict("meeting", item, where="remote", timeout_ms=20_000)

        async def meet_all():
            return await asyncio.gather(*map(meet, range(4)))

        assert asyncio.run(meet_all()) == [[gate.name, number] for number in range(4)]

    def test_chunks(self, nodes):
        with rpc_stream(nodes["a"].name, "serving:chunks", "stream", ["x"]) as chunks:
            assert list(chunks) == [("x", 0), ("x", 1), ("x", 2)]

    def test_errors_of_the_model_are_as_they_are_here(self):
        with pytest.raises(ValueError, match="no such thing"):
            predict("bad", "value", where="remote")

    def test_what_only_looks_like_a_refusal_is_not_repeated(self):
        with pytest.raises(Overloaded, match="what the model calls") as caught:
            predict("bad", "full", where="remote")
        assert caught.value.sent

    def test_a_deadline(self, gate):
        with pytest.raises(DeadlineExceeded):
            predict("hedged", gate.name, where="remote", timeout_ms=100)

    @pytest.mark.parametrize("hedge_ms", [None, 10_000])
    def test_a_client_that_leaves(self, gate, hedge_ms):
        request = Request()
        thread, outcomes = in_thread(
            "hedged", gate.name, where="remote", hedge_ms=hedge_ms, request=request
        )
        poll(lambda: holders(gate), "it runs")
        request.leave()
        thread.join(10)
        assert [type(outcome) for outcome in outcomes] == [ClientDisconnected]


class TestRepeating:
    def test_a_full_node_sends_the_call_on(self, gate):
        """Each node runs one and lets one wait: it takes both of them to refuse a call."""
        calls = []

        def refused():
            calls.append(in_thread("narrow", gate.name, where="remote"))
            return any(outcomes for _, outcomes in calls)

        poll(refused, "the nodes are full")
        poll(lambda: holders(gate) == {"a", "b"}, "each runs one")
        gate.touch()
        for thread, _ in calls:
            thread.join(10)
        outcomes = [outcome for _, (outcome,) in calls]
        refusals = [outcome for outcome in outcomes if isinstance(outcome, Overloaded)]
        assert refusals
        assert not any(refusal.sent for refusal in refusals)
        assert outcomes.count(gate.name) == len(outcomes) - len(refusals)

    def test_a_node_that_dies_with_the_call_is_not_followed(self, directory, url, gate):
        write_module(directory, MODELS.replace('"hedged"', '"single"'), "single")
        with NodeCommand(directory, url, "--name", "c", module="single") as node:
            node.ready()
            poll(lambda: _is_seen("single"), "it is seen")
            thread, outcomes = in_thread("single", gate.name, where="remote")
            poll(lambda: holders(gate), "it runs")
            os.kill(node.child(), signal.SIGKILL)
            thread.join(10)
        assert isinstance(outcomes[0], NodeDown)
        assert outcomes[0].sent

    def test_nodes_that_came_since_the_list_was_read(self, directory, url, monkeypatch):
        """As at a deploy: those that were known are gone, the others are not known yet."""
        monkeypatch.setattr("hornbeam_state.rpc.registry._FRESH_S", 3600.0)
        write_module(directory, MODELS.replace('"where"', '"deployed"'), "deployed")
        with NodeCommand(directory, url, "--name", "old", module="deployed") as old:
            old.ready()
            assert predict("deployed", 1) == (1, "old")
            stale = default_caller().registry._listing
        with NodeCommand(directory, url, "--name", "new", module="deployed") as new:
            new.ready()
            for predicts in (
                lambda: predict("deployed", 1),
                lambda: predict("deployed", 1, hedge_ms=5000),
                lambda: asyncio.run(apredict("deployed", 1)),
            ):
                default_caller().registry._listing = stale
                assert predicts() == (1, "new")

    def test_a_node_that_drains_is_passed_over(self, directory, url, nodes):
        async def all_along(stop):
            while not stop.is_set():
                await apredict("where", 1, where="remote", timeout_ms=20_000)
                await asyncio.sleep(0.005)

        async def leave():
            stop = asyncio.Event()
            calls = [asyncio.create_task(all_along(stop)) for _ in range(2)]
            with NodeCommand(directory, url, "--name", "leaves") as node:
                await asyncio.to_thread(node.ready)
                await asyncio.sleep(0.3)
                node.end()
                await asyncio.to_thread(node.wait)
            stop.set()
            await asyncio.gather(*calls)  # none failed

        asyncio.run(leave())


def _is_seen(name):
    with contextlib.suppress(ModelError):
        return predict(name, "x-both", where="remote")
    return None


def let_go(gate, node):
    gate.with_name(f"{gate.name}.{node}").touch()


class TestHedging:
    def test_the_second_is_asked_when_the_first_is_late(self, gate):
        thread, outcomes = in_thread("hedged", gate.name, hedge_ms=30)
        poll(lambda: holders(gate) == {"a", "b"}, "both are asked")
        let_go(gate, "b")
        thread.join(10)
        assert outcomes == [(gate.name, "b")]

    async def test_its_twin(self, gate):
        call = asyncio.create_task(apredict("hedged", gate.name, hedge_ms=30))
        await asyncio.to_thread(poll, lambda: holders(gate) == {"a", "b"}, "both are asked")
        let_go(gate, "a")
        assert await call == (gate.name, "a")

    async def test_a_sync_call_on_a_running_loop(self):
        assert predict("hedged", "x-both", hedge_ms=5000)[0] == "x-both"

    def test_a_quick_call_goes_to_one_node(self, gate):
        thread, outcomes = in_thread("hedged", gate.name, hedge_ms=10_000)
        (only,) = poll(lambda: holders(gate), "one is asked")
        let_go(gate, only)
        thread.join(10)
        assert outcomes == [(gate.name, only)]
        assert holders(gate) == {only}

    def test_a_node_that_dies_is_replaced_by_the_other(self, directory, url, gate, nodes):
        thread, outcomes = in_thread("hedged", gate.name, hedge_ms=30)
        poll(lambda: holders(gate) == {"a", "b"}, "both are asked")
        os.kill(nodes["a"].child(), signal.SIGKILL)
        let_go(gate, "b")
        thread.join(10)
        assert outcomes == [(gate.name, "b")]
        nodes["a"].ready(2)

    def test_it_is_for_idempotent_servings(self):
        with pytest.raises(ValueError, match="declare 'sizes' as such"):
            predict("sizes", 1, hedge_ms=5)

    @pytest.mark.parametrize("hedge_ms", [0, -1, float("nan"), float("inf")])
    def test_times_that_make_no_sense(self, hedge_ms):
        with pytest.raises(ValueError, match="milliseconds above 0"):
            predict("hedged", 1, hedge_ms=hedge_ms)
