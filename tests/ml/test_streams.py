"""Streams: a thread with a queue of its own, the current stream, and the end of both."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import subprocess
import sys
import textwrap
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import ContextVar

import pytest
from serving_helpers import LIMIT_S, in_child, until

from hornbeam_ml import (
    Overloaded,
    Serving,
    Stream,
    StreamClosed,
    awith_stream,
    current_stream,
    with_stream,
)
from hornbeam_state.errors import ConfigError


@pytest.fixture
def stream():
    """A stream that is closed in the end."""
    made = Stream(name="test")
    yield made
    made.close()


@pytest.fixture
def gate():
    """What a slow call waits for."""
    event = threading.Event()
    yield event
    event.set()


def held(stream, gate):
    """Have a stream run a call that waits for the gate; return its future."""
    entered = threading.Event()

    def call():
        entered.set()
        assert gate.wait(LIMIT_S)
        return "done"

    future = stream.submit(call)
    assert entered.wait(LIMIT_S)
    return future


def test_a_fresh_stream_is_alive_and_two_are_distinct(stream):
    other = Stream()
    assert not stream.closed
    assert stream.name != other.name
    assert stream.run(threading.get_ident) != other.run(threading.get_ident)
    assert stream.run(threading.get_ident) == stream.run(threading.get_ident)
    other.close()


def test_calls_run_one_after_the_other_in_order(stream):
    seen = []
    futures = [stream.submit(seen.append, number) for number in range(100)]
    wait(futures, LIMIT_S)
    assert seen == list(range(100))


def test_arguments_results_and_errors_pass_through(stream):
    assert stream.run(max, [1, 3], key=lambda number: -number) == 1
    with pytest.raises(ZeroDivisionError):
        stream.run(lambda: 1 / 0)
    assert stream.run(int, "7") == 7


async def test_run_has_a_twin(stream):
    assert await stream.arun(int, "7") == 7
    with pytest.raises(ZeroDivisionError):
        await stream.arun(lambda: 1 / 0)


def test_coroutine_functions_run_on_an_event_loop_of_the_thread(stream):
    async def work():
        await asyncio.sleep(0)
        return threading.get_ident(), id(asyncio.get_running_loop())

    first, second = stream.run(work), stream.run(work)
    assert first == second
    assert first[0] == stream.run(threading.get_ident)


def test_a_call_on_the_streams_own_thread_runs_at_once(stream):
    """It does not wait for itself."""

    async def inner():
        return await asyncio.sleep(0, "inner")

    async def outer():
        return stream.run(inner)

    assert stream.run(lambda: stream.run(lambda: "inner")) == "inner"
    assert stream.run(outer) == "inner"


def test_a_call_sees_the_context_of_its_caller(stream):
    """What it sets stays with it."""
    variable = ContextVar("variable", default="none")
    variable.set("the caller's")

    def change():
        seen = variable.get()
        variable.set("the call's")
        return seen

    assert stream.run(change) == "the caller's"
    assert variable.get() == "the caller's"
    assert stream.run(variable.get) == "the caller's"


# The current stream


def test_the_current_stream_nests_and_comes_back(stream):
    other = Stream()
    assert current_stream() is None
    with stream:
        assert current_stream() is stream
        with pytest.raises(ZeroDivisionError), other:
            with_stream(other, lambda: 1 / 0)
        with other:
            assert current_stream() is other
        assert current_stream() is stream
    assert current_stream() is None
    other.close()


def test_with_stream_sets_it_for_one_call(stream):
    assert with_stream(stream, current_stream) is stream
    assert current_stream() is None
    with pytest.raises(ZeroDivisionError):
        with_stream(stream, lambda: 1 / 0)
    assert current_stream() is None


async def test_with_stream_has_a_twin_for_coroutine_functions(stream):
    async def work():
        await asyncio.sleep(0)
        return current_stream()

    assert await awith_stream(stream, work) is stream
    assert current_stream() is None
    with pytest.raises(TypeError, match="awith_stream"):
        with_stream(stream, work)


def test_a_call_on_a_stream_has_it_as_the_current_one(stream):
    assert stream.run(current_stream) is stream
    assert current_stream() is None


async def test_tasks_and_threads_inherit_it_and_none_leaks(stream):
    other = Stream()
    entered, leave = asyncio.Event(), asyncio.Event()

    async def with_another():
        with other:
            entered.set()
            await leave.wait()
            return current_stream()

    with stream:
        task = asyncio.create_task(with_another())
        assert await asyncio.to_thread(current_stream) is stream
        await entered.wait()
        assert current_stream() is stream
    assert current_stream() is None
    assert await asyncio.create_task(asyncio.sleep(0, current_stream())) is None
    leave.set()
    assert await task is other
    other.close()


def test_a_thread_that_was_told_nothing_has_none(stream):
    with stream, ThreadPoolExecutor(1) as pool:
        assert pool.submit(current_stream).result(LIMIT_S) is None


def test_the_end_of_a_block_in_another_context_changes_nothing_there(stream):
    """Frameworks run the two halves of a generator in different contexts."""
    stack = contextlib.ExitStack()
    stack.enter_context(stream)
    another = threading.Thread(target=stack.close)
    another.start()
    another.join(LIMIT_S)
    assert current_stream() is stream
    stream.__exit__(None, None, None)
    assert current_stream() is None


def test_inline_runs_go_to_the_current_stream_and_batched_ones_do_not(stream):
    """A serving owns its streams."""

    def model(batch):
        return [threading.get_ident()] * len(batch)

    with Serving(lambda: model) as serving:
        own, here = stream.run(threading.get_ident), threading.get_ident()
        assert serving.run_inline(["a", "b"]) == [here, here]
        with stream:
            assert serving.run_inline(["a"]) == [own]
            assert serving.run("a") not in (own, here)


async def test_inline_runs_have_a_twin(stream):
    def model(batch):
        return [threading.get_ident()] * len(batch)

    async with Serving(lambda: model) as serving:
        own = await stream.arun(threading.get_ident)
        with stream:
            assert await serving.arun_inline(["a", "b"]) == [own, own]
        assert (await serving.arun_inline(["a"]))[0] not in (own, threading.get_ident())


def test_inline_runs_are_cut_to_the_batch_size_and_see_the_same_checks():
    batches = []

    async def model(batch):
        batches.append(batch)
        return batch

    with Serving(lambda: model, batch_size=2, batch_keys=["a"]) as serving:
        assert serving.run_inline([1, 2, 3], key="a") == [1, 2, 3]
        with pytest.raises(ValueError, match="'b'"):
            serving.run_inline([1], key="b")
    assert batches == [[1, 2], [3]]


# Bounds and the end


def test_closing_twice_is_fine_and_later_use_raises(stream):
    stream.run(int)
    stream.close()
    stream.close()
    assert stream.closed
    for use in (lambda: stream.run(int), lambda: stream.submit(int), stream.__enter__):
        with pytest.raises(StreamClosed, match="'test'"):
            use()
    assert current_stream() is None


def test_close_fails_those_who_wait_and_lets_the_running_call_finish(stream, gate):
    running = held(stream, gate)
    waiting = [stream.submit(int) for _ in range(20)]
    stream.close()
    for future in waiting:
        assert isinstance(future.exception(LIMIT_S), StreamClosed)
    assert not running.done()
    gate.set()
    assert running.result(LIMIT_S) == "done"


def test_a_full_queue_refuses_at_once_and_loses_nothing(gate):
    stream = Stream(queue_limit=4)
    running = held(stream, gate)
    accepted, refused = [], 0
    for number in range(500):
        try:
            accepted.append(stream.submit(int, number))
        except Overloaded:
            refused += 1
    assert (len(accepted), refused) == (4, 496)
    gate.set()
    assert [future.result(LIMIT_S) for future in [*accepted, running]] == [0, 1, 2, 3, "done"]
    stream.close()


def test_a_waiting_call_can_be_cancelled(stream, gate):
    running, seen = held(stream, gate), []
    cancelled = stream.submit(seen.append, 1)
    assert cancelled.cancel()
    assert not running.cancel()
    gate.set()
    stream.run(seen.append, 2)
    assert seen == [2]


async def test_a_cancelled_task_takes_its_call_back(stream, gate):
    running, seen = await asyncio.to_thread(held, stream, gate), []
    task = asyncio.create_task(stream.arun(seen.append, 1))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.set()
    await asyncio.wrap_future(running)
    await stream.arun(seen.append, 2)
    assert seen == [2]


def threads_of_streams():
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("hornbeam-") and "deadlines" not in name]


def test_closed_and_dropped_streams_leave_nothing_behind():
    gc.collect()
    until(lambda: not threads_of_streams(), f"these end: {threads_of_streams()}")
    streams = [Stream() for _ in range(100)]
    assert len(threads_of_streams()) == 100
    for stream in streams[::2]:
        stream.run(int)
        stream.close()
    owned = [weakref.ref(part) for stream in streams for part in (stream, stream._thread)]
    del stream
    streams.clear()
    gc.collect()
    until(lambda: not threads_of_streams(), "the threads end")
    gc.collect()
    assert [part for part in owned if part() is not None] == []


def test_a_dropped_stream_still_runs_what_it_was_given(gate):
    stream = Stream()
    running, waiting = held(stream, gate), stream.submit(int, 7)
    del stream
    gc.collect()
    gate.set()
    assert (running.result(LIMIT_S), waiting.result(LIMIT_S)) == ("done", 7)


def test_collecting_a_stream_needs_no_lock_and_no_other_thread(gate):
    """The collector runs in the middle of anything: here inside the stream's own lock."""
    stream = Stream()
    thread, running = stream._thread, held(stream, gate)
    with thread._lock:
        del stream
        gate.set()
        running.result(LIMIT_S)
        del running
        gc.collect()
    until(lambda: thread.reason is not None, "its thread ends")


