"""How calls find a connection to the model host, and what happens when it is lost."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

import pytest
from gunicorn_process import poll

from hornbeam_ml.host.spec import HostSpec
from hornbeam_ml.request import Request as HttpRequest
from hornbeam_ml.request import set_current_request
from hornbeam_ml.serving import hosts as choosing
from hornbeam_ml.serving.client import HostedCalls
from hornbeam_ml.serving.hosts import FIRST_CONTACT_S, Hosts
from hornbeam_state.errors import NodeDown

pytestmark = pytest.mark.usefixtures("_http_request", "_patience")


class FakeChannel:
    """Answers, or fails as if it was lost; one that was sent may have been seen."""

    pending = 0

    def __init__(self, on_note, on_lost, *, sent=None):
        self.connected = True
        self.on_note, self.on_lost = on_note, on_lost
        self.sent = sent
        self.requests = []

    def submit(self, request):
        self.requests.append(request)
        future: Future = Future()
        if self.sent is None:
            future.set_result(list(request.values))
        else:
            self.connected = False
            error = NodeDown("lost")
            error.sent = self.sent
            future.set_exception(error)
            self.on_lost(OSError("lost"))
        return future

    def call(self, request):
        return self.submit(request).result()

    async def acall(self, request):
        return self.call(request)

    def stream(self, request):
        self.requests.append(request)
        return iter(request.values)

    async def astream(self, request):
        self.requests.append(request)
        yield request.values[0]

    def close(self):
        self.connected = False


class Host:
    """Makes fake channels, and keeps them."""

    def __init__(self, tmp_path, *, complete=True):
        self.complete = complete
        self.channels = []
        self.next_sent = None
        self.there = True
        (tmp_path / "0.sock").touch()
        self.hosts = Hosts(tmp_path, HostSpec("hornbeam_ml"), self.connect)
        self.calls = HostedCalls("a", self.hosts)

    def connect(self, _path, _hello, *, on_note, on_lost):
        if not self.there:
            raise NodeDown("nobody listens")
        channel = FakeChannel(on_note, on_lost, sent=self.next_sent)
        self.next_sent = None
        self.channels.append(channel)
        self.tell(channel)
        return channel

    def tell(self, channel, *, loaded=True):
        state = {"loaded": loaded, "ready": loaded, "info": {}}
        channel.on_note(
            {"pid": 1, "failed": None, "complete": self.complete, "targets": {"a": state}}
        )

    def lose(self):
        self.there = False
        self.channels[-1].connected = False
        self.channels[-1].on_lost(OSError("gone"))


@pytest.fixture(params=["script", "request"])
def _http_request(request):
    set_current_request(HttpRequest() if request.param == "request" else None)
    yield
    set_current_request(None)


@pytest.fixture
def _patience(monkeypatch):
    """Calls wait longer for a host than a busy machine takes to connect."""
    monkeypatch.setattr(choosing, "PATIENCE_S", 20.0)


@pytest.fixture
def host(tmp_path):
    host = Host(tmp_path)
    poll(lambda: host.hosts.is_loaded("a"), "it is connected")
    yield host
    host.hosts.close()


def test_a_call_that_was_not_seen_is_made_again(host):
    host.channels[0].sent = False
    assert host.calls.run_batch(["x"]) == ["x"]
    assert len(host.channels) == 2


async def test_so_is_one_that_is_awaited(host):
    host.channels[0].sent = False
    assert await host.calls.arun_batch(["x"]) == ["x"]
    assert len(host.channels) == 2


def test_one_that_may_have_been_seen_is_not(host):
    host.channels[0].sent = True
    with pytest.raises(NodeDown, match="the model host of hornbeam_ml ended before it answered"):
        host.calls.run_batch(["x"])
    assert [len(channel.requests) for channel in host.channels if channel.requests] == [1]


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(lambda calls, **terms: calls.run_batch(["x"], **terms), id="run_batch"),
        pytest.param(lambda calls, **terms: [calls.submit("x", **terms).result()], id="submit"),
        pytest.param(lambda calls, **terms: list(calls.stream("x", **terms)), id="stream"),
    ],
)
def test_waiting_for_the_host_counts_for_the_deadline(host, run):
    host.lose()

    def come_back():
        host.there = True

    timer = threading.Timer(0.2, come_back)

    def begin_to_wait(_target):
        del host.hosts._best  # again that of its class
        timer.start()

    host.hosts._best = begin_to_wait
    assert run(host.calls, timeout_ms=30_000) == ["x"]
    assert host.channels[-1].requests[0].timeout < 29.9
    timer.join()


async def test_a_stream_does_not_hold_up_the_event_loop_while_the_host_is_away(host):
    host.lose()
    start = time.monotonic()
    streams = [host.calls.astream("x") for _ in range(3)]
    assert time.monotonic() - start < choosing.PATIENCE_S
    host.there = True
    assert [[chunk async for chunk in stream] for stream in streams] == [["x"]] * 3


async def test_closing_a_stream_that_waits_for_the_host(host):
    host.lose()
    async with host.calls.astream("x") as stream:
        pass
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


def test_late_news_of_a_lost_connection_leave_the_new_one_alone(host):
    first = host.channels[0]
    first.connected = False
    poll(lambda: len(host.channels) == 2, "it connects again")
    first.on_lost(OSError("gone"))
    host.tell(first, loaded=False)
    assert host.channels[1].connected
    assert host.calls.run_batch(["x"]) == ["x"]


def test_a_host_that_imports_its_module_for_long_is_waited_for(tmp_path):
    host = Host(tmp_path, complete=False)
    poll(host.hosts._links.told, "it is connected")
    waiting = threading.Thread(target=host.hosts.wait_told, args=(0.05,))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    assert "still loading" in host.hosts.problem()
    host.complete = True
    host.tell(host.channels[-1])
    waiting.join(20)
    assert not waiting.is_alive()
    assert host.hosts.problem() is None
    host.hosts.close()


async def test_what_it_serves_is_known_while_it_is_away(host, monkeypatch):
    monkeypatch.setattr(choosing, "PATIENCE_S", 0.2)
    host.lose()
    start = time.monotonic()
    assert host.hosts.serves("a") is True
    assert host.hosts.serves("b") is False
    with pytest.raises(NodeDown, match="cannot be reached"):
        await host.calls.arun_batch(["x"])
    with pytest.raises(NodeDown, match="cannot be reached"):
        await anext(host.calls.astream("x"))
    assert time.monotonic() - start < FIRST_CONTACT_S
    assert "is away" in host.hosts.problem()


def test_what_fails_every_time_does_not_fill_the_log(tmp_path):
    (tmp_path / "0.sock").touch()
    tries = []

    def connect(*_args, **_kwargs):
        tries.append(time.monotonic())
        raise RuntimeError("a bug")

    failing = Hosts(tmp_path, HostSpec("hornbeam_ml"), connect)
    poll(lambda: len(tries) >= 2, "it is tried again")
    failing.close()
    assert tries[1] - tries[0] > 0.9


def test_a_connection_that_is_made_when_all_are_closed_is_closed(tmp_path):
    (tmp_path / "0.sock").touch()
    channels, go = [], threading.Event()

    def connect(_path, _hello, *, on_note, on_lost):
        channels.append(FakeChannel(on_note, on_lost))
        go.wait(10)
        return channels[0]

    hosts = Hosts(tmp_path, HostSpec("hornbeam_ml"), connect)
    poll(lambda: channels, "it connects")
    hosts.close()
    go.set()
    poll(lambda: not channels[0].connected, "it is closed")
