"""Deploys, restarts and recycling under load from clients that count every answer."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from itertools import product

import pytest
from counting_client import CountingClient
from gunicorn_process import alive, poll, without
from living_app import LivingApp

pytestmark = pytest.mark.slow

CONNECTIONS = 32
EACH_KIND = pytest.mark.parametrize("kind", ["asgi", "h11", "wsgi"])
# An app that is broken at its lifespan has one, so it is no WSGI app.
BROKEN = [
    *product(["asgi", "wsgi"], ["import", "exit", "attribute", "model", "crash"]),
    ("asgi", "lifespan"),
]
BOTH_WAYS = pytest.mark.parametrize("keep_alive", [False, True], ids=["new", "kept"])


@pytest.fixture
def serve(tmp_path):
    """Start a server; `h11` is an ASGI app without httptools and uvloop."""
    with contextlib.ExitStack() as stack:

        def make(kind, *options, **told):
            (tmp_path / "server").mkdir()
            env = {}
            if kind == "h11":
                env["PYTHONPATH"] = without(tmp_path, "httptools", "uvloop")
            interface = "wsgi" if kind == "wsgi" else "asgi"
            server = LivingApp(interface, *options, cwd=tmp_path / "server", env=env, **told)
            return stack.enter_context(server)

        yield make


def said(counts):
    return (
        f"{counts.ok} answers, {len(counts.failed)} failed, {counts.unanswered} unanswered on a "
        f"connection closed while idle, {counts.closed_idle} idle closes seen before"
    )


def progress(server, client, requests=100):
    """Wait until some more requests were answered."""
    before = client.so_far()
    server.until(lambda: client.so_far() >= before + requests, "requests to be answered")


@EACH_KIND
@BOTH_WAYS
def test_ten_deploys(serve, tell, kind, keep_alive):
    server = serve(kind, "-w", "2")
    server.all_ready(2)
    with CountingClient(server.url, CONNECTIONS, keep_alive=keep_alive) as client:
        for generation in range(2, 12):
            server.hang_up(version=generation)
            server.all_ready(2, generation)
            progress(server, client)
    tell(said(client.counts))
    assert client.counts.failed == []
    assert "Traceback" not in server.log


@EACH_KIND
@pytest.mark.parametrize(("seconds", "options"), [(8, (3, 2)), (90, (30, 30))])
def test_a_deploy_that_loads_for_long(serve, tell, kind, seconds, options):
    """Far longer than --timeout and --graceful-timeout; somebody serves all the time."""
    timeout, graceful = map(str, options)
    server = serve(kind, "-w", "2", "--timeout", timeout, "--graceful-timeout", graceful)
    server.all_ready(2)
    with CountingClient(server.url, 4, keep_alive=False) as client:
        server.hang_up(version=2, slow=seconds)
        server.all_ready(2, 2, seconds=seconds + 60)
    tell(said(client.counts))
    assert client.counts.failed == []
    assert "TIMEOUT" not in server.log
    assert server.get().text == "2"


@pytest.mark.parametrize(("kind", "broken"), BROKEN)
def test_a_broken_deploy_and_its_repair(serve, tell, kind, broken):
    """Twice, since the second time the arbiter has been through it; then the repair is served."""
    server = serve(kind, "-w", "2", "--graceful-timeout", "1")
    server.all_ready(2)
    with CountingClient(server.url, 8, keep_alive=False) as client:
        for attempt in (1, 2):
            server.hang_up(version="never", broken=broken)
            server.until(
                lambda attempt=attempt: server.log.count("this worker serves on") == 2 * attempt,
                "both to stay",
            )
            server.all_ready(2)
            progress(server, client)
        server.hang_up(version=4, broken="")
        server.all_ready(2, generation=4)
        assert server.get().text == "4"
    tell(said(client.counts))
    assert client.counts.failed == []
    began = time.monotonic()
    server.send(signal.SIGTERM)
    assert server.end() == 0
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("kind", ["asgi", "wsgi"])
def test_an_old_worker_that_dies_after_a_broken_deploy(serve, kind):
    """Its successor is of the version that cannot boot: tried again and again, with pauses."""
    server = serve(kind, "-w", "2", "--graceful-timeout", "1")
    server.all_ready(2)
    server.hang_up(version=2, broken="model")
    server.until(lambda: server.log.count("this worker serves on") == 2, "both to stay")
    os.kill(server.rows()[0][2], signal.SIGKILL)
    with CountingClient(server.url, 4, keep_alive=False) as client:
        server.logged("4 boots have failed", 60)
    assert client.counts.failed == []
    server.tell(broken="")
    server.until(lambda: server.states() == [(1, "READY"), (2, "READY")], "the successor", 60)
    server.send(signal.SIGTERM)
    assert server.end() == 0


@EACH_KIND
def test_max_requests_under_load(serve, tell, kind):
    """Three workers, each load takes a second: a new connection is answered quickly always."""
    options = ("--max-requests", "300", "--max-requests-jitter", "100")
    server = serve(kind, "-w", "3", *options)
    server.all_ready(3)
    server.tell(slow=1)
    least = 3
    with CountingClient(server.url, 8, keep_alive=False) as client:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            states = server.states()
            assert states, "nobody answered"
            least = min(least, states.count((1, "READY")))
    recycled = server.log.count("Autorestarting worker")
    tell(f"{said(client.counts)}; {recycled} workers replaced, {least} or more ready")
    assert client.counts.failed == []
    assert recycled >= 5
    assert least >= 1


@EACH_KIND
@BOTH_WAYS
def test_another_arbiter_takes_over(serve, tell, kind, keep_alive):
    """USR2, then TERM to the old one when the new one serves."""
    server = serve(kind, "-w", "2")
    server.all_ready(2)
    old = server.workers()
    with CountingClient(server.url, CONNECTIONS, keep_alive=keep_alive) as client:
        server.tell(version=2)
        server.send(signal.SIGUSR2)
        server.until(lambda: server.log.count("Ready: ") == 4, "the new workers", 60)
        progress(server, client)
        (new,) = server.workers() - old
        server.send(signal.SIGTERM)
        server.end()
        answered = client.so_far()
        poll(lambda: client.so_far() > answered + 100, "the new ones to serve")
        assert server.get().text == "2"
    tell(said(client.counts))
    assert client.counts.failed == []
    os.kill(new, signal.SIGTERM)
    poll(lambda: not alive(new), "the new arbiter to end")


def test_the_old_arbiter_of_a_daemon_is_emptied_first(serve, tell, tmp_path):
    """USR2, WINCH and QUIT, as gunicorn's manual has it."""
    pidfile = tmp_path / "pid"
    log = tmp_path / "daemon.log"
    server = serve("asgi", "-w", "2", "--daemon", "--pid", str(pidfile), "--log-file", str(log))
    pid = int(poll(lambda: pidfile.exists() and pidfile.read_text(), "a pid file"))
    new = 0
    try:
        poll(lambda: log.read_text().count("Ready: ") == 2, "the workers")
        url = log.read_text().partition("Listening at: ")[2].split()[0]
        with CountingClient(url, CONNECTIONS, keep_alive=False) as client:
            os.kill(pid, signal.SIGUSR2)
            poll(lambda: log.read_text().count("Ready: ") == 4, "the new workers", 60)
            new = int((tmp_path / "pid.2").read_text())
            os.kill(pid, signal.SIGWINCH)
            poll(lambda: log.read_text().count("Worker exiting") == 2, "the old workers to go")
            os.kill(pid, signal.SIGQUIT)
            poll(lambda: not alive(pid), "the old arbiter to go")
            answered = client.so_far()
            poll(lambda: client.so_far() > answered + 100, "the new ones to serve")
        tell(said(client.counts))
        assert client.counts.failed == []
    finally:
        for arbiter in filter(None, (pid, new)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(arbiter, signal.SIGTERM)
        poll(lambda: not alive(pid) and not (new and alive(new)), "the arbiters to end")
        server.process.wait()


@pytest.mark.parametrize("kind", ["asgi", "wsgi"])
def test_workers_are_added_taken_away_and_killed(serve, tell, kind):
    """TTIN and TTOU lose nothing; a kill loses what that worker had, and it is replaced."""
    server = serve(kind, "-w", "2")
    server.all_ready(2)
    with CountingClient(server.url, 8, keep_alive=False) as client:
        for _ in range(3):
            server.send(signal.SIGTTIN)
            server.all_ready(3)
            server.send(signal.SIGTTOU)
            server.all_ready(2)
        lost_before_kill = len(client.failures())
        os.kill(server.rows()[0][2], signal.SIGKILL)
        server.all_ready(2)
        progress(server, client)
    tell(said(client.counts))
    assert lost_before_kill == 0
    assert len(client.counts.failed) <= 8
