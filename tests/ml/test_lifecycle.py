"""When workers come and go: signals, deploys, recycling, placement, under a real gunicorn."""

from __future__ import annotations

import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from counting_client import CountingClient
from gunicorn_process import alive, poll
from living_app import LivingApp

BOTH = pytest.mark.parametrize("kind", ["wsgi", "asgi"])


@pytest.fixture
def start(tmp_path):
    """Start servers, and end them all with the test."""
    servers = []

    def make(kind, *options, **told):
        directory = tmp_path / str(len(servers))
        directory.mkdir()
        servers.append(LivingApp(kind, *options, cwd=directory, **told))
        return servers[-1]

    yield make
    for server in servers:
        server.__exit__()


# Deploys.


@BOTH
def test_old_workers_serve_until_new_ones_are_ready(start, kind):
    """A load longer than --timeout and --graceful-timeout; every request is answered."""
    server = start(kind, "--timeout", "2", "--graceful-timeout", "2").ready()
    with CountingClient(server.url, 2, keep_alive=False) as client:
        server.hang_up(version=2, slow=3)
        server.until(lambda: (1, "RETIRING") in server.states(), "the old one to wait")
        assert server.get().text == "1"
        server.all_ready(1, generation=2)
        assert server.get().text == "2"
    assert client.counts.failed == []
    assert "TIMEOUT" not in server.log
    assert "Traceback" not in server.log


# The arbiter waits no longer than a second for workers that go, which may take their time.
HASTY_ARBITER = """
graceful_timeout = 1
def post_fork(server, worker):
    worker.cfg.set("graceful_timeout", 15)
"""


def test_a_deploy_that_fails_leaves_the_old_workers(start, tmp_path):
    """Then a fixed one is served, and the server stops at once when it is told to."""
    (tmp_path / "conf.py").write_text(HASTY_ARBITER)
    server = start("asgi", "-w", "2", "-c", str(tmp_path / "conf.py"))
    server.all_ready(2)
    with CountingClient(server.url, 2, keep_alive=False) as client:
        server.hang_up(version=2, broken="import")
        server.logged("(?s)(The new version failed to boot; this worker serves on.*){2}")
        server.all_ready(2)
        server.hang_up(version=3, broken="")
        server.all_ready(2, generation=3)
        assert server.get().text == "3"
    assert client.counts.failed == []
    server.send(signal.SIGTERM)
    assert server.end(10) == 0


@BOTH
def test_a_stop_while_a_deploy_fails(start, kind):
    """Old workers do not take the server's end for one more request to make room."""
    server = start(kind, "--graceful-timeout", "1").ready()
    server.hang_up(broken="model")
    server.logged("this worker serves on")
    server.all_ready(1)
    server.send(signal.SIGTERM)
    assert server.end(10) == 0  # gunicorn waits for old workers after a SIGHUP


def test_a_stop_while_a_deploy_loads(start):
    """Everybody goes, the workers that still boot too."""
    server = start("wsgi", "-w", "2", "--graceful-timeout", "1")
    server.all_ready(2)
    server.hang_up(slow=60)
    server.until(lambda: server.states().count((1, "RETIRING")) == 2, "the old ones to wait")
    server.send(signal.SIGTERM)
    assert server.end(8) == 0


def test_a_worker_that_crashes_at_boot_is_tried_again_after_a_pause(start):
    """Also one that leaves no exit code of ours; the server lives and serves."""
    server = start("wsgi", "-w", "2")
    server.all_ready(2)
    server.tell(broken="crash")
    os.kill(server.rows()[0][2], signal.SIGKILL)
    server.logged("2 boots have failed; the next is in")
    assert server.get().text == "1"
    server.tell(broken="")
    server.all_ready(2)


def test_a_first_boot_that_crashes_is_tried_again_after_a_pause(start):
    """gunicorn alone would fork as fast as it can."""
    server = start("wsgi", broken="crash")
    server.logged("1 boots have failed; the next is in 1 s")
    server.tell(broken="")
    server.ready()


# Leaving.


