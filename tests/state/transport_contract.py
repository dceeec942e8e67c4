"""What every transport does, as tests: a module of tests inherits them and says what they run over.

It has two fixtures: `server`, whose `handler` is an `Answers` and which can say how many calls run
(`running`), and `channel`, which leads to it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc

import numpy as np
import pytest
from transport_helpers import Registered, ask, eventually, miss_deadline

from hornbeam_state.errors import CodecError, DeadlineExceeded, Overloaded, RemoteError
from hornbeam_state.transports.waiting import MOST_CHUNKS

WAYS = ("call", "acall", "submit")


def run(channel, way, request):
    """Make a call in one of the three ways."""
    if way == "call":
        return channel.call(request)
    if way == "submit":
        return channel.submit(request).result()

    async def wait():
        return await channel.acall(request)

    return asyncio.run(wait())


def listen(channel, way, request):
    """Return a list of the chunks, read in one of the two ways."""
    if way == "stream":
        return list(channel.stream(request))

    async def read():
        return [chunk async for chunk in channel.astream(request)]

    return asyncio.run(read())


class TransportContract:
    """The contract of `transports.base`."""

    def test_values_come_back_as_they_were(self, channel, way):
        values = ["text", 1, 2.5, None, b"bytes", {"a": (1, 2)}, "x" * 200_000]
        assert run(channel, way, ask("echo", *values)) == values
        assert run(channel, way, ask("echo")) == []
        assert channel.pending == 0

    @pytest.mark.parametrize(
        "array",
        [
            pytest.param(np.arange(1_300_000, dtype=np.float64).reshape(1300, 1000), id="10 MB"),
            pytest.param(np.asfortranarray(np.ones((300, 500))), id="Fortran order"),
            pytest.param(np.arange(100_000)[::3], id="not contiguous"),
            pytest.param(np.zeros((0, 3), np.float32), id="empty"),
            pytest.param(np.array(7, np.int8), id="no dimensions"),
            pytest.param(np.array(["2020-01-01"] * 9000, "M8[s]"), id="times"),
            pytest.param(np.array(["ab", "ü"] * 9000), id="text"),
        ],
    )
    def test_arrays_come_back_as_they_were_and_writable(self, channel, array):
        array.flags.writeable = False
        (result,) = channel.call(ask("echo", array))
        assert result.dtype == array.dtype
        np.testing.assert_array_equal(result, array)
        assert result.flags.writeable
        assert result.flags.owndata or result.base.nbytes == result.nbytes

    def test_chunks_come_in_order(self, channel, listening):
        chunks = listen(channel, listening, ask("", "x", count=3000))
        assert chunks == [[number, "x"] for number in range(3000)]
        assert channel.pending == 0

    def test_answers_do_not_wait_for_each_other(self, channel):
        slow = channel.submit(ask("hold", "slow"))
        assert channel.call(ask("echo", "fast")) == ["fast"]
        assert not slow.done()
        channel.call(ask("release"))
        assert slow.result() == ["slow"]

    @pytest.mark.parametrize(
        ("name", "type", "args"),
        [
            ("registered", Registered, ("mine", 7)),
            ("value", ValueError, ("wrong",)),
            ("key", KeyError, ("name",)),
        ],
    )
    def test_an_error_comes_back_as_it_was(self, channel, way, name, type, args):
        with pytest.raises(type) as caught:
            run(channel, way, ask("fail", error=name))
        assert caught.value.args == args
        assert caught.value.__traceback__ is not None

    @pytest.mark.parametrize(
        ("name", "type", "message"),
        [
            ("unregistered", "Unregistered", "theirs"),
            ("exit", "CancelledError", "not yours"),
            ("stop", "StopAsyncIteration", "over"),
        ],
    )
    def test_an_error_that_cannot_come_back_is_remote(self, channel, way, name, type, message):
        with pytest.raises(RemoteError) as caught:
            run(channel, way, ask("fail", error=name))
        assert (caught.value.remote_type, caught.value.remote_message) == (type, message)

    def test_a_stream_that_fails_ends_with_the_error(self, channel, listening):
        with pytest.raises(ValueError, match="half way"):
            listen(channel, listening, ask("", count=5, fail_at=3))
        chunks = channel.stream(ask("", count=5, fail_at=3))
        assert [next(chunks) for _ in range(3)] == [[0], [1], [2]]

    def test_what_cannot_be_sent_fails_that_call_only(self, channel, way):
        with pytest.raises(CodecError):
            run(channel, way, ask("echo", object()))
        with pytest.raises(CodecError):
            run(channel, way, ask("give_unknown"))
        assert run(channel, way, ask("echo", 1)) == [1]

    def test_a_deadline_ends_the_call_on_both_sides(self, server, channel, way):
        miss_deadline(
            lambda seconds: run(channel, way, ask("hang", timeout=seconds, label=way)),
            lambda: f"{way} began" in server.handler.events,
        )
        eventually(lambda: f"{way} cancelled" in server.handler.events)
        assert channel.pending == 0
        with pytest.raises(DeadlineExceeded, match="before"):
            run(channel, way, ask("echo", timeout=0))

    def test_a_deadline_ends_a_stream(self, server, channel, listening):
        miss_deadline(
            lambda seconds: listen(
                channel, listening, ask("", timeout=seconds, pause=0.01, tells=True)
            ),
            lambda: server.handler.events,
        )
        eventually(lambda: any("ended" in event for event in server.handler.events))

    async def test_a_cancelled_task_cancels_the_call(self, server, channel):
        task = asyncio.create_task(channel.acall(ask("hang", label="task")))
        await asyncio.to_thread(eventually, lambda: "task began" in server.handler.events)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(eventually, lambda: "task cancelled" in server.handler.events)
        assert channel.pending == 0

    def test_a_cancelled_future_cancels_the_call(self, server, channel):
        future = channel.submit(ask("hang", label="future"))
        eventually(lambda: "future began" in server.handler.events)
        assert future.cancel()
        assert future.cancel()
        concurrent.futures.wait([future], timeout=10)
        eventually(lambda: "future cancelled" in server.handler.events)
        assert channel.pending == 0

    def test_a_call_that_is_cancelled_before_it_runs_leaves_nothing(self, server, channel):
        for _ in range(50):
            channel.submit(ask("hang", label="early")).cancel()
        assert channel.call(ask("echo", 1)) == [1]
        eventually(lambda: not server.running())

    @pytest.mark.parametrize("end", ["close", "drop", "with"])
    def test_who_stops_listening_ends_the_stream(self, server, channel, end):
        chunks = channel.stream(ask("", pause=0.001))
        assert next(chunks) == [0]
        if end == "drop":
            del chunks
        elif end == "close":
            chunks.close()
            assert list(chunks) == []
        else:
            with chunks:
                pass
        eventually(lambda: server.handler.events)
        assert channel.pending == 0

    @pytest.mark.parametrize("end", ["close", "drop", "cancel"])
    async def test_who_stops_listening_on_a_loop_ends_the_stream(self, server, channel, end):
        chunks = channel.astream(ask("", pause=0.001, timeout=60))
        assert await anext(chunks) == [0]
        if end == "drop":
            del chunks
            gc.collect()
        elif end == "close":
            await chunks.aclose()
        else:

            async def read():
                async for _ in chunks:
                    pass

            task = asyncio.create_task(read())
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await asyncio.to_thread(eventually, lambda: server.handler.events)
        assert channel.pending == 0

    def test_a_listener_too_far_behind_gets_an_error_in_the_end(self, server, channel):
        chunks = channel.stream(ask("", label="lag"))
        eventually(lambda: server.handler.events)
        assert [next(chunks) for _ in range(MOST_CHUNKS)] == [[n] for n in range(MOST_CHUNKS)]
        with pytest.raises(Overloaded, match="behind"):
            next(chunks)
