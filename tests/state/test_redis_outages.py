"""Messages on servers that die, stall and hang up."""

from __future__ import annotations

import asyncio
import gc
import threading
import time

import pytest
from message_helpers import (
    TOPIC,
    failure_of,
    is_readable,
    listeners,
    next_of,
    published,
    reached,
    subscriptions,
    threads,
)
from redis_servers import free_port, wait_until

from hornbeam_state.backends.base import Topics
from hornbeam_state.backends.redis import lane
from hornbeam_state.backends.redis.session import Session
from hornbeam_state.errors import StoreUnavailable

TIMEOUT = 0.4
PATIENCE = 5  # more than anything takes that fails at once or in one timeout


class TestLoss:
    """A connection that is lost is made again, and counted."""

    def test_a_restarted_server(self, make_server, connect, subscribing):
        """Its readers wait on, are told once, and get what is published later."""
        server = make_server()
        backend = connect(server.url, TIMEOUT)
        inboxes = [subscribing(backend), subscribing(backend, Topics((b"u",), (b"t",)))]
        published(backend, b"before", 2)
        assert [next_of(inbox) for inbox in inboxes] == [(b"t", b"before")] * 2
        assert [inbox.take() for inbox in inboxes] == [None] * 2
        server.stop()
        for inbox in inboxes:
            assert is_readable(inbox, 10_000)
            with pytest.raises(StoreUnavailable, match="cannot be reached"):
                inbox.take()
            assert inbox.take() is None
            assert not is_readable(inbox, 300)
            assert inbox.gaps == 1
        server.start()
        published(backend, b"after", 2)
        for inbox in inboxes:
            assert next_of(inbox) == (b"t", b"after")
            assert inbox.gaps == 1

    def test_a_short_absence_is_no_error(self, make_server, connect, subscribing):
        """Only the gap tells of it."""
        server = make_server()
        backend = connect(server.url)
        inbox = subscribing(backend)
        for count in range(1, 4):
            server.stop()
            server.start()
            published(backend, b"%d" % count)
            assert next_of(inbox) == (b"t", b"%d" % count)
            assert inbox.gaps == count

    def test_killed_connections(self, make_server, connect, subscribing):
        """Every one comes back, and at once."""
        server = make_server()
        backend = connect(server.url)
        inboxes = [subscribing(backend) for _ in range(5)]
        with server.admin() as admin:
            admin.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        published(backend, b"v", 5)
        for inbox in inboxes:
            assert next_of(inbox)[1] == b"v"
            assert inbox.gaps == 1

    def test_many_connections_are_made_again_a_few_at_a_time(
        self, make_server, connect, monkeypatch
    ):
        """With as many threads, and not with one for each."""
        server = make_server()
        backend = connect(server.url)
        inboxes = [backend.subscribe(TOPIC, 10) for _ in range(60)]
        reader, go_on, lock = backend._messages._reader, threading.Event(), threading.Lock()
        dial, at_a_time = reader._make_connection, [0]

        def wait_and_dial():
            with lock:
                at_a_time.append(at_a_time[-1] + 1)
            go_on.wait(10)
            try:
                return dial()
            finally:
                with lock:
                    at_a_time.append(at_a_time[-1] - 1)

        monkeypatch.setattr(reader, "_make_connection", wait_and_dial)
        with server.admin() as admin:
            admin.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        wait_until(lambda: at_a_time[-1] == 8, "as many as may be are being made")
        go_on.set()
        wait_until(lambda: subscriptions(server) == 60, "all are back")
        assert max(at_a_time) == 8
        assert {inbox.gaps for inbox in inboxes} == {1}

    def test_a_connection_that_is_killed_again_and_again(self, make_server, connect):
        """It is not made again in a tight loop."""
        server = make_server()
        inbox = connect(server.url).subscribe(TOPIC, 10)
        with server.admin() as admin:
            before = admin.info("stats")["total_connections_received"]

            def is_killed_again():
                admin.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
                return inbox.gaps >= 2

            wait_until(is_killed_again, "it is made again")
            ends = time.monotonic() + 2
            while time.monotonic() < ends:
                is_killed_again()
                time.sleep(0.005)
            tried = admin.info("stats")["total_connections_received"] - before
        assert 2 <= tried < 15
        assert 2 <= inbox.gaps <= tried + 1

    def test_an_overrun_output_buffer(self, make_server, connect):
        """A server hangs up on whom it would have to keep too much for."""
        server = make_server("--client-output-buffer-limit", "pubsub 1mb 1mb 1")
        backend = connect(server.url)
        inbox = backend.subscribe(TOPIC, 10)
        with server.admin() as admin:
            admin.eval(
                "for i = 1, 500 do redis.call('PUBLISH', 'hb:0:m:t', string.rep('v', 10000)) end", 0
            )
        wait_until(lambda: inbox.gaps == 1, "the gap is counted")
        published(backend, b"small")
        wait_until(lambda: inbox.take() == (b"t", b"small"), "it goes on")

    def test_who_can_be_reached_is_asked_only_when_it_is_quiet(
        self, make_server, connect, monkeypatch
    ):
        """A PING keeps whatever lies between from forgetting the connection."""
        monkeypatch.setattr(lane, "PATIENCE", 1)
        server = make_server()
        inbox = connect(server.url, 0.8).subscribe(TOPIC, 10)
        assert [client["cmd"] for client in listeners(server)] == ["subscribe"]
        wait_until(lambda: [one["cmd"] for one in listeners(server)] == ["ping"], "it is pinged")
        time.sleep(1)  # more than it would be given to answer
        assert inbox.gaps == 0
        assert not is_readable(inbox)

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_a_fault_of_the_reading_thread(self, valkey, connect, monkeypatch):
        """Nobody is left waiting on what is dead, and the next subscription has a new thread."""
        backend = connect(valkey.url)
        inbox, told = backend.subscribe(TOPIC, 10), []
        monkeypatch.setattr(threading, "excepthook", lambda args: told.append(args.exc_value))
        with monkeypatch.context() as broken:
            broken.setattr(Session, "received", lambda *_: 1 / 0)
            backend.publish(b"t", b"v")
            assert is_readable(inbox, 10_000)
            wait_until(lambda: not threads(), "the thread has ended")
        assert inbox.closed
        assert isinstance(told[0], ZeroDivisionError)
        inbox.close()
        again = backend.subscribe(TOPIC, 10)
        reached(backend, again, b"w")

    def test_nobody_there(self, connect, subscribing):
        """It fails at once and then without trying, and leaves nothing."""
        backend = connect(f"redis://127.0.0.1:{free_port()}")
        message, took = failure_of(subscribing, backend)
        assert "cannot be reached" in message
        assert took < PATIENCE

        def is_spared():
            message, took = failure_of(subscribing, backend)
            assert took < PATIENCE
            return "next try" in message

        wait_until(is_spared, "nothing is tried")
        wait_until(lambda: not threads(), "the thread has ended")