@BOTH
def test_sigterm_finishes_what_is_queued(start, kind):
    """Calls that nobody waits for run, then the app's own shutdown, which may use the model."""
    server = start(kind).ready()
    server.get("/submit")
    server.send(signal.SIGTERM)
    assert server.end() == 0
    expected = ["inferred"] * 3
    if kind == "asgi":
        expected += ["inferred", "shut down draining 1"]
    assert server.notes == expected
    assert "Traceback" not in server.log


# The worker has 2 s, the half of it for the shutdown; the arbiter kills it well after these.
GRACE = """
from hornbeam_ml.http import departure
departure._HOOKS_SHARE = 0.5
graceful_timeout = 15
def post_fork(server, worker):
    worker.cfg.set("graceful_timeout", 2)
"""


def test_graceful_timeout_bounds_what_is_waited_for(start, tmp_path):
    """Clients are told; the app's own shutdown runs all the same, and is bounded too."""
    (tmp_path / "conf.py").write_text(GRACE)
    options = ("-c", str(tmp_path / "conf.py"))
    server = start("asgi", *options, parts=100, slow_shutdown=1000).ready()
    with ThreadPoolExecutor() as pool:
        paths = ("/stream/1", "/stream/2", "/never")
        streams = [pool.submit(server.try_get, path) for path in paths[:2]]
        waiting = pool.submit(server.get, paths[2])
        begun = {f"begun {path}" for path in paths}
        server.until(lambda: begun <= set(server.notes), "requests to run")
        server.send(signal.SIGTERM)
        assert server.end() == 0
        assert [stream.result() for stream in streams] == ["", ""]  # they are seen to be cut
        answer = waiting.result()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "shut down draining 1" in server.notes
    server.logged("Cancelling 3 requests")
    server.logged("The app's shutdown has not ended in time")
    assert "Traceback" not in server.log


def test_a_stream_that_runs_is_finished(start):
    server = start("asgi").ready()
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(server.get, "/stream")
        server.until(lambda: server.notes, "the stream to run")
        server.send(signal.SIGTERM)
        assert answer.result().text == "part " * 5 + "end"
    assert server.end() == 0