def test_the_exit_waits_until_a_thread_has_dropped_what_was_its_own():
    """Native code that is cut off there ends the process with SIGABRT."""
    program = """
import threading, time
from hornbeam_ml import Stream
class Slow:
    def __del__(self):
        time.sleep(0.3)
        print("dropped", flush=True)
own = threading.local()
stream = Stream()
stream.run(lambda: setattr(own, "value", Slow()))
stream.close()
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, timeout=LIMIT_S
    )
    assert ran.stdout == b"dropped\n"


def test_a_fault_in_the_thread_finishes_everybody(monkeypatch, stream, gate):
    """Its own loop breaks: the running and the waiting calls say so, and later ones too."""
    from hornbeam_ml import streams

    def broken(self, cuda):
        gate.wait(LIMIT_S)
        raise MemoryError

    monkeypatch.setattr(streams._Call, "execute", broken)
    calls = [stream.submit(int) for _ in range(3)]
    gate.set()
    for call in calls:
        assert isinstance(call.exception(LIMIT_S), StreamClosed)
    with pytest.raises(StreamClosed, match="MemoryError"):
        stream.submit(int)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"device": "tpu"}, id="unknown device"),
        pytest.param({"device": None}, id="no device"),
        pytest.param({"queue_limit": 0}, id="no queue"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options):
    with pytest.raises(ConfigError):
        Stream(**options)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_stream_inherited_through_a_fork_is_refused_with_a_clear_message(stream, gate):
    running, waiting = held(stream, gate), stream.submit(int)

    def uses():
        told = []
        for use in (lambda: stream.run(int), stream.__enter__, running.result, waiting.result):
            with pytest.raises(StreamClosed, match="parent of this one: make a stream"):
                use()
            told.append("refused")
        with Stream() as own:
            told.append(own.run(lambda: "own works"))
        return told

    assert in_child(uses) == str(["refused"] * 4 + ["own works"])
    gate.set()
    assert running.result(LIMIT_S) == "done"
    assert waiting.result(LIMIT_S) == 0


def test_a_process_ends_while_streams_are_busy_and_others_are_idle():
    """Those that run get a moment; nobody is waited for without end."""
    code = """
        import os, time
        from hornbeam_ml import Serving, Stream
        idle, busy = Stream(), Stream()
        busy.submit(time.sleep, 0.2).add_done_callback(lambda future: os.write(1, b"finished "))
        serving = Serving(lambda: lambda batch: time.sleep(0.2) or batch)
        serving.submit(1).add_done_callback(lambda future: os.write(1, b"served "))
        Serving(lambda: list).run(1)
        os.write(1, b"end ")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.split()) == ["end", "finished", "served"]


