"""Real gunicorn workers: statuses of errors, deadlines, clients that leave."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from gunicorn_process import Gunicorn, without

MODEL = """
import threading
from hornbeam_ml import Serving, Overloaded
from hornbeam_state import StoreUnavailable

seen, go = [], threading.Event()

def model(batch):
    seen.extend(batch)
    if "block" in batch:
        go.wait(30)
        go.clear()
    return batch

serving = Serving(lambda: model, name="echo", queue_limit=200)
tiny = Serving(lambda: model, name="tiny", batch_size=1, queue_limit=1)

def chunks(batch):
    for _ in range(3):
        yield batch

chunked = Serving(lambda: chunks)

def state():
    both = [serving.stats(), tiny.stats()]
    return {"seen": seen, "queued": sum(stats.queued for stats in both),
            "running": sum(stats.running for stats in both)}

def fail(kind):
    raise {"overloaded": Overloaded, "unavailable": StoreUnavailable}[kind]("secret")
"""

ASGI = """
from fastapi import BackgroundTasks, FastAPI, Request
from fastapi.responses import StreamingResponse
from model import *

app = FastAPI()

@app.get("/state")
async def get_state():
    return state()

@app.get("/clear")
async def clear():
    seen.clear()

@app.get("/go")
async def release():
    seen.clear()
    go.set()

@app.get("/run/{item}")
async def run(item: str):
    return await serving.arun(item)

@app.get("/sync/{item}")
def sync(item: str):
    return serving.run(item)

@app.post("/body/{item}")
async def body(item: str, request: Request):
    size = len(await request.body())
    await serving.arun(item)
    return size

@app.get("/tiny/{item}")
async def run_tiny(item: str):
    return await tiny.arun(item)

@app.get("/fail/{kind}")
def view(kind: str):
    fail(kind)

@app.get("/stream/{item}")
async def stream(item: str):
    async def body():
        yield await serving.arun(item)
        async for chunk in chunked.astream(item):
            yield chunk
    return StreamingResponse(body())

@app.get("/broken/{item}")
async def broken(item: str):
    async def body():
        yield item
        fail("overloaded")
    return StreamingResponse(body())

@app.get("/stubborn/{item}")
async def stubborn(item: str):
    for attempt in range(3):
        try:
            return await serving.arun(f"{item}-{attempt}")
        except Exception:
            seen.append("refused")

@app.get("/background/{item}")
async def background(item: str, tasks: BackgroundTasks):
    tasks.add_task(serving.arun, f"{item}-after")
    return item
"""

WSGI = """
from flask import Flask, jsonify
from model import *

app = Flask("app")

@app.get("/state")
def get_state():
    return jsonify(state())

@app.get("/go")
def release():
    seen.clear()
    go.set()
    return jsonify(None)

@app.get("/run/<item>")
def run(item):
    return jsonify(serving.run(item))

@app.get("/tiny/<item>")
def run_tiny(item):
    return jsonify(tiny.run(item))

@app.get("/fail/<kind>")
def view(kind):
    fail(kind)
"""


class Service:
    """A server of one of the apps above, whose model can be held."""

    def __init__(self, server):
        self.server = server
        self.host, _, port = server.url.removeprefix("http://").partition(":")
        self.port = int(port)
        self._client = server.client(timeout=30)
        self._threads = ThreadPoolExecutor(20)

    def get(self, path, **headers):
        """Send a request; return the answer."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return self._client.get(path, headers=headers)

    def later(self, path):
        """Send a request; return a future of the answer."""
        return self._threads.submit(self.get, path)

    def connect(self, *paths):
        """Send requests over one connection; return it."""
        connection = socket.create_connection((self.host, self.port), timeout=30)
        for path in paths:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        return connection

    def reaches(self, **expected):
        """Wait until the state is like that; return what ran so far."""

        def reached():
            state = self.get("/state").json()
            return state if expected.items() <= state.items() else None

        return self.server.until(reached, str(expected))["seen"]

    def _blocks(self):
        """Tell whether the model has noted `block`, so that it is not in what is seen later."""
        state = self.get("/state").json()
        return state["running"] == 1 and "block" in state["seen"]

    @contextlib.contextmanager
    def held(self, path="/run/block"):
        """Keep the model busy; afterwards `seen` has what ran since."""
        self.reaches(queued=0, running=0)
        blocking = self.later(path)
        self.server.until(self._blocks, "the model to be busy")
        yield
        self.get("/go")
        assert blocking.result().status_code == 200

    def close(self):
        self._threads.shutdown()
        self._client.close()


