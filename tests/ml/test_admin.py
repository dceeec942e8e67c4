"""The pages in front of the app of a worker."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from gunicorn_process import Gunicorn

from hornbeam_ml.web.admin import path_from, with_pages
from hornbeam_state import ConfigError

APP = """
import asyncio, pathlib, time
from bare_asgi import live, respond
from hornbeam_ml import Serving, readiness

serving = Serving(lambda: list, name="sorts")
here = pathlib.Path(__file__).parent

def leave():
    here.joinpath("started").touch()
    deadline = time.monotonic() + 20
    while readiness.phase() == "serving" and time.monotonic() < deadline:
        time.sleep(0.01)
    return f"{readiness.phase()}: {len(readiness.reasons())} reason".encode()

def body_of(path):
    if path == "/leave":
        return leave()
    return f"the app: {path}".encode()

def wsgi(environ, start_response):
    body = body_of(environ["PATH_INFO"])
    start_response("418 I'm a teapot", [("Content-Length", str(len(body)))])
    return [body]

async def asgi(scope, receive, send):
    if scope["type"] == "lifespan":
        return await live(receive, send)
    await respond(send, await asyncio.to_thread(body_of, scope["path"]), 418)

def asgi2(scope):
    async def run(receive, send):
        await asgi(scope, receive, send)
    return run
"""
ENVIRONMENT = {"HORNBEAM_ADMIN_PATH": "/_hornbeam", "HORNBEAM_ADMIN_TOKEN": "s3cret"}
KNOWN = {"authorization": "Bearer s3cret"}


# Settings


@pytest.mark.parametrize(
    ("value", "path"),
    [
        pytest.param(None, None, id="not set"),
        pytest.param("", None, id="empty"),
        pytest.param("/_hornbeam", "/_hornbeam", id="a path"),
        pytest.param(" /_hornbeam/ ", "/_hornbeam", id="a slash behind"),
        pytest.param("/.well-known/x-y_z~1.0", "/.well-known/x-y_z~1.0", id="deeper"),
    ],
)
def test_a_path_is_read(value, path):
    assert path_from({} if value is None else {"HORNBEAM_ADMIN_PATH": value}) == path


@pytest.mark.parametrize(
    "value",
    ["/", "//", "hornbeam", "/a//b", "/a/..", "/./a", "/a b", "/ä", "/a?b", "/a#b", "/{x}", "/%61"],
)
def test_a_path_that_makes_no_sense_is_refused(value):
    with pytest.raises(ConfigError, match="HORNBEAM_ADMIN_PATH"):
        path_from({"HORNBEAM_ADMIN_PATH": value})


@pytest.mark.parametrize("interface", ["wsgi", "asgi2", "asgi3"])
def test_without_a_path_the_app_is_untouched(interface):
    """So requests cost nothing."""
    app = object()
    assert with_pages(app, interface, {}) == (app, interface)


# Paths


async def visit(kind, path, root):
    """Ask an app that is mounted at `root` for the path, under ASGI and WSGI as servers say it."""

    async def asgi_app(scope, receive, send):
        await send({"type": "http.response.start", "status": 418, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def wsgi_app(environ, start_response):
        start_response("418 I'm a teapot", [])
        return []

    if kind == "asgi":
        app, _ = with_pages(asgi_app, "asgi3", ENVIRONMENT)
        transport = httpx.ASGITransport(app, root_path=root)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return (await client.get(root + path)).status_code
    app, _ = with_pages(wsgi_app, "wsgi", ENVIRONMENT)
    transport = httpx.WSGITransport(app, script_name=root)
    with httpx.Client(transport=transport, base_url="http://test") as client:
        return client.get(path).status_code


@pytest.mark.parametrize("kind", ["asgi", "wsgi"])
@pytest.mark.parametrize("root", ["", "/api"])
@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/_hornbeam/healthz", 200),
        ("/_hornbeam/stats", 401),
        ("/_hornbeam", 401),
        ("/_hornbeam/", 401),
        ("/_hornbeamer", 418),
        ("/_hornbea", 418),
        ("/x/_hornbeam/healthz", 418),
        ("/healthz", 418),
        ("/", 418),
    ],
)
async def test_only_what_is_below_the_path_is_the_pages(kind, root, path, status):
    """The path is one of the app's own, wherever that is mounted."""
    assert await visit(kind, path, root) == status


# Under a real server


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    made = tmp_path_factory.mktemp("admin")
    (made / "app.py").write_text(APP)
    return made


@pytest.fixture(scope="module", params=["wsgi", "asgi", "asgi2"])
def server(request, directory):
    """A server of an app of each kind, with the pages."""
    with Gunicorn(f"app:{request.param}", cwd=directory, env=ENVIRONMENT) as started:
        started.logged("Ready: ")
        yield started


def test_the_app_and_the_pages_share_a_server(server):
    """Middleware and routes of the app see nothing of the pages."""
    assert server.get("/x").text == "the app: /x"
    assert server.get("/_hornbeam/healthz").json() == {"status": "ok"}
    answer = server.get("/_hornbeam/readyz")
    assert (answer.status_code, answer.json()) == (200, {"ready": True, "reasons": []})


def test_a_server_shows_its_figures_to_those_who_have_the_token(server):
    assert server.get("/_hornbeam/stats").status_code == 401
    with server.client() as client:
        shown = client.get("/_hornbeam/stats", headers=KNOWN).json()
    assert {shown["worker"]["pid"]} == server.workers()
    assert shown["worker"]["phase"] == "serving"
    [serving] = shown["servings"]
    assert (serving["name"], serving["ready"]) == ("sorts", True)
    assert serving["loads"][0]["seconds"] > 0


@pytest.mark.parametrize("method", ["HEAD", "POST"])
def test_other_methods_keep_the_connection_usable(server, method):
    """The body of a POST that nobody reads is not taken for the next request."""
    with server.client() as client:
        for _ in range(3):
            answer = client.request(method, "/_hornbeam/healthz", content=b"x" * 1000)
            assert answer.status_code == (200 if method == "HEAD" else 405)
        assert client.get("/x").text == "the app: /x"


@pytest.mark.parametrize(
    ("name", "value"), [("HORNBEAM_ADMIN_PATH", "hornbeam"), ("HORNBEAM_ADMIN_TOKEN", "a b")]
)
def test_a_setting_that_makes_no_sense_stops_the_boot(directory, name, value):
    """Before anything is served, with one line that says what to write."""
    with Gunicorn("app:wsgi", cwd=directory, env={name: value}) as refused:
        assert refused.end() != 0
        assert f"Worker failed to boot: {name}" in refused.log
        assert value not in refused.log or name == "HORNBEAM_ADMIN_PATH"


@pytest.mark.parametrize("kind", ["wsgi", "asgi"])
def test_a_worker_that_is_asked_to_stop_is_leaving(directory, kind):
    """While it finishes what it has, which sees it."""
    started = directory / "started"
    started.unlink(missing_ok=True)
    with Gunicorn(f"app:{kind}", cwd=directory, env=ENVIRONMENT) as server:
        server.logged("Ready: ")
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(server.get, "/leave")
            server.until(started.exists, "a request runs")
            [worker] = server.workers()
            os.kill(worker, signal.SIGTERM)
            assert answer.result().text == "draining: 1 reason"
