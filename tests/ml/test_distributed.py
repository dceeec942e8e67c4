"""Batches over nodes that are real processes, which fail, hang and end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from math import inf
from pathlib import Path

import numpy as np
import pytest
from child_processes import Child
from prediction_nodes import MODULE, PredictionNode
from rpc_helpers import default_store_at

from hornbeam_ml import ClientDisconnected, DistributedInference, ModelError
from hornbeam_ml.request import Request, set_current_request
from hornbeam_state import (
    CodecError,
    ConfigError,
    DeadlineExceeded,
    NodeDown,
    Overloaded,
    RemoteError,
    StoreUnavailable,
    serve_node,
    set_default_store,
)
from hornbeam_state.config import StoreConfig
from hornbeam_state.store import Store

TEXTS = [f"text {number}" for number in range(1000)]
FDS = Path("/proc/self/fd")
ANSWERS = [f"{text}!" for text in TEXTS]


def here(items):
    return [f"{item} here" for item in items]


def wait_until(check, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    return f"lmdb://{tmp_path_factory.mktemp('distributed')}/store"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(autouse=True)
def clean(files):
    """No test finds what the one before left behind, and none leaves a function waiting."""
    yield
    for path in list(files.iterdir()):
        if path.suffix == ".began":
            path.with_suffix("").touch()
        elif path.name in ("hangs", "failed", "began", "cancelled"):
            path.unlink()


@pytest.fixture(scope="module")
def gpus(url, files):
    """Two nodes that all tests use, who leave them as they were."""
    with (
        PredictionNode(url, "gpu-1", files=files, wait=False) as one,
        PredictionNode(url, "gpu-2", files=files, wait=False) as two,
    ):
        yield [one.await_ready(), two.await_ready()]


@pytest.fixture
def make_node(url, files):
    """Return what starts a node for one test."""
    made = []

    def make(name, **environ):
        made.append(PredictionNode(url, name, files=files, **environ))
        return made[-1]

    yield make
    for each in made:
        each.__exit__()


@pytest.fixture(autouse=True)
def store(url):
    """The default store is that of the nodes."""
    with default_store_at(url) as made:
        yield made


@pytest.fixture(params=["async", "sync", "sync on a loop's thread"])
def predict(request):
    """Return what runs a batch in one of the ways there are."""

    async def on_a_loop(inference, inputs):
        return inference.predict_batch_sync(inputs)

    return {
        "async": lambda inference, inputs: asyncio.run(inference.predict_batch(inputs)),
        "sync": lambda inference, inputs: inference.predict_batch_sync(inputs),
        "sync on a loop's thread": lambda *given: asyncio.run(on_a_loop(*given)),
    }[request.param]


def spread(function="predict", node_filter="gpu", **options):
    return DistributedInference(node_filter, module=MODULE, function=function, **options)


def until_both_take_part(inference, run):
    """Run batches until two nodes had a part in them; return what came of each batch.

    A node that stands still for the length of a batch has its chunk done by the other.
    """
    outcomes = []

    def both_took_part():
        outcomes.append(run())
        nodes = inference.stats().nodes.values()
        return len(nodes) == 2 and all(node.chunks for node in nodes)

    wait_until(both_took_part)
    return outcomes


class TestBatches:
    def test_results_are_in_the_order_of_the_inputs(self, gpus, predict):
        inference = spread(batch_size=16)
        batches = until_both_take_part(inference, lambda: predict(inference, TEXTS))
        assert all(results == ANSWERS for results in batches)
        stats = inference.stats()
        assert stats.items == 1000 * len(batches)
        assert sorted(stats.nodes) == [gpu.name for gpu in gpus]
        assert stats.chunks == sum(node.chunks for node in stats.nodes.values()) >= stats.items / 16
        assert all(node.items_per_second > 0 for node in stats.nodes.values())
        assert (stats.failed, stats.local.chunks) == (0, 0)

    def test_all_nodes_take_part(self, gpus):
        inference = spread("pids")
        batches = until_both_take_part(inference, lambda: inference.predict_batch_sync(TEXTS))
        assert {pid for pids in batches for pid in pids} == {gpu.pid for gpu in gpus}

    @pytest.mark.parametrize("inputs", [[], (), np.zeros((0, 3)), iter([])])
    def test_nothing_in_nothing_out(self, inputs, predict):
        assert predict(spread(), inputs) == []

    @pytest.mark.parametrize(
        ("inputs", "kind"),
        [
            pytest.param([1, 2], "list", id="list"),
            pytest.param((1, 2), "list", id="tuple"),
            pytest.param(range(2), "list", id="range"),
            pytest.param((item for item in "ab"), "list", id="generator"),
            pytest.param(np.arange(2), "ndarray", id="array"),
        ],
    )
    def test_the_function_gets_a_list_or_an_array(self, gpus, inputs, kind):
        assert spread("kinds").predict_batch_sync(inputs) == [kind] * 2

    def test_rows_of_arrays(self, gpus):
        rows = np.random.default_rng(0).random((500, 8))
        results = spread("twice").predict_batch_sync(rows)
        assert len(results) == 500
        assert np.array_equal(np.stack(results), rows * 2)

    @pytest.mark.parametrize("inputs", ["a text", b"bytes", {"a": 1}])
    async def test_what_is_no_list_of_items_is_refused(self, inputs):
        with pytest.raises(TypeError, match="list of items"):
            await spread().predict_batch(inputs)

    async def test_many_batches_at_a_time(self, gpus):
        inference = spread(batch_size=8)
        batches = [inference.predict_batch(TEXTS[start : start + 50]) for start in range(50)]
        results = await asyncio.gather(*batches)
        assert results == [ANSWERS[start : start + 50] for start in range(50)]

    def test_from_many_threads(self, gpus):
        inference, results = spread(batch_size=8), {}

        def work(start):
            results[start] = inference.predict_batch_sync(TEXTS[start : start + 50])

        threads = [threading.Thread(target=work, args=(start,)) for start in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert results == {start: ANSWERS[start : start + 50] for start in range(10)}

    def test_nothing_is_left_behind(self, gpus, predict):
        inference = spread(local=here)
        until_both_take_part(inference, lambda: predict(inference, TEXTS))  # connects to both
        before = threading.active_count(), len(list(FDS.iterdir()))
        for _ in range(5):
            predict(inference, TEXTS)
        wait_until(lambda: threading.active_count() <= before[0])
        wait_until(lambda: len(list(FDS.iterdir())) <= before[1])

    def test_a_forked_child_spreads_batches_too(self, gpus):
        inference = spread()
        inference.predict_batch_sync(TEXTS)
        child = Child(lambda: inference.predict_batch_sync(TEXTS[:5]))
        assert child.outcome().value == ANSWERS[:5]
        assert inference.predict_batch_sync(TEXTS[:5]) == ANSWERS[:5]


class TestNodes:
    async def test_nodes_that_match_and_expose_the_function(self, gpus, make_node):
        make_node("cpu")
        names = [gpu.name for gpu in gpus]
        assert spread().get_worker_nodes() == names
        assert await spread().aget_worker_nodes() == names
        assert len(spread(node_filter="").get_worker_nodes()) == 3
        assert spread("nonesuch").get_worker_nodes() == []
        assert spread(node_filter="gpu-2").get_worker_nodes() == names[1:]

    def test_this_process_is_none_of_them(self):
        with serve_node("gpu-here"):
            assert spread(node_filter="gpu-here").get_worker_nodes() == []

    def test_a_slow_node_gets_less(self, make_node):
        make_node("pace-fast", ITEM_MS="1")
        make_node("pace-slow", ITEM_MS="20")
        inference = spread(node_filter="pace")
        batches = until_both_take_part(inference, lambda: inference.predict_batch_sync(TEXTS))
        assert all(results == ANSWERS for results in batches)
        fast, slow = inference.stats().nodes.values()
        assert fast.items > 4 * slow.items > 0

    def test_a_node_that_comes_later_joins(self, make_node):
        make_node("join-1", ITEM_MS="10")
        inference = spread(node_filter="join", batch_size=4)
        batch = threading.Thread(target=inference.predict_batch_sync, args=(TEXTS,))
        batch.start()
        wait_until(lambda: inference.stats().items)
        make_node("join-2", ITEM_MS="0")
        batch.join(60)
        assert inference.stats().nodes.keys() == {
            *(name for name in inference.get_worker_nodes() if name.startswith("join"))
        }
        assert len(inference.stats().nodes) == 2


class TestFailures:
    def test_a_node_is_killed_half_way(self, make_node, files):
        """While it works: all is complete, in order, each result once."""
        nodes = {node.pid: node for node in (make_node("kill-1"), make_node("kill-2"))}
        texts = [f"text {number}" for number in range(10_000)]
        inference, results = spread("predict_or_hang", "kill"), []
        batch = threading.Thread(target=lambda: results.extend(inference.predict_batch_sync(texts)))
        batch.start()
        hangs = files / "hangs"
        wait_until(lambda: hangs.exists() and hangs.read_text())
        killed = nodes[int(hangs.read_text())]
        killed.kill()
        began = time.monotonic()
        batch.join(60)
        took_s = time.monotonic() - began
        assert results == [f"{text}!" for text in texts]
        stats = inference.stats()
        assert stats.items == 10_000
        failed = stats.nodes[killed.name].failed + stats.nodes[killed.name].late
        assert 1 <= failed <= 1 + took_s / 2  # it is out for two seconds each time

    def test_a_node_is_stopped(self, make_node):
        """Nobody waits for the end of its heartbeats: another gets a copy of its chunk."""
        nodes = [make_node("stop-1", ITEM_MS="1"), make_node("stop-2", ITEM_MS="1")]
        inference = spread(node_filter="stop")
        until_both_take_part(inference, lambda: inference.predict_batch_sync(TEXTS))
        before = inference.stats().nodes[nodes[0].name]
        nodes[0].signal(signal.SIGSTOP)
        assert inference.predict_batch_sync(TEXTS) == ANSWERS
        stats = inference.stats().nodes[nodes[0].name]
        assert stats.late + stats.failed == before.late + before.failed + 1

    def test_a_late_chunk_goes_to_another_node(self, gpus):
        inference = spread("wait_for_gate", timeout_ms=800)
        assert inference.predict_batch_sync(["first"]) == ["first!"]
        assert inference.stats().late == 1
        assert inference.stats().items == 1

    def test_a_late_chunk_is_run_here(self, make_node):
        make_node("late")
        inference = spread("wait_for_gate", "late", timeout_ms=200, local=here)
        assert inference.predict_batch_sync(["second"]) == ["second here"]
        assert (inference.stats().late, inference.stats().local.items) == (1, 1)

    def test_a_late_chunk_without_anywhere_to_go(self, make_node, predict):
        make_node("late")
        with pytest.raises(DeadlineExceeded):
            predict(spread("until_cancelled", "late", timeout_ms=100), ["a"])

    def test_the_function_raises(self, gpus, files, predict):
        """Tried on both nodes, once each."""
        with pytest.raises(RemoteError, match="wrong items"):
            predict(spread("fail"), ["a"])
        assert (files / "failed").read_text() == "xx"

    def test_the_function_raises_and_then_it_is_run_here(self, gpus, files, predict):
        inference = spread("fail", local=here)
        assert predict(inference, ["a", "b"]) == ["a here", "b here"]
        assert inference.stats().local.items == 2
        assert inference.stats().failed == len((files / "failed").read_text())

    @pytest.mark.parametrize("function", ["too_few", "one_text"])
    def test_it_returns_something_else(self, gpus, function):
        assert spread(function, local=here).predict_batch_sync(["a"]) == ["a here"]
        with pytest.raises(ModelError):
            spread(function).predict_batch_sync(["a"])

    def test_nodes_without_room(self, gpus):
        assert spread("full", local=here).predict_batch_sync(["a"]) == ["a here"]
        with pytest.raises(Overloaded):
            spread("full", timeout_ms=700).predict_batch_sync(["a"])

    def test_items_that_cannot_be_sent(self, gpus):
        items = [object()]
        assert spread(local=lambda given: given).predict_batch_sync(items) == items
        with pytest.raises(CodecError):
            spread().predict_batch_sync(items)

    def test_no_node_is_there(self, predict):
        inference = spread(node_filter="nobody", local=here)
        assert predict(inference, TEXTS) == here(TEXTS)
        assert inference.stats().local.items == 1000
        with pytest.raises(
            NodeDown, match=r"'nobody' in its name exposes ml_worker\.predict"
        ) as raised:
            predict(spread(node_filter="nobody"), TEXTS)
        assert not raised.value.sent

    def test_the_store_is_away(self, tmp_path, predict):
        away = Store(StoreConfig.from_url(f"unix://{tmp_path}/no-redis.sock"))
        before = set_default_store(away)
        try:
            assert predict(spread(local=here), TEXTS) == here(TEXTS)
            with pytest.raises(StoreUnavailable):
                predict(spread(), TEXTS)
        finally:
            set_default_store(before)
            away.close()


class TestHere:
    @pytest.fixture
    def ahere(self):
        async def answer(items):
            await asyncio.sleep(0)
            return here(items)

        return answer

    async def test_a_coroutine_function(self, ahere):
        inference = spread(node_filter="nobody", local=ahere)
        assert await inference.predict_batch(["a"]) == ["a here"]
        assert await inference.alocal_predict(["a"]) == ["a here"]
        assert inference.local_predict(("a",)) == ["a here"]

    async def test_a_plain_function_does_not_block_the_loop(self):
        ours, seen = threading.get_ident(), []
        inference = spread(
            node_filter="nobody", local=lambda items: seen.append(threading.get_ident()) or items
        )
        assert await inference.predict_batch(["a"]) == ["a"]
        assert await inference.alocal_predict(["a"]) == ["a"]
        assert ours not in seen
        assert inference.local_predict(["a"]) == ["a"]
        assert seen[2:] == [ours]

    def test_its_errors_are_its_own(self, predict):
        def fail(items):
            raise KeyError(len(items))

        with pytest.raises(KeyError):
            predict(spread(node_filter="nobody", local=fail), ["a"])

    def test_too_few_results(self, predict):
        inference = spread(node_filter="nobody", local=lambda items: items[1:])
        with pytest.raises(ModelError, match="0 results came back for 1 items"):
            predict(inference, ["a"])
        with pytest.raises(ModelError):
            inference.local_predict(["a"])

    async def test_there_is_none(self):
        for attempt in (spread().local_predict, spread().alocal_predict):
            with pytest.raises(ConfigError, match="local="):
                await attempt(["a"])


class TestEnding:
    async def test_cancelled_it_cancels_the_calls(self, gpus, files):
        batch = asyncio.create_task(spread("until_cancelled").predict_batch(["a"]))
        await asyncio.to_thread(wait_until, (files / "began").exists)
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch
        await asyncio.to_thread(wait_until, (files / "cancelled").exists)

    @pytest.mark.parametrize("on_a_loop", [False, True])
    def test_interrupted_it_cancels_the_calls(self, gpus, files, on_a_loop):
        """Ctrl-C, while the blocking twin waits."""

        noticed = threading.Event()

        def notice(_number, _frame):
            if not noticed.is_set():
                noticed.set()
                raise KeyboardInterrupt

        def interrupt():
            wait_until((files / "began").exists)
            # CPython misses a signal that comes as its main thread begins to wait for a lock.
            for _ in range(20):
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                if noticed.wait(1):
                    break

        def work():
            spread("until_cancelled").predict_batch_sync(["a"])

        async def on_its_thread():
            work()

        # `asyncio.run` would take the first interrupt for itself.
        loop = asyncio.new_event_loop()
        before = signal.signal(signal.SIGINT, notice)
        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            with contextlib.closing(loop), pytest.raises(KeyboardInterrupt):
                loop.run_until_complete(on_its_thread()) if on_a_loop else work()
            thread.join()
        finally:
            signal.signal(signal.SIGINT, before)
        wait_until((files / "cancelled").exists)

    def test_the_deadline_of_a_request(self, gpus, files, predict):
        token = set_current_request(Request(time.monotonic() + 0.3))
        try:
            with pytest.raises(DeadlineExceeded):
                predict(spread("until_cancelled"), ["a"])
        finally:
            token.var.reset(token)
        # On a busy machine the deadline may pass before the function has begun.
        wait_until(lambda: (files / "cancelled").exists() or not (files / "began").exists())

    async def test_a_deadline_that_passes_while_something_holds_up_the_loop(self, gpus):
        class HeldUp(DistributedInference):
            async def aget_worker_nodes(self):
                found = await super().aget_worker_nodes()
                asyncio.get_running_loop().call_soon(time.sleep, 0.4)  # before the calls begin
                return found

        token = set_current_request(Request(time.monotonic() + 0.3))
        try:
            with pytest.raises(DeadlineExceeded):
                await HeldUp("gpu", module=MODULE, function="predict").predict_batch(["a"])
        finally:
            token.var.reset(token)

    async def test_the_client_of_a_request_leaves(self, gpus, files):
        request = Request(inf)
        token = set_current_request(request)
        batch = asyncio.create_task(spread("until_cancelled").predict_batch(["a"]))
        token.var.reset(token)
        await asyncio.to_thread(wait_until, (files / "began").exists)
        await asyncio.to_thread(request.leave)
        with pytest.raises(ClientDisconnected):
            await batch
        await asyncio.to_thread(wait_until, (files / "cancelled").exists)


class TestSettings:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"batch_size": 0},
            {"batch_size": True},
            {"timeout_ms": 0},
            {"timeout_ms": inf},
            {"local": 5},
        ],
    )
    def test_what_makes_no_sense_is_refused_at_once(self, wrong):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            spread(**wrong)

    @pytest.mark.parametrize(
        ("count", "parts", "sizes"),
        [(10, 3, [4, 3, 3]), (2, 4, [1, 1, 0, 0]), (0, 2, [0, 0]), (9, 1, [9])],
    )
    def test_parts_of_inputs(self, count, parts, sizes):
        inputs = list(range(count))
        split = spread().split_inputs(inputs, parts)
        assert [len(part) for part in split] == sizes
        assert [item for part in split for item in part] == inputs
        with pytest.raises(ConfigError):
            spread().split_inputs(inputs, 0)