def serve(directory, app, **env):
    (directory / "model.py").write_text(textwrap.dedent(MODEL))
    (directory / "app.py").write_text(textwrap.dedent(app))
    # Kept connections outlast every test: one that is closed just now would lose its request.
    with Gunicorn("app:app", "--keep-alive", "60", cwd=directory, env=env) as server:
        server.logged("Ready:")
        service = Service(server)
        yield service
        service.close()


@pytest.fixture(scope="module")
def httptools(tmp_path_factory):
    """A FastAPI app."""
    yield from serve(tmp_path_factory.mktemp("httptools"), ASGI)


@pytest.fixture(scope="module")
def h11(tmp_path_factory):
    """The same where httptools is not installed."""
    directory = tmp_path_factory.mktemp("h11")
    yield from serve(directory, ASGI, PYTHONPATH=without(directory, "httptools"))


@pytest.fixture(scope="module")
def wsgi(tmp_path_factory):
    """A Flask app."""
    yield from serve(tmp_path_factory.mktemp("wsgi"), WSGI)


@pytest.fixture(params=["httptools", "h11"])
def asgi(request):
    """A FastAPI app, with each parser that uvicorn has."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["httptools", "wsgi"])
def either(request):
    """Apps of both interfaces."""
    return request.getfixturevalue(request.param)


# Both interfaces.


def test_errors_have_their_status_without_any_handler(either):
    for kind in ("overloaded", "unavailable"):
        response = either.get(f"/fail/{kind}")
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert "secret" not in response.text
    assert "Traceback" not in either.server.log


def test_a_full_queue_is_refused(either):
    with either.held("/tiny/block"):
        waiting = either.later("/tiny/waiting")
        either.reaches(queued=1)
        response = either.get("/tiny/refused")
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
    assert waiting.result().json() == "waiting"
    assert "refused" not in either.reaches(queued=0, running=0)


def test_the_header_sets_a_deadline(either):
    with either.held():
        started = time.monotonic()
        response = either.get("/run/late", x_request_timeout_ms="100")
        assert response.status_code == 504
        assert time.monotonic() - started < 10
        either.reaches(queued=0)
    assert either.get("/run/quick", x_request_timeout_ms="10000").json() == "quick"
    assert either.reaches(queued=0, running=0) == ["quick"]


def test_a_header_that_makes_no_sense_is_refused(either):
    response = either.get("/run/x", x_request_timeout_ms="soon")
    assert response.status_code == 400
    assert "X-Request-Timeout-Ms" in response.json()["detail"]


# Clients that leave.


def close(connection):
    connection.close()


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def half_close(connection):
    connection.shutdown(socket.SHUT_WR)


LEAVING = [close, reset, half_close]


def read_until(connection, text):
    """Read until a text has come, and return everything."""
    data = b""
    while text not in data:
        part = connection.recv(65536)
        assert part, data
        data += part
    return data


def answer(connection):
    """Return the item in the one response that a connection gets."""
    with connection:
        head, _, body = read_until(connection, b'\r\n\r\n"').partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        while body.count(b'"') < 2:
            body += connection.recv(65536)
        return body.decode().strip('"')


def test_half_of_the_clients_leave(asgi):
    """Nothing runs for a client that left before its batch began; everybody else is served."""
    chosen = random.Random(5)
    with asgi.held():
        clients = {}
        for number in range(60):
            item = f"item-{number}"
            clients[item] = asgi.connect(f"/{chosen.choice(['run', 'sync', 'stubborn'])}/{item}")
        asgi.reaches(queued=60)
        gone = chosen.sample(sorted(clients), 30)
        for item in gone:
            leave = chosen.choice(LEAVING)
            leave(clients[item])
        asgi.reaches(queued=30)
    stayed = sorted(clients.keys() - set(gone))
    assert [answer(clients[item]).removesuffix("-0") for item in stayed] == stayed
    ran = asgi.reaches(queued=0, running=0)
    ours = [item for item in ran if item.startswith("item-")]  # others' may have run late
    assert sorted(item.removesuffix("-0") for item in ours) == stayed
    for item in gone:
        clients[item].close()
    assert "Traceback" not in asgi.server.log


@pytest.mark.parametrize("leave", LEAVING)
@pytest.mark.parametrize("kind", ["run", "sync", "stream"])
def test_what_waits_for_a_client_that_leaves_is_taken_back(asgi, kind, leave):
    with asgi.held():
        connection = asgi.connect(f"/{kind}/gone")
        asgi.reaches(queued=1)
        leave(connection)
        asgi.reaches(queued=0)
    assert asgi.reaches(running=0) == []
    connection.close()
    assert "Traceback" not in asgi.server.log


def test_an_endpoint_that_swallows_the_error_starts_nothing_else(asgi):
    with asgi.held():
        connection = asgi.connect("/stubborn/gone")
        asgi.reaches(queued=1)
        connection.close()
        asgi.reaches(queued=0)
        refused = ["refused"] * 3
        asgi.server.until(lambda: asgi.get("/state").json()["seen"][-3:] == refused, "refusals")


def test_a_later_request_of_a_connection(asgi):
    connection = asgi.connect("/run/first")
    read_until(connection, b'"first"')
    with asgi.held():
        connection.sendall(b"GET /run/second HTTP/1.1\r\nHost: x\r\n\r\n")
        asgi.reaches(queued=1)
        connection.close()
        asgi.reaches(queued=0)
    assert asgi.reaches(running=0) == []


def test_pipelined_requests(asgi):
    with asgi.held():
        connection = asgi.connect("/run/first", "/run/second", "/run/third")
        asgi.reaches(queued=1)
        connection.close()
        asgi.reaches(queued=0)
    assert asgi.reaches(running=0) == []
    connection = asgi.connect("/run/first", "/run/second")
    data = read_until(connection, b'"second"')
    assert data.index(b'"first"') < data.index(b'"second"')
    connection.close()


def test_a_large_body_does_not_hide_that_the_client_left(asgi):
    """uvicorn stops reading while a body of more than 64 KiB waits for the app."""
    with asgi.held():
        connection = socket.create_connection((asgi.host, asgi.port), timeout=30)
        size = 1_000_000
        head = f"POST /body/gone HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n"
        connection.sendall(head.encode())
        connection.sendall(b"x" * size)
        asgi.reaches(queued=1)
        connection.close()
        asgi.reaches(queued=0)
    assert asgi.reaches(running=0) == []
    whole = httpx.post(f"{asgi.server.url}/body/there", content=b"x" * size, timeout=30)
    assert whole.json() == size


def test_a_client_that_leaves_in_the_middle_of_its_body(asgi):
    asgi.reaches(queued=0, running=0)
    asgi.get("/clear")
    connection = socket.create_connection((asgi.host, asgi.port), timeout=30)
    connection.sendall(b"POST /body/gone HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
    connection.close()
    assert asgi.get("/run/next").json() == "next"
    assert asgi.reaches(queued=0, running=0) == ["next"]


def test_background_tasks_are_bound_to_nothing(asgi):
    """Neither a deadline that passes nor a client that leaves after its answer stops them."""
    with asgi.held():
        connection = socket.create_connection((asgi.host, asgi.port), timeout=30)
        head = b"GET /background/job HTTP/1.1\r\nHost: x\r\nX-Request-Timeout-Ms: 200\r\n\r\n"
        connection.sendall(head)
        read_until(connection, b'"job"')
        asgi.reaches(queued=1)
        connection.close()
        time.sleep(0.3)
        asgi.reaches(queued=1)
    asgi.reaches(queued=0, running=0, seen=["job-after"])


def test_an_error_after_the_start_breaks_the_connection(asgi):
    with pytest.raises(httpx.RemoteProtocolError):
        asgi.get("/broken/item")


def test_an_app_that_started_while_it_was_imported_is_served_all_the_same(tmp_path):
    """Its own errors stay 500, and a line in the log says why."""
    started = "app.middleware_stack = app.build_middleware_stack()"
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "app.py").write_text(f"{ASGI}\n{started}")
    with Gunicorn("app:app", cwd=tmp_path) as server:
        server.ready()
        assert server.get("/fail/overloaded").status_code == 500
        assert server.get("/run/x").json() == "x"
        assert "install_error_handlers: the app has started" in server.log
