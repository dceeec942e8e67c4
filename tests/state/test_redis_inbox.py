"""Who reads the answers to a process: a caller that blocks, or a thread; and what if that ends."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import threading
import time

import pytest
from rpc_helpers import NODE, NodeThread, a_backend
from transport_helpers import PATIENCE, Answers, ask, eventually

from hornbeam_state.errors import NodeDown
from hornbeam_state.transports.redis import connect, inbox
from hornbeam_state.transports.waiting import ThreadWaker


class Alarm(BaseException):
    """What a signal handler raises, as Ctrl-C would."""


class Gated(Answers):
    """Answers that may be held back until the gate is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    async def held(self, request):
        await asyncio.to_thread(self.gate.wait, PATIENCE)
        return request.values


@pytest.fixture
def answers():
    """What the node answers with; nothing is held back at the end."""
    answers = Gated()
    yield answers
    answers.gate.set()


@pytest.fixture
def channel(valkey, answers):
    backend = a_backend(valkey.url)
    with (
        NodeThread(valkey.url, handler=answers),
        contextlib.closing(connect(backend, NODE)) as opened,
    ):
        assert opened.call(ask("echo", 1)) == [1]
        yield opened
        answers.gate.set()
    backend.close()


@pytest.fixture
def in_a_thread(answers):
    """Return what runs a function in a thread, which is joined after."""
    threads = []

    def start(function):
        threads.append(threading.Thread(target=function))
        threads[-1].start()
        return threads[-1]

    yield start
    answers.gate.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_a_caller_reads_for_others(channel, in_a_thread, answers):
    """The one that waits longest reads; those who come after get their answers meanwhile."""
    results = []
    in_a_thread(lambda: results.append(channel.call(ask("held", "slow"))))
    eventually(lambda: channel.pending)
    assert channel.call(ask("echo", "quick")) == ["quick"]
    assert channel.submit(ask("echo", "future")).result(PATIENCE) == ["future"]
    assert [one[0] for one in channel.stream(ask("", count=3))] == [0, 1, 2]
    assert results == []
    answers.gate.set()
    eventually(lambda: results == [["slow"]])


def test_large_values_are_uploaded_once_while_another_reads(channel, in_a_thread, valkey):
    def uploads():
        with valkey.admin() as admin:
            return admin.info("commandstats")["cmdstat_set"]["calls"]

    in_a_thread(lambda: channel.call(ask("held")))
    eventually(lambda: channel.pending)
    before = uploads()
    assert channel.call(ask("echo", large := bytes(8 * 2**20))) == [large]
    assert uploads() - before < 18  # nine pieces, and signs of life: one in a second


def test_those_who_wait_are_served_when_the_reader_goes(channel, in_a_thread):
    reader = in_a_thread(lambda: channel.call(ask("echo", seconds=0.1)))
    eventually(lambda: channel.pending)
    future = channel.submit(ask("echo", "late", seconds=0.3))
    assert channel.call(ask("echo", "later", seconds=0.4)) == ["later"]
    reader.join(PATIENCE)
    assert not reader.is_alive()
    assert future.result(PATIENCE) == ["late"]


def test_callbacks_do_not_run_on_the_thread_of_a_caller(channel, in_a_thread, answers):
    """They may take as long as they like without keeping its answer back."""
    release, ran_on = threading.Event(), []

    def callback(_):
        ran_on.append(threading.current_thread().name)
        release.wait(10)

    reader = in_a_thread(lambda: channel.call(ask("held")))
    eventually(lambda: channel.pending)
    channel.submit(ask("held")).add_done_callback(callback)
    answers.gate.set()
    reader.join(10)
    assert not reader.is_alive()
    release.set()
    eventually(lambda: ran_on)
    assert ran_on[0].startswith("hornbeam-")


# What is interrupted while it connects leaves its socket to the collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupted_caller_harms_no_other(channel, in_a_thread):
    """Wherever the interrupt strikes: what others wait for still comes."""
    done, served = threading.Event(), []

    def others():
        while not done.is_set():
            served.append(channel.call(ask("echo", "other")))
            served.append(channel.submit(ask("echo", "other")).result(PATIENCE))

    def interrupted(seconds):
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            channel.call(ask("echo", "mine", seconds=0.001))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def ring(*_):
        raise Alarm

    chance, alarms = random.Random(0), 0
    before = signal.signal(signal.SIGALRM, ring)
    in_a_thread(others)
    try:
        for _ in range(150):
            try:
                interrupted(chance.uniform(0.00005, 0.005))
            except Alarm:
                alarms += 1
    finally:
        done.set()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert alarms
    assert served
    assert set(map(tuple, served)) == {("other",)}
    assert channel.call(ask("echo", "after")) == ["after"]
    eventually(lambda: not channel.pending)


def test_a_call_of_which_nothing_is_known_counts_as_sent(make_server):
    """Its connection got it, and then nothing was heard of the server."""
    valkey = make_server()
    with contextlib.ExitStack() as stack:
        stack.enter_context(NodeThread(valkey.url))
        backend = a_backend(valkey.url, timeout=0.6)
        stack.callback(backend.close)
        channel = stack.enter_context(contextlib.closing(connect(backend, NODE)))
        for number in range(3):
            assert channel.call(ask("echo", number)) == [number]
        valkey.stall()
        stack.callback(valkey.resume)
        started = time.monotonic()
        with pytest.raises(NodeDown) as caught:
            channel.call(ask("echo", timeout=10))
        assert caught.value.sent
        assert time.monotonic() - started < 5


def test_a_caller_that_never_left_is_put_out(channel, monkeypatch):
    """As if an interrupt had struck in the very moment of leaving."""
    monkeypatch.setattr(inbox, "_LEAVING_S", 0.1)
    monkeypatch.setattr(inbox, "_ALIVE_EVERY_S", 0.05)
    reader = channel._client.reader
    gone = channel._client.new_call(0.0, ThreadWaker(), channel)
    gone.finish([])
    eventually(lambda: reader._place.setdefault(None, gone) is gone)
    assert channel.call(ask("echo", "served", timeout=5)) == ["served"]
