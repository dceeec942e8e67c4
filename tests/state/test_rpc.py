"""Calls between nodes: what arrives, what is refused, and what ends with whom."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from child_processes import Child
from node_processes import MODULE, PATIENCE_MS, NodeProcess, beginning, ran
from rpc_helpers import default_store_at
from transport_helpers import eventually, miss_deadline, rss

from hornbeam_state import (
    CodecError,
    ConfigError,
    DeadlineExceeded,
    NodeDown,
    NotExposed,
    Overloaded,
    RemoteError,
    RpcError,
    acall,
    acast,
    anode_info,
    anodes,
    arpc_call,
    arpc_cast,
    arpc_stream,
    aserve_node,
    call,
    cast,
    expose,
    node,
    node_info,
    nodes,
    rpc_call,
    rpc_cast,
    rpc_stream,
    serve_node,
    traceparent,
)
from hornbeam_state.rpc import carriers, exposed
from hornbeam_state.rpc.entries import PREFIX
from hornbeam_state.rpc.functions import default_caller
from hornbeam_state.rpc.links import Links
from hornbeam_state.rpc.outcomes import unsent
from hornbeam_state.transports.local.channel import LocalChannel
from hornbeam_state.transports.redis import RedisChannel

pytestmark = pytest.mark.filterwarnings("error")

ENDLESS = [10**9, None, 0.001]
"""Of `acount`: so that a listener who pauses is not too far behind."""


@pytest.fixture(scope="module")
def shared(registry_url):
    """A node that all tests use, who leave it as it was."""
    with NodeProcess(
        registry_url, "shared", tags=["a"], servings=["bert"], concurrency=4
    ) as running:
        yield running


@pytest.fixture(autouse=True)
def default(registry_url, transport, monkeypatch):
    """The default store is that of the nodes. Over Redis, they are as far as on another machine."""
    monkeypatch.setenv("HORNBEAM_STORE", registry_url)
    if transport == "redis":
        monkeypatch.setattr(carriers, "is_near", lambda entry: False)
    with default_store_at(registry_url) as store:
        yield store


@pytest.fixture
def start(registry_url, request):
    """Return what starts a node of a name of its own, which ends with the test."""
    started = []

    def begin(name=None, **options):
        name = name or f"n{abs(hash(request.node.name)) % 10**9}"
        started.append(NodeProcess(registry_url, name, **options))
        return started[-1]

    yield begin
    for each in started:
        each.__exit__()


class TestCalls:
    @pytest.mark.parametrize("function", ["echo", "aecho"])
    @pytest.mark.parametrize("value", [None, 0, "x" * 1500, {"a": (1, b"2", 2**80)}, [1.5, {3}]])
    def test_a_value_comes_back_as_it_was(self, shared, function, value):
        assert shared.call(function, value) == value

    def test_it_runs_on_the_node(self, shared):
        assert shared.call("pid") == shared.pid

    def test_arguments_keep_their_names_and_order(self, shared):
        assert shared.call("echo", 1, (2,), b=3, a=[4]) == [1, (2,), {"b": 3, "a": [4]}]

    @pytest.mark.parametrize("megabytes", [0.001, 10])
    def test_arrays_arrive_as_arrays(self, shared, megabytes):
        array = np.random.default_rng(0).random(int(megabytes * 1e6 / 8))
        result = shared.call("echo", array)
        assert result.dtype == array.dtype
        assert np.array_equal(result, array)

    @pytest.mark.slow
    def test_an_array_of_100_mb(self, shared):
        array = np.arange(12_500_000, dtype=np.int64).reshape(2500, -1)
        assert np.array_equal(shared.call("echo", array), array)

    async def test_the_twins_do_the_same(self, shared):
        assert await arpc_call(shared.name, MODULE, "echo", [1], {"k": 2}) == [1, {"k": 2}]
        assert await acall(f"{MODULE}.aecho", "x") == "x"
        assert [item async for item in arpc_stream(shared.name, MODULE, "count", [3])] == [0, 1, 2]
        assert shared.name in await anodes()
        assert (await anode_info(shared.name)).tags == ("a",)

    def test_any_thread_and_loop_may_call(self, shared):
        async def some(label):
            return await asyncio.gather(
                *(arpc_call(shared.name, MODULE, "aecho", [f"{label} {n}"]) for n in range(20))
            )

        with ThreadPoolExecutor(8) as pool:
            loops = [pool.submit(asyncio.run, some(label)) for label in range(4)]
            threads = [pool.submit(shared.call, "echo", number) for number in range(100)]
        assert [one.result() for one in threads] == list(range(100))
        assert [one.result()[19] for one in loops] == [f"{label} 19" for label in range(4)]

    def test_a_child_calls_for_itself(self, shared):
        """What the parent waits for is not its own."""
        assert shared.call("echo", 1) == 1
        child = Child(lambda: shared.call("pid"))
        assert child.value() == shared.call("pid")

    @pytest.mark.parametrize("timeout_ms", [0, -1, float("nan"), float("inf")])
    def test_a_timeout_is_a_time(self, shared, timeout_ms):
        with pytest.raises(ValueError, match="timeout_ms"):
            shared.call("echo", 1, timeout_ms=timeout_ms)
        with pytest.raises(TypeError, match="timeout_ms"):
            shared.call("echo", 1, timeout_ms="5")

    def test_without_a_timeout_there_is_no_bound(self, shared):
        assert shared.call("echo", 1, timeout_ms=None) == 1

    def test_an_argument_that_is_no_value_is_refused_here(self, shared):
        with pytest.raises(CodecError, match="register_codec"):
            shared.call("echo", object())

    def test_a_result_that_is_no_value_is_refused_there(self, shared):
        with pytest.raises(CodecError, match="register_codec"):
            shared.call("unsendable")


class TestErrors:
    @pytest.mark.parametrize("function", ["fail", "afail"])
    @pytest.mark.parametrize(
        ("kind", "type", "message"),
        [
            ("value", "ValueError", "wrong"),
            ("timeout", "TimeoutError", "its own"),
            ("own", "Own", "mine"),
            ("exit", "SystemExit", "3"),
            ("cancelled", "CancelledError", "not yours"),
        ],
    )
    def test_what_a_function_raised_never_looks_like_ones_own(
        self, shared, function, kind, type, message
    ):
        with pytest.raises(RemoteError) as caught:
            shared.call(function, kind)
        assert (caught.value.remote_type, caught.value.remote_message) == (type, message)
        assert caught.value.remote_traceback is None

    def test_a_stop_iteration_is_an_error_like_others(self, shared):
        with pytest.raises(RemoteError, match="over"):
            shared.call("fail", "stop")

    def test_an_error_of_hornbeam_is_one_for_the_caller_too(self, shared):
        with pytest.raises(Overloaded, match="its queue"):
            shared.call("fail", "overloaded")

    def test_an_error_about_another_node_says_nothing_of_this_one(self, shared):
        """Taken for one of this call, it would be repeated."""
        with pytest.raises(RemoteError) as caught:
            shared.call("fail_at_another", "nobody@nowhere")
        assert caught.value.remote_type == "NodeDown"

    def test_a_traceback_comes_when_the_node_was_asked_for_it(self, start):
        with (
            start(environ={"HORNBEAM_RPC_TRACEBACKS": "1"}) as node,
            pytest.raises(RemoteError) as caught,
        ):
            node.call("fail", "value")
        assert "node_processes.py" in caught.value.remote_traceback

    def test_what_is_not_exposed_is_not_there(self, shared):
        with pytest.raises(NotExposed, match=r"is it told\?"):
            shared.call("tolt")
        with pytest.raises(NotExposed, match=r"work.zzzzzz is not exposed here: \d+ other"):
            shared.call("zzzzzz")
        with pytest.raises(NotExposed, match=r"os\.getpid is not exposed here$"):
            rpc_call(shared.name, "os", "getpid")

    def test_nothing_is_imported_because_a_call_says_so(self, shared, tmp_path):
        with pytest.raises(NotExposed):
            rpc_call(shared.name, "antigravity", "fly")
        with pytest.raises(NotExposed):
            rpc_call(shared.name, "node_processes", "main")

    def test_generators_and_functions_are_not_confused(self, shared):
        with pytest.raises(RpcError, match="rpc_stream"):
            shared.call("count", 3)
        with pytest.raises(RpcError, match="does not yield"):
            next(rpc_stream(shared.name, MODULE, "echo", [1]))


class TestStreams:
    @pytest.mark.parametrize("function", ["count", "acount"])
    def test_items_come_in_order(self, shared, function):
        stream = rpc_stream(shared.name, MODULE, function, [500], timeout_ms=PATIENCE_MS)
        assert list(stream) == list(range(500))

    @pytest.mark.parametrize("function", ["count", "acount"])
    def test_a_failed_stream_ends_with_its_error(self, shared, function):
        came = []
        with pytest.raises(RemoteError, match="half way"):
            came.extend(rpc_stream(shared.name, MODULE, function, [5, 3]))
        assert came == [0, 1, 2]

    @pytest.mark.parametrize("function", ["count", "acount"])
    def test_a_listener_that_stops_closes_the_generator(self, start, function):
        """And its turn to run is free again."""
        with start(concurrency=1) as node:
            with rpc_stream(node.name, MODULE, function, [10**9], timeout_ms=None) as stream:
                assert next(stream) == 0
            assert list(stream) == []
            assert "generator closed" in node.call("told")

    async def test_a_cancelled_listener_closes_the_generator(self, start):
        with start(concurrency=1) as node:
            began = asyncio.Event()

            async def listen():
                async for _ in arpc_stream(node.name, MODULE, "acount", ENDLESS, timeout_ms=None):
                    began.set()

            task = asyncio.create_task(listen())
            await began.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            told = await arpc_call(node.name, MODULE, "told", timeout_ms=PATIENCE_MS)
            assert "generator closed" in told

    def test_a_stream_has_a_deadline(self, shared):
        with pytest.raises(DeadlineExceeded):
            for _ in rpc_stream(shared.name, MODULE, "acount", ENDLESS, timeout_ms=100):
                pass

    def test_a_stream_to_nobody_fails_at_its_first_item(self):
        stream = rpc_stream("nobody@nowhere", MODULE, "count", [1])
        with pytest.raises(NodeDown):
            next(stream)


class TestLimits:
    def test_a_late_call_is_over(self, start, gate):
        with start(concurrency=1) as node:
            miss_deadline(
                lambda seconds: node.call("stop_until", str(gate), timeout_ms=1000 * seconds),
                beginning(gate).exists,
            )
            with pytest.raises(DeadlineExceeded):
                node.call("note", "never", timeout_ms=100)
            gate.touch()
            assert node.call("told") == ["began gate", "ended gate"]

    async def test_a_cancelled_call_that_waits_never_runs(self, gate):
        """One that runs in a thread keeps its turn until it ends, and nobody hears of it."""
        ran.clear()
        with serve_node("held", concurrency=1) as node:
            first = asyncio.create_task(
                arpc_call(node.name, MODULE, "stop_until", [str(gate)], timeout_ms=None)
            )
            await asyncio.to_thread(eventually, beginning(gate).exists)
            second = asyncio.create_task(arpc_call(node.name, MODULE, "note", ["never"]))
            await asyncio.to_thread(eventually, lambda: waiting(node) == 1)
            for task in (second, first):
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await asyncio.to_thread(eventually, lambda: waiting(node) == 0)
            gate.touch()
            told = await arpc_call(node.name, MODULE, "told", timeout_ms=PATIENCE_MS)
            assert told == ["began gate", "ended gate"]

    async def test_a_cancelled_coroutine_is_cancelled_there(self, start, gate):
        with start(concurrency=1) as node:
            task = asyncio.create_task(
                arpc_call(node.name, MODULE, "astop_until", [str(gate)], timeout_ms=None)
            )
            await asyncio.to_thread(eventually, beginning(gate).exists)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            told = await arpc_call(node.name, MODULE, "told", timeout_ms=PATIENCE_MS)
            assert told == ["began gate", "cancelled gate"]

    def test_a_full_queue_refuses_at_once(self, gate):
        with (
            serve_node("full", concurrency=1, queue_limit=2) as node,
            ThreadPoolExecutor(3) as pool,
        ):
            ask = functools.partial(rpc_call, node.name, MODULE, timeout_ms=PATIENCE_MS)
            held = pool.submit(ask, "stop_until", [str(gate)])
            eventually(lambda: node.running)
            queued = [pool.submit(ask, "echo", [number]) for number in range(2)]
            eventually(lambda: node.queued == 2)
            with pytest.raises(Overloaded, match="2 calls wait") as caught:
                rpc_call(node.name, MODULE, "echo", [3])
            assert caught.value.retry_after_s > 0
            with pytest.raises(Overloaded):
                rpc_cast(node.name, MODULE, "note", ["never"])
            gate.touch()
            assert held.result() == "done"
            assert [one.result() for one in queued] == [0, 1]

    @pytest.mark.slow
    async def test_ten_thousand_calls_to_a_slow_node_all_end(self, start, gate):
        """Most are refused; neither side keeps memory for them."""
        with start(concurrency=1) as node:

            async def one(number):
                try:
                    return await arpc_call(
                        node.name, MODULE, "stop_until", [str(gate)], timeout_ms=PATIENCE_MS
                    )
                except Overloaded:
                    return "refused"

            before = rss()
            tasks = [asyncio.create_task(one(number)) for number in range(10_000)]
            await asyncio.to_thread(
                eventually, lambda: sum(task.done() for task in tasks) == 10_000 - 1025
            )
            assert rss() - before < 200 * 2**20
            gate.touch()
            ends = await asyncio.gather(*tasks)
            assert ends.count("done") == 1025
            assert ends.count("refused") == 10_000 - 1025
            assert await arpc_call(node.name, MODULE, "threads") < 20

    def test_a_node_may_call_itself(self, start):
        """With one turn for all: the call that waits lends its own."""
        with start(concurrency=1) as node:
            assert node.call("descend", 5) == 5
            assert node.call("adescend", 5) == 5

    def test_a_coroutine_may_not_wait_for_its_own_loop(self, shared):
        with pytest.raises(RemoteError, match="await its twin"):
            shared.call("wait_for_oneself")


class TestCasts:
    def test_a_cast_runs(self, start):
        with start() as node:
            assert rpc_cast(node.name, MODULE, "note", ["one"]) is None
            asyncio.run(arpc_cast(node.name, MODULE, "note", ["two"]))
            assert eventually(lambda: sorted(node.call("told")) == ["one", "two"])

    def test_it_does_not_wait_for_the_function(self, start, gate):
        with start(concurrency=1) as node:
            rpc_cast(node.name, MODULE, "stop_until", [str(gate)])
            gate.touch()
            assert eventually(lambda: "ended gate" in node.call("told"))

    def test_what_it_raises_stays_there(self, start, capfd):
        """Its log names the function and the type; the message may show values."""
        said = []

        def is_said():
            said.append(capfd.readouterr().err)
            return "the cast of work.fail raised ValueError" in "".join(said)

        with start() as node:
            rpc_cast(node.name, MODULE, "fail", ["value"])
            rpc_cast(node.name, MODULE, "note", ["after"])
            assert eventually(lambda: node.call("told") == ["after"])
            eventually(is_said)
        assert "wrong" not in "".join(said) + capfd.readouterr().err

    def test_what_is_not_exposed_is_refused(self, shared):
        with pytest.raises(NotExposed):
            rpc_cast(shared.name, MODULE, "tolt")

    def test_one_that_is_repeated_runs_once(self, transport, start, monkeypatch):
        """Its acknowledgement was lost, with the connection."""
        with start(concurrency=1) as node:
            lose_first_answer(monkeypatch, *CASTING[transport])
            rpc_cast(node.name, MODULE, "note", ["one"])
            rpc_cast(node.name, MODULE, "note", ["two"])
            assert eventually(lambda: node.call("told") == ["one", "two"])

    def test_a_call_that_may_have_run_is_not_repeated(self, transport, start, monkeypatch):
        with start() as node:
            lose_first_answer(monkeypatch, CASTING[transport][0], "call")
            with pytest.raises(NodeDown) as caught:
                node.call("note", "one")
            assert caught.value.sent
            assert node.call("told") == ["one"]


CASTING = {"local": (LocalChannel, "call"), "redis": (RedisChannel, "cast")}


def lose_first_answer(monkeypatch, channel, method):
    """Have the first answer to a method of a channel be lost with the connection."""
    real, lost = getattr(channel, method), []

    def call(self, request, **options):
        answer = real(self, request, **options)
        if not lost:
            lost.append(answer)
            self.close()
            raise NodeDown("the connection is lost")
        return answer

    monkeypatch.setattr(channel, method, call)


class TestChoice:
    def test_a_call_finds_a_node_by_what_it_exposes(self, shared):
        assert call(f"{MODULE}.pid") == shared.pid
        assert call(f"{MODULE}.echo", 1, k=2) == [1, {"k": 2}]
        with pytest.raises(NotExposed, match=r"none of 1 nodes exposes work\.tolt"):
            call(f"{MODULE}.tolt")
        with pytest.raises(ValueError, match=r"module\.function"):
            call("tolt")

    async def test_casts_find_one_too(self, start):
        with start() as node:
            cast(f"{MODULE}.echo", 1)
            await acast(f"{MODULE}.echo", 1)
            assert (await anode_info(node.name)).functions

    def test_the_busy_node_gets_less(self, shared, start, gate):
        """What is pending from here is known at once, without a heartbeat."""
        with start(concurrency=1) as busy, ThreadPoolExecutor(1) as pool:
            eventually(lambda: busy.name in nodes())
            held = pool.submit(busy.call, "stop_until", str(gate))
            eventually(beginning(gate).exists)
            assert {call(f"{MODULE}.pid") for _ in range(10)} == {shared.pid}
            gate.touch()
            held.result()

    def test_nodes_are_listed_by_a_part_of_their_names(self, shared):
        assert shared.name in nodes()
        assert nodes("hare") == [shared.name]
        assert nodes(shared.name.partition("@")[2]) == []

    async def test_nodes_are_listed_by_what_they_expose(self, shared):
        assert nodes("hare", exposes=f"{MODULE}.echo") == [shared.name]
        assert await anodes(exposes=f"{MODULE}.nonesuch") == []

    def test_a_node_says_what_it_offers(self, shared):
        info = node_info(shared.name)
        assert (info.pid, info.tags, info.servings) == (shared.pid, ("a",), ("bert",))
        assert info.concurrency == 4
        assert f"{MODULE}.descend" in info.functions
        assert info.idempotent == (f"{MODULE}.echo",)
        with pytest.raises(NodeDown, match="no node nobody@nowhere"):
            node_info("nobody@nowhere")


class TestTraces:
    TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

    def test_a_call_carries_the_trace_it_belongs_to(self, shared):
        assert shared.call("trace") is None
        token = traceparent.set(self.TRACE)
        try:
            assert shared.call("trace") == self.TRACE
            assert shared.call("trace_twice") == self.TRACE
        finally:
            traceparent.reset(token)


class TestEnds:
    def test_nobody_answers_for_a_name_that_is_not_there(self):
        with pytest.raises(NodeDown, match="no node nobody@nowhere") as caught:
            rpc_call("nobody@nowhere", MODULE, "echo", [1])
        assert caught.value.sent is False

    def test_a_killed_node_fails_the_calls_it_had(self, start, gate):
        with start() as node, ThreadPoolExecutor(1) as pool:
            running = pool.submit(node.call, "stop_until", str(gate))
            eventually(beginning(gate).exists)
            began = time.monotonic()
            node.kill()
            with pytest.raises(NodeDown, match=node.name) as caught:
                running.result()
            assert caught.value.sent
            assert time.monotonic() - began < 4
            with pytest.raises(NodeDown) as caught:
                node.call("echo", 1)
            assert not caught.value.sent

    def test_a_call_to_any_passes_over_one_that_is_gone(self, shared, monkeypatch):
        """It is in the registry yet, and cannot be reached."""
        with serve_node("lost") as lost:
            eventually(lambda: lost.name in {one.name for one in default_caller().registry.live()})
            monkeypatch.setattr(Links, "_make", refuse(lost.name))
            assert {call(f"{MODULE}.pid") for _ in range(20)} == {shared.pid}

    def test_a_call_to_any_finds_nodes_that_came_since_the_list_was_read(self, shared, monkeypatch):
        """As at a deploy: those that were known are gone, the others are not known yet."""
        monkeypatch.setattr("hornbeam_state.rpc.registry._FRESH_S", 3600.0)
        with exposed.scope():
            expose(lambda: "deployed", module="deploys", name="version")
            with serve_node("old"):
                assert call("deploys.version") == "deployed"
            with serve_node("new"):
                assert call("deploys.version") == "deployed"
            with serve_node("newer"):
                assert asyncio.run(acall("deploys.version")) == "deployed"
            with pytest.raises(NodeDown) as caught:
                call("deploys.version")
        assert caught.value.sent is False

    def test_a_node_that_starts_again_is_found_again(self, start, gate):
        """At once, under its name, and by callers that knew the one before."""
        node = start("again")
        assert node.call("pid") == node.pid
        node.kill()
        following = start("again")
        assert following.name == node.name
        assert following.call("pid") == following.pid

    def test_a_channel_that_is_closed_for_its_idleness_costs_no_call(self, shared, monkeypatch):
        """As if every pause between two calls were a long one."""
        monkeypatch.setattr("hornbeam_state.rpc.links._IDLE_S", 0.0)
        monkeypatch.setattr("hornbeam_state.rpc.links._WATCH_S", 0.1)
        made = []
        monkeypatch.setattr(
            Links, "_make", lambda *args, real=Links._make: made.append(1) or real(*args)
        )

        deadline = time.monotonic() + 20

        def some():
            number = 0
            while number < 100 or len(made) < 3:
                assert time.monotonic() < deadline, "channels stay open"
                assert shared.call("echo", number) == number
                number += 1
                time.sleep(0.005)

        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(some) for _ in range(4)]:
                done.result()

    def test_many_calls_at_a_time_share_a_channel(self, shared, monkeypatch):
        made = []
        monkeypatch.setattr(
            Links, "_make", lambda *args, real=Links._make: made.append(1) or real(*args)
        )
        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(lambda n: shared.call("echo", n), range(200))) == list(range(200))
        assert len(made) == 1

    @pytest.mark.slow
    def test_a_stopped_node_fails_its_calls_within_five_seconds(self, start, gate):
        """And is there again when it goes on."""
        with start() as node, ThreadPoolExecutor(1) as pool:
            running = pool.submit(node.call, "stop_until", str(gate), timeout_ms=None)
            eventually(beginning(gate).exists)
            began = time.monotonic()
            node.signal(signal.SIGSTOP)
            with pytest.raises(NodeDown, match="no heartbeat") as caught:
                running.result()
            assert time.monotonic() - began < 5.5
            assert caught.value.sent
            began = time.monotonic()
            with pytest.raises(NodeDown):
                node.call("echo", 1)
            assert time.monotonic() - began < 1
            node.signal(signal.SIGCONT)
            assert eventually(lambda: answers(node))

    def test_a_function_that_hangs_does_not_keep_a_closing_node(self, start, gate):
        """Its caller hears of it, and the process ends."""
        with start() as node, ThreadPoolExecutor(1) as pool:
            running = pool.submit(node.call, "stop_until", str(gate))
            eventually(beginning(gate).exists)
            node.close(drain=0.1)
            with pytest.raises(NodeDown) as caught:
                running.result()
            assert caught.value.sent
            assert node.wait() == 0

    async def test_a_storm_of_cancelled_calls_leaves_nothing_behind(self, start):
        """Neither turns nor places in the queue."""
        with start(concurrency=2) as node:
            for turn in range(10):
                tasks = [
                    asyncio.create_task(
                        arpc_call(node.name, MODULE, function, [number], timeout_ms=PATIENCE_MS)
                    )
                    for number, function in enumerate(["echo", "aecho"] * 25)
                ]
                await asyncio.sleep(0.001 * turn)
                for task in tasks[::3]:
                    task.cancel()
                ends = await asyncio.gather(*tasks, return_exceptions=True)
                for number, end in enumerate(ends):
                    was_cancelled = isinstance(end, asyncio.CancelledError)
                    assert end == number or (was_cancelled and number % 3 == 0)
            is_idle = lambda: node.call("load") == (1, 0)  # noqa: E731 - what waits in Redis is a second old
            assert await asyncio.to_thread(eventually, is_idle)

    def test_dropped_streams_leave_nothing_behind(self, start):
        with start(concurrency=2) as node:
            for function in ["count", "acount"] * 5:
                stream = rpc_stream(node.name, MODULE, function, [10**9], timeout_ms=None)
                assert next(stream) == 0
                del stream
                gc.collect()
            assert eventually(lambda: node.call("load") == (1, 0))

    def test_a_closing_node_fails_no_call(self, start):
        """Those it takes it answers; the others are certain not to have reached it."""
        with start() as node, ThreadPoolExecutor(4) as pool:

            def call_until_refused(_):
                while True:
                    try:
                        node.call("echo", 1)
                    except NodeDown as error:
                        return error.sent

            ends = [pool.submit(call_until_refused, number) for number in range(4)]
            node.close(drain=10)
            assert {end.result() for end in ends} == {False}
            assert node.wait() == 0

    def test_a_name_is_refused_while_its_owner_lives(self, shared, start):
        refused = start("shared", wait=False)
        said = refused.await_refusal()
        assert said.startswith("ConfigError: the node name shared@")
        assert f"is taken by process {shared.pid}" in said
        assert shared.call("pid") == shared.pid

    def test_a_closing_node_finishes_what_it_has(self, start, gate):
        """It is not listed any more, and refuses new calls."""
        with start() as node, ThreadPoolExecutor(1) as pool:
            running = pool.submit(node.call, "stop_until", str(gate))
            eventually(beginning(gate).exists)
            rpc_cast(node.name, MODULE, "stop_until", [str(gate)])
            node.close(drain=30)
            eventually(lambda: node.name not in nodes())
            with pytest.raises(NodeDown) as caught:
                node.call("echo", 1)
            assert not caught.value.sent
            time.sleep(1)  # the watcher of channels has looked
            gate.touch()
            assert running.result() == "done"
            assert node.wait() == 0

    async def test_a_node_serves_in_any_process(self, registry_url):
        """It begins and ends with its handle, and no thread of it or of its callers stays."""
        before = own_threads()  # other tests' too, of which some go on and some are about to end

        @expose(module="here", name="add")
        def add(a, b=1):
            return a + b

        served = await aserve_node("here", concurrency=1)
        assert node() == served.name
        assert served.name not in nodes()
        assert await acall("here.add", 1, b=2) == 3
        await served.aclose()
        served.close()
        assert served.wait(0)
        assert node() != served.name
        default_caller().close()
        await asyncio.to_thread(eventually, lambda: own_threads() <= before)

    def test_a_node_whose_name_was_taken_ends(self, default, caplog):
        """It was away for so long that another process got it: that one answers now."""
        with serve_node("taken") as served:
            key = PREFIX + served.name
            default.space("sys").update(key, lambda value: {**value, "token": "another"}, ttl=60)
            assert served.wait(20)
            assert default.space("sys").get(key)["token"] == "another"
        assert "its name belongs to process" in caplog.text
        default.space("sys").delete(key)

    def test_a_node_without_a_queue_takes_what_it_can_run(self, gate):
        with serve_node("narrow", concurrency=1, queue_limit=0) as served:
            rpc_cast(served.name, MODULE, "stop_until", [str(gate)])
            eventually(beginning(gate).exists)
            with pytest.raises(Overloaded):
                rpc_call(served.name, MODULE, "echo", [1])
            gate.touch()

    def test_a_forked_child_serves_nothing(self, registry_url):
        with serve_node("parent") as served:

            def look():
                served.close()
                return node() == served.name

            assert Child(look).value() is False
            assert rpc_call(served.name, MODULE, "pid") == os.getpid()

    def test_settings_are_checked(self):
        with pytest.raises(ConfigError, match="concurrency=0"):
            serve_node("x", concurrency=0)
        with pytest.raises(ConfigError, match="queue_limit"):
            serve_node("x", queue_limit="many")
        with pytest.raises(ConfigError, match="node name"):
            serve_node("x y")


def waiting(node):
    """Return how many calls wait for a node of this process, now."""
    return node._answers.turns.waiting + sum(one.waiting() for one in node._entrances)


def own_threads():
    """Return the threads that nodes and callers have."""
    ours = {thread for thread in threading.enumerate() if thread.name.startswith("hornbeam-")}
    return {thread for thread in ours if "upkeep" not in thread.name}


def refuse(name):
    """Return a `Links._make` for which nobody listens there."""
    real = Links._make

    def make(self, asked, keeps):
        if asked == name:
            raise unsent(f"{name}: nobody listens")
        return real(self, asked, keeps)

    return make


def answers(node):
    try:
        return node.call("pid", timeout_ms=1000) == node.pid
    except RpcError:
        return False