class TestStall:
    """A server that is stopped, while the kernel goes on accepting connections for it."""

    @pytest.mark.parametrize("connected", [True, False])
    def test_subscribing_fails_in_time(self, make_server, connect, subscribing, connected):
        """And counts as a failure; what was asked for is not subscribed later."""
        server = make_server()
        backend = connect(server.url, TIMEOUT)
        if connected:
            backend.subscribe(Topics((b"other",), ()), 10).close()
        server.stall()
        for _ in range(3):
            message, took = failure_of(subscribing, backend)
            assert "did not answer within 0.4 s" in message
            assert 0.9 * TIMEOUT < took < PATIENCE
        assert any("next try" in failure_of(subscribing, backend)[0] for _ in range(4))
        server.resume()
        wait_until(lambda: not threads(), "the thread has ended")
        assert subscriptions(server) == 0

    def test_readers_are_told_once_and_go_on(self, make_server, connect):
        """The first is told when the question goes unanswered; a short stall loses nothing."""
        server = make_server()
        backend = connect(server.url, 0.4)
        inbox = backend.subscribe(TOPIC, 10)
        server.stall()
        assert is_readable(inbox, 10_000)
        with pytest.raises(StoreUnavailable, match=r"did not answer within 0\.4 s"):
            inbox.take()
        assert inbox.take() is None
        server.resume()
        published(backend, b"v")
        assert next_of(inbox) == (b"t", b"v")
        assert inbox.gaps == 0

    def test_a_long_silence_is_a_loss(self, make_server, connect, monkeypatch):
        """The connection is given up, and made anew when the server is back."""
        monkeypatch.setattr(lane, "PATIENCE", 2)
        server = make_server()
        backend = connect(server.url, 0.5)
        inbox = backend.subscribe(TOPIC, 10)
        server.stall()
        wait_until(lambda: inbox.gaps == 1, "it is given up")
        with pytest.raises(StoreUnavailable):
            inbox.take()
        time.sleep(1)
        assert inbox.take() is None
        server.resume()
        reached(backend, inbox, b"v")
        assert inbox.gaps == 1

    def test_closing_is_bounded(self, make_server, connect):
        """One after the other does not add up; the server learns of it later."""
        server = make_server()
        backend = connect(server.url, TIMEOUT)
        inboxes = [backend.subscribe(Topics((b"%d" % number,), ()), 10) for number in range(50)]
        server.stall()
        started = time.monotonic()
        for inbox in inboxes[:49]:
            inbox.close()
        assert time.monotonic() - started < PATIENCE  # else it would be 20
        server.resume()
        wait_until(lambda: subscriptions(server) == 1, "the server knows")
        server.stall()
        started = time.monotonic()
        backend.close()
        assert time.monotonic() - started < PATIENCE
        assert is_readable(inboxes[49])
        wait_until(lambda: not threads(), "the thread has ended")
        server.resume()

    def test_an_event_loop_runs_on(self, make_server, connect):
        """Whatever its tasks subscribe to and close."""
        server = make_server()
        backend = connect(server.unix_url, 2)
        longest = 0.0

        async def tick():
            nonlocal longest
            while True:
                started = time.monotonic()
                await asyncio.sleep(0.005)
                longest = max(longest, time.monotonic() - started)

        async def main():
            inboxes = [await backend.asubscribe(TOPIC, 10) for _ in range(3)]
            server.stall()
            ticker = asyncio.create_task(tick())
            started = time.monotonic()
            results = await asyncio.gather(
                *(backend.asubscribe(TOPIC, 10) for _ in range(30)), return_exceptions=True
            )
            assert {type(result) for result in results} == {StoreUnavailable}
            for inbox in inboxes[:2]:
                inbox.close()
                await asyncio.sleep(0)
            await backend.aclose()
            assert time.monotonic() - started < 8
            ticker.cancel()
            server.resume()

        asyncio.run(main())
        assert longest < 1.8  # waiting for the server would take 2

    def test_a_cancelled_task_leaves_nothing_subscribed(self, make_server, connect):
        """Whenever it is cancelled: while connecting, or while waiting for the answer."""
        server = make_server()
        backend = connect(server.url, 5)

        async def main():
            for connected in (False, True):
                server.stall()
                tasks = [asyncio.create_task(backend.asubscribe(TOPIC, 10)) for _ in range(20)]
                await asyncio.sleep(0.05)
                for task in tasks:
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
                assert {type(result) for result in results} == {asyncio.CancelledError}
                server.resume()
                if not connected:
                    await backend.asubscribe(TOPIC, 10)

        asyncio.run(main())
        gc.collect()
        wait_until(lambda: backend.publish(b"t", b"v") == 0, "nothing is subscribed")
        wait_until(lambda: not threads(), "the thread has ended")

    def test_cancelled_at_any_moment(self, valkey, connect):
        """Also when the answer comes at the same time."""
        backend = connect(valkey.url)

        async def attempt(delay):
            task = asyncio.create_task(backend.asubscribe(TOPIC, 10))
            await asyncio.sleep(delay)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        async def main():
            for step in range(200):
                await attempt(step * 1e-5)

        asyncio.run(main())
        gc.collect()
        wait_until(lambda: backend.publish(b"t", b"v") == 0, "nothing is subscribed")