# Models


def test_many_streams_share_one_model_and_get_the_bits_of_one_thread():
    """16 streams, 100 inferences each."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
    inputs = torch.randn(100, 4, 32)

    def infer(row):
        with torch.inference_mode():
            return model(row)

    expected = [infer(row) for row in inputs]
    streams = [Stream() for _ in range(16)]
    futures = [[stream.submit(infer, row) for row in inputs] for stream in streams]
    for of_stream in futures:
        for future, exact in zip(of_stream, expected, strict=True):
            assert torch.equal(future.result(LIMIT_S), exact)
    for stream in streams:
        stream.close()


def test_streams_of_a_serving_share_the_compute_threads(monkeypatch):
    """Each gets its part, and nobody else's number changes."""
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("HORNBEAM_THREADS", "4")
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    both = threading.Barrier(2)

    def count(batch):
        both.wait(LIMIT_S)
        return [torch.get_num_threads()] * len(batch)

    try:
        with Serving(lambda: count, streams=2, batch_size=1) as serving:
            assert serving.run_batch([1, 2]) == [2, 2]
        assert torch.get_num_threads() == 4
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result(LIMIT_S) == 4
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def cuda():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch


@pytest.mark.gpu
def test_a_stream_on_a_gpu_has_a_cuda_stream_that_no_caller_enters(cuda):
    stream = Stream("cuda")
    before = cuda.cuda.current_stream()
    inside = stream.run(cuda.cuda.current_stream)
    assert inside != before
    assert cuda.cuda.current_stream() == before
    stream.close()


@pytest.mark.gpu
def test_tensors_of_one_cuda_stream_can_be_read_on_another(cuda):
    streams = [Stream("cuda") for _ in range(4)]
    start = cuda.randn(2048, 2048, device="cuda")
    expected = start
    for _ in range(8):
        expected = expected @ start / 64
    found = start
    for number in range(8):
        found = streams[number % 4].run(lambda value: value @ start / 64, found)
    assert cuda.equal(found, expected)
    for stream in streams:
        stream.close()
