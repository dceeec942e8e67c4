"""Calls between processes of one machine: what arrives, who is told, and what ends with whom."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import uvloop
from child_processes import Child
from transport_contract import WAYS, TransportContract, listen, run
from transport_helpers import (
    Answers,
    Registered,
    ServerProcess,
    ServerThread,
    ask,
    eventually,
)

from hornbeam_state.errors import (
    CodecError,
    ConfigError,
    DeadlineExceeded,
    NodeDown,
    Overloaded,
)
from hornbeam_state.transports.local import Server, aconnect, connect, sockets


@pytest.fixture
def path(tmp_path):
    return tmp_path / "own" / "host.sock"


@pytest.fixture
def server(path):
    with ServerThread(path) as running:
        yield running


@pytest.fixture
def channel(server):
    with contextlib.closing(connect(server.path, {})) as made:
        yield made


@pytest.fixture
def process(path):
    with ServerProcess(path) as running:
        yield running


@pytest.fixture
def open_channel():
    """Return what connects to a server, and closes it after."""
    with contextlib.ExitStack() as stack:
        yield lambda server, **options: stack.enter_context(
            contextlib.closing(connect(server.path, {}, **options))
        )


class TestContract(TransportContract):
    pass


# What arrives.


def test_both_sides_learn_what_the_other_says(server, open_channel):
    with contextlib.closing(connect(server.path, {"worker": 3})) as channel:
        assert channel.peer == {"pid": os.getpid(), "said": {"worker": 3}}
        assert channel.connected
        assert server.server.clients == 1
    eventually(lambda: server.server.clients == 0)
    assert not channel.connected


def test_the_rest_of_the_time_travels_along(channel):
    assert channel.call(ask("timeout", timeout=7.5)) == [7.5]
    assert channel.call(ask("timeout", timeout=float("inf"))) == [float("inf")]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_thousand_calls_from_threads_and_loops_get_their_own_answers(path, open_channel, loop):
    new_loop = uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop
    with ServerThread(path, new_loop=new_loop) as server:
        channel = open_channel(server)

        def call(worker):
            return [channel.call(ask("echo", [worker, n]))[0] for n in range(100)]

        async def gather(worker):
            calls = [channel.acall(ask("echo", [worker, n], np.full(3000, n))) for n in range(100)]
            return [values[0] for values in await asyncio.gather(*calls)]

        with ThreadPoolExecutor(10) as pool:
            calling = [pool.submit(call, worker) for worker in range(8)]
            calling.append(pool.submit(lambda: asyncio.run(gather(8))))
            calling.append(pool.submit(lambda: uvloop.run(gather(9))))
            for worker, future in enumerate(calling):
                assert future.result() == [[worker, n] for n in range(100)]
        assert channel.pending == 0


def test_a_note_reaches_those_who_are_there_and_those_who_come(server, open_channel):
    notes, late = [], []
    open_channel(server, on_note=notes.append)
    server.announce({"ready": False})
    server.announce({"ready": True})
    eventually(lambda: len(notes) == 2)
    open_channel(server, on_note=late.append)
    eventually(lambda: late)
    assert notes == [{"ready": False}, {"ready": True}]
    assert late == [{"ready": True}]


def test_a_callback_that_fails_or_waits_for_the_channel_harms_nobody(server, open_channel, caplog):
    raised = []

    def on_note(note):
        try:
            channel.call(ask("echo"))
        except RuntimeError as error:
            raised.append(error)
            raise

    channel = open_channel(server, on_note=on_note)
    server.announce("now")
    eventually(lambda: raised)
    assert channel.call(ask("echo", 1)) == [1]
    assert "a callback of a channel raised" in caplog.text


# Errors.


def test_messages_have_a_largest_size_on_both_sides(path):
    with (
        ServerThread(path, most_bytes=10_000) as server,
        contextlib.closing(connect(server.path, {}, most_bytes=5_000)) as channel,
    ):
        with pytest.raises(CodecError, match="the server takes 10000"):
            channel.call(ask("echo", b"x" * 10_000))
        with pytest.raises(CodecError, match="the client takes 5000"):
            channel.call(ask("echo", b"x" * 5_000))
        assert channel.call(ask("echo", b"x" * 4_000)) == [b"x" * 4_000]


# Ends of calls.


def test_no_more_calls_wait_than_may(server, open_channel, way):
    channel = open_channel(server, most_pending=2)
    waiting = [channel.submit(ask("hang", label="x")) for _ in range(2)]
    with pytest.raises(Overloaded):
        run(channel, way, ask("echo"))
    assert channel.pending == 2
    for future in waiting:
        future.cancel()
    assert run(channel, way, ask("echo", 1)) == [1]


def test_a_server_refuses_calls_beyond_its_bound(path, open_channel):
    with ServerThread(path, most_calls=2, most_bytes=100_000) as server:
        channel, other = open_channel(server), open_channel(server)
        waiting = [channel.submit(ask("hang", label="x")) for _ in range(2)]
        with pytest.raises(Overloaded, match="2 calls"):
            channel.call(ask("echo"))
        assert other.call(ask("echo", 1)) == [1]
        waiting[0].cancel()
        big = other.submit(ask("hang", b"x" * 60_000, label="big"))
        with pytest.raises(Overloaded, match="bytes"):
            other.call(ask("echo", b"x" * 60_000))
        big.cancel()
        eventually(lambda: server.running() == 1)
        assert other.call(ask("echo", b"x" * 60_000)) == [b"x" * 60_000]


# Lost connections.


def _endless(label):
    return ask("", pause=0.01, label=label, tells=True)


def _begun(events):
    return sum("began" in event for event in events)


class Waiting:
    """Callers of all kinds who wait for a server."""

    def __init__(self, channel) -> None:
        self.outcomes = {}
        self._channel = channel
        self._threads = [
            threading.Thread(target=self._note, args=(way, run, way, ask("hang", label=way)))
            for way in WAYS
        ] + [
            threading.Thread(target=self._note, args=(way, listen, way, _endless(way)))
            for way in ("stream", "astream")
        ]
        for thread in self._threads:
            thread.start()
        eventually(lambda: channel.pending == len(self._threads))

    def _note(self, name, fn, *args):
        try:
            self.outcomes[name] = fn(self._channel, *args)
        except Exception as error:
            self.outcomes[name] = error

    def check(self, *, sent=True):
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()
        for outcome in self.outcomes.values():
            assert isinstance(outcome, NodeDown)
            assert outcome.sent is sent
        assert len(self.outcomes) == 5


def test_a_killed_server_fails_whoever_waits(process, open_channel):
    lost = []
    channel = open_channel(process, on_lost=lost.append)
    waiting = Waiting(channel)
    eventually(lambda: _begun(channel.call(ask("told"))) == 5)
    process.kill()
    waiting.check()
    eventually(lambda: lost)
    assert not channel.connected
    assert channel.pending == 0
    with pytest.raises(NodeDown, match="lost") as caught:
        channel.call(ask("echo"))
    assert not caught.value.sent
    channel.close()
    assert [type(error) for error in lost] == [ConnectionResetError]
    with pytest.raises(NodeDown) as caught:
        connect(process.path, {})
    assert not caught.value.sent


def test_a_closed_channel_fails_whoever_waits(server, open_channel):
    lost = []
    channel = open_channel(server, on_lost=lost.append)
    waiting = Waiting(channel)
    eventually(lambda: _begun(server.handler.events) == 5)
    channel.close()
    channel.close()
    waiting.check()
    eventually(lambda: lost)
    assert lost == [None]
    eventually(lambda: len(server.handler.events) == 10)


def test_a_call_of_which_nothing_left_was_not_sent(process, open_channel):
    """A stopped server reads nothing: the socket fills up, and what is behind never leaves."""
    channel = open_channel(process)
    process.signal(signal.SIGSTOP)
    first = channel.submit(ask("echo", b"x" * 2_000_000))
    second = channel.submit(ask("echo", b"y"))
    with pytest.raises(DeadlineExceeded):
        channel.call(ask("echo", b"z", timeout=0.05))
    assert channel.pending == 2
    process.kill()
    for future, sent in ((first, True), (second, False)):
        error = future.exception(20)
        assert isinstance(error, NodeDown)
        assert error.sent is sent


def test_a_stopped_server_delays_and_loses_nothing(process, open_channel):
    channel = open_channel(process)
    process.signal(signal.SIGSTOP)
    with pytest.raises(NodeDown, match="did not greet") as caught:
        connect(process.path, {}, timeout=0.05)
    assert not caught.value.sent
    big = np.arange(500_000)
    futures = [channel.submit(ask("echo", big, n)) for n in range(5)]
    process.signal(signal.SIGCONT)
    for n, future in enumerate(futures):
        array, number = future.result(20)
        assert number == n
        np.testing.assert_array_equal(array, big)


def test_async_callers_are_refused_when_too_much_waits_and_sync_ones_wait(process, open_channel):
    channel = open_channel(process)
    process.signal(signal.SIGSTOP)
    big = np.zeros(2**25, np.uint8)
    futures = [channel.submit(ask("echo", big)) for _ in range(2)]
    for way in ("acall", "submit"):
        started = time.monotonic()
        with pytest.raises(Overloaded):
            run(channel, way, ask("echo", big))
        assert time.monotonic() - started < 15
    with pytest.raises(DeadlineExceeded):
        channel.call(ask("echo", big, timeout=0.05))
    with ThreadPoolExecutor(1) as pool:
        calling = pool.submit(channel.call, ask("give", big, bytes=3))
        process.signal(signal.SIGCONT)
        assert len(calling.result(20)[0]) == 3
    assert [len(future.result(20)[0]) for future in futures] == [2**25] * 2


def test_a_client_that_dies_ends_its_calls(server, channel):
    def work():
        own = connect(server.path, {})
        own.submit(ask("hang", label="child"))
        next(own.stream(ask("", label="child stream", pause=0.001, tells=True)))
        time.sleep(60)

    child = Child(work)
    eventually(lambda: {"child began", "child stream began"} <= set(server.handler.events))
    eventually(lambda: server.server.clients == 2)
    child.kill()
    eventually(lambda: "child cancelled" in server.handler.events)
    eventually(lambda: any("child stream ended" in event for event in server.handler.events))
    assert channel.call(ask("echo", 1)) == [1]


def test_a_client_that_reads_nothing_stops_its_streams_and_nobody_else(process, open_channel):
    """And the server's memory does not grow meanwhile."""

    def work():
        own = connect(process.path, {})
        # Not so many chunks that one who pauses before it stops is too far behind.
        chunks = own.stream(ask("", b"x" * 400_000, label="slow", pause=0.001))
        next(chunks)
        os.kill(os.getpid(), signal.SIGSTOP)

    child = Child(work)
    _, status = os.waitpid(child.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    channel = open_channel(process)
    before = channel.call(ask("rss"))[0]
    for _ in range(200):
        assert channel.call(ask("echo", 1)) == [1]
        time.sleep(0.001)
    assert channel.call(ask("rss"))[0] - before < 2**25
    assert channel.call(ask("told")) == []
    child.kill()
    eventually(lambda: channel.call(ask("told")))


def test_a_client_that_does_not_read_its_answers_is_not_read_from(process, open_channel):
    def work():
        own = connect(process.path, {})
        waiting = [own.submit(ask("give", bytes=2_000_000)) for _ in range(3)]
        waiting[0].result()
        os.kill(os.getpid(), signal.SIGSTOP)

    child = Child(work)
    _, status = os.waitpid(child.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert open_channel(process).call(ask("echo", 1)) == [1]
    child.kill()


# Servers that close.


def test_a_call_that_a_closing_server_never_read_was_not_sent(server, channel):
    """It came between the last look of the server and its end."""

    async def close_without_a_look():
        busy.set()
        time.sleep(0.3)  # noqa: ASYNC251 - the call comes meanwhile
        await server.server.close(grace=1.0)

    busy = threading.Event()
    closing = threading.Thread(target=server.run, args=(close_without_a_look(),))
    closing.start()
    busy.wait(10)
    with pytest.raises(NodeDown) as caught:
        channel.call(ask("echo", 1))
    assert not caught.value.sent
    closing.join(10)


def test_a_closing_server_finishes_what_runs_and_takes_nothing_new(server, channel, way):
    running = channel.submit(ask("hold", np.zeros(2_000_000)))
    eventually(server.running)
    closing = threading.Thread(target=server.close, args=(20,))
    closing.start()
    eventually(lambda: not server.path.exists())
    with pytest.raises(NodeDown) as caught:
        run(channel, way, ask("echo"))
    assert not caught.value.sent
    with pytest.raises(NodeDown):
        connect(server.path, {})
    server.release()
    assert len(running.result()[0]) == 2_000_000
    closing.join(20)
    eventually(lambda: not channel.connected)


def test_a_server_that_closes_at_once_cancels_what_runs(server, channel):
    waiting = Waiting(channel)
    eventually(lambda: _begun(server.handler.events) == 5)
    server.close()
    server.close()
    waiting.check()
    assert len(server.handler.events) == 10


def test_a_server_starts_once(server):
    with pytest.raises(ConfigError, match="starts once"):
        server.run(server.server.start())


# Whose socket it is.


def test_the_socket_is_for_this_user_alone(server):
    assert stat.S_IMODE(server.path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o600
    server.close()
    assert not server.path.exists()


def test_a_directory_open_to_others_is_refused(path):
    path.parent.mkdir(mode=0o755)
    path.parent.chmod(0o755)
    with pytest.raises(ConfigError, match="open to other users"), ServerThread(path):
        pass


async def test_a_directory_of_someone_else_is_refused(path, monkeypatch):
    path.parent.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ConfigError, match="belongs to user id"):
        await Server(path, Answers()).start()


def test_a_second_server_is_refused_and_harms_nobody(server, channel):
    with pytest.raises(ConfigError, match="another server listens"), ServerThread(server.path):
        pass
    assert channel.call(ask("echo", 1)) == [1]
    assert server.path.exists()


def test_what_a_killed_server_left_is_replaced(process, open_channel):
    process.kill()
    assert process.path.exists()
    with ServerThread(process.path) as server:
        assert open_channel(server).call(ask("echo", 1)) == [1]


def test_a_file_that_is_no_socket_stays(path):
    path.parent.mkdir(mode=0o700)
    path.write_text("precious")
    with pytest.raises(ConfigError), ServerThread(path):
        pass
    assert path.read_text() == "precious"


def test_a_server_leaves_the_socket_of_its_successor(server, path):
    path.unlink()
    with ServerThread(path):
        server.close()
        assert path.exists()


def test_a_path_too_long_is_refused(tmp_path):
    path = tmp_path / ("x" * 120)
    with pytest.raises(ConfigError, match="107"), ServerThread(path):
        pass
    with pytest.raises(ConfigError, match="107"):
        connect(path, {})


def test_a_client_of_another_user_is_not_served(server, monkeypatch):
    monkeypatch.setattr(sockets, "peer_uid", lambda sock: os.geteuid() + 1)
    with pytest.raises(ConfigError, match="runs as user id"):
        connect(server.path, {})
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(server.path))
        other.settimeout(20)
        assert other.recv(1) == b""
    assert server.server.clients == 0


async def test_a_refused_client_learns_why(server):
    with pytest.raises(Registered, match="go away"):
        connect(server.path, {"refuse": "go away"})
    with pytest.raises(Registered, match="go away"):
        await aconnect(server.path, {"refuse": "go away"})
    channel = await aconnect(server.path, {})
    assert await channel.acall(ask("echo", 1)) == [1]
    channel.close()


# Forks.


def test_a_forked_child_does_not_use_the_connection(server, channel):
    future = channel.submit(ask("hold", "late"))
    chunks = channel.stream(ask("", count=3, hold_at=1))

    def work():
        errors = []
        for fn in (lambda: future.result(5), lambda: list(chunks)):
            with contextlib.suppress(NodeDown):
                fn()
                errors.append("not failed")
        try:
            channel.call(ask("echo"))
        except NodeDown as error:
            errors.append(error.sent)
        channel.close()
        with contextlib.closing(connect(server.path, {})) as own:
            errors += own.call(ask("echo", "own"))
        return errors

    assert Child(work).value() == [False, "own"]
    server.release()
    assert future.result() == ["late"]
    assert list(chunks) == [[0], [1], [2]]


def test_a_child_of_a_server_does_not_keep_its_sockets_open(path):
    def serve_and_fork():
        ServerThread(path).__enter__()
        with contextlib.closing(connect(path, {})) as channel:
            channel.call(ask("echo"))
            child = Child(lambda: len(_sockets_of_this_process()))
            return child.value()

    assert Child(serve_and_fork).value() == 0


def _sockets_of_this_process():
    return [one for one in descriptors() if one.is_socket() and _is_ours(int(one.name))]


def descriptors():
    return list(Path("/proc/self/fd").iterdir())


def _is_ours(descriptor):
    with socket.socket(fileno=os.dup(descriptor)) as one:
        names = (one.getsockname(), one.family)
        with contextlib.suppress(OSError):
            names += (one.getpeername(),)
        return any("host.sock" in str(name) for name in names)


def test_nothing_is_left_over(path):
    gc.collect()
    threads, before = threading.active_count(), len(descriptors())
    for _ in range(3):
        with ServerThread(path) as server:
            channel = connect(server.path, {})
            channel.call(ask("echo", 1))
            next(channel.stream(ask("", pause=0.001)))
            channel.close()
            with pytest.raises(Registered):
                connect(server.path, {"refuse": "no"})
    eventually(lambda: threading.active_count() <= threads)
    eventually(lambda: len(descriptors()) <= before)