def connect(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def is_refused(server):
    try:
        connect(server).close()
    except ConnectionRefusedError:
        return True
    return False


def read_all(connection):
    data = b""
    while part := connection.recv(65536):
        data += part
    return data


LINGERING = """
import gunicorn.workers.gthread, hornbeam_ml.http.asgi
gunicorn.workers.gthread.STOP_KEEPALIVE_LINGER = hornbeam_ml.http.asgi.LINGER_S = 15
keepalive = 15
"""


@BOTH
def test_connections_without_a_request_linger(start, kind, tmp_path):
    """One that was accepted and one that was kept alive: each may send a request still."""
    (tmp_path / "conf.py").write_text(LINGERING)  # 2 s are short for this test
    server = start(kind, "-c", str(tmp_path / "conf.py")).ready()
    with connect(server) as new, connect(server) as kept, connect(server) as half:
        request = b"GET /pid HTTP/1.1\r\nHost: x\r\n\r\n"
        kept.sendall(request)
        answer = b""
        while not answer.partition(b"\r\n\r\n")[2]:
            answer += kept.recv(65536)
        half.sendall(request[:20])
        server.get()  # by now all three were accepted
        server.send(signal.SIGTERM)
        poll(lambda: is_refused(server), "the last listening socket to be closed")
        for connection, text in ((new, request), (kept, request), (half, request[20:])):
            connection.sendall(text)
            answer = read_all(connection).lower()
            assert answer.startswith(b"http/1.1 200"), (kind, text)
            assert b"\r\nconnection: close\r\n" in answer
    assert server.end() == 0


def test_a_client_that_does_not_close_holds_nobody_up(start):
    """gunicorn's loop would wait for each for 2 s."""
    server = start("wsgi").ready()
    began = time.monotonic()
    with ExitStack() as stack:
        for _ in range(4):
            slow = stack.enter_context(connect(server))
            slow.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert read_all(slow).endswith(b"1")
        server.get()
        assert time.monotonic() - began < 6


def test_silent_connections_are_closed_after_a_while(start):
    """They do not hold the worker for all of --graceful-timeout."""
    server = start("asgi").ready()
    with connect(server) as silent:
        server.get()
        server.send(signal.SIGTERM)
        assert read_all(silent) == b""
        assert server.end(10) == 0


def test_a_websocket_is_told_that_the_service_restarts(start):
    """Close code 1012, as uvicorn does."""
    websockets = pytest.importorskip("websockets.sync.client")
    server = start("asgi").ready()
    with websockets.connect(server.url.replace("http", "ws")) as websocket:
        server.send(signal.SIGTERM)
        with pytest.raises(Exception, match="1012"):
            websocket.recv(timeout=10)
    assert server.end() == 0
    assert "websocket websocket.disconnect 1012" in server.notes


# Recycling.


@BOTH
def test_max_requests_leaves_a_worker_that_is_ready(start, kind):
    """Two workers, each load takes a while; a new connection is answered at any time."""
    server = start(kind, "-w", "2", "--max-requests", "10", "--max-requests-jitter", "5")
    server.all_ready(2)
    server.tell(slow=1.0)
    first = {row[2] for row in server.rows()}
    with CountingClient(server.url, 2, keep_alive=False) as client:
        server.until(lambda: server.log.count("Autorestarting worker") >= 3, "three to go", 60)
        server.until(lambda: not any(map(alive, first)), "the first two to go", 60)
        times = sorted(_time_of(server) for _ in range(20))
    assert client.counts.failed == []
    # A load. A busy machine may delay some; a third would come while no worker is ready.
    assert times[-4] < 1.0


def _time_of(server):
    began = time.monotonic()
    assert server.get().text == "1"
    return time.monotonic() - began


def test_a_worker_that_grows_is_replaced(start):
    """HORNBEAM_MAX_RSS; the line in the log says how large it was."""
    server = start("asgi", env={"HORNBEAM_MAX_RSS": "300M"}).ready()
    before = server.rows()[0][2]
    for _ in range(5):
        server.try_get("/grow")
    server.logged(r"Autorestarting worker .*: \d{3} MiB are resident, HORNBEAM_MAX_RSS is 300 MiB")
    server.until(lambda: not alive(before), "it to go")
    assert server.ready().rows()[0][2] != before


def test_a_limit_that_is_no_size_is_refused(start):
    server = start("wsgi", env={"HORNBEAM_MAX_RSS": "much"})
    assert server.end() == 3
    server.logged("failed to boot: HORNBEAM_MAX_RSS='much': use a size")


# Slots.


def test_slots_spread_workers_over_gpus(start):
    """Two for each of two GPUs; one that replaces another gets its slot, and so its GPU."""
    server = start("wsgi", "-w", "3")
    server.all_ready(3)
    assert [row[0] for row in server.rows()] == [0, 1, 2]
    killed = server.rows()[1][2]
    os.kill(killed, signal.SIGKILL)
    server.until(lambda: [row[0] for row in server.rows()] == [0, 2, 1], "the slot to be taken")
    server.send(signal.SIGTTIN)
    server.all_ready(4)
    rows = server.rows()
    assert [row[0] for row in rows] == [0, 2, 1, 3]
    devices = {}  # by worker, as each one says

    def asked_all():
        pid, device = server.get("/device").text.split()
        devices[int(pid)] = device
        return len(devices) == 4

    server.until(asked_all, "an answer of each worker")
    assert devices == {row[2]: f"cuda:{row[0] % 2}" for row in rows}
    assert sorted(devices.values()) == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    server.send(signal.SIGTTOU)
    server.all_ready(3)
    assert [row[0] for row in server.rows()] == [2, 1, 3]


# --reload.


def test_reload_serves_what_is_in_the_file(start):
    """Good, broken, good again: the server outlives it, and shows the traceback meanwhile."""
    server = start("asgi", "--reload").ready()
    path = server._directory / "app.py"
    good = path.read_text()

    def write(text):
        written = path.with_suffix(".new")
        written.write_text(text)
        later = time.time() + 2 * len(server.log)  # a time no earlier version had
        os.utime(written, (later, later))
        written.replace(path)  # at once: a worker that reads half of it fails

    write("raise LookupError('half an edit')\n")
    broken = server.until(lambda: "half an edit" in server.try_get() and server.get(), "the error")
    assert broken.status_code == 500
    write(good.replace("return VERSION", "return 'better'"))
    server.until(lambda: server.try_get() == "better", "the better app")
    server.send(signal.SIGTERM)
    assert server.end() == 0
