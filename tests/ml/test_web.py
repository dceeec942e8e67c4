"""The pages about hornbeam itself, under ASGI and under WSGI."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fastapi import FastAPI
from flask import Flask
from serving_helpers import until
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from hornbeam_ml import (
    ModelError,
    Serving,
    asgi_app,
    cached_inference,
    get_model,
    readiness,
    register_model,
    wsgi_app,
)
from hornbeam_ml.web import figures
from hornbeam_ml.web.access import is_allowed
from hornbeam_state import ConfigError, Store, open_store, set_default_store
from hornbeam_state.testing import FaultyBackend

PAGES = ("/cache_stats", "/healthz", "/readyz", "/stats")


class Visitor:
    """Asks for pages through one kind of app."""

    def __init__(self, kind):
        self.kind = kind

    def app(self):
        return asgi_app() if self.kind == "asgi" else wsgi_app()

    async def __call__(self, method, path, *, app=None, **options):
        app = app or self.app()
        if self.kind == "asgi":
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **options)
        with httpx.Client(transport=httpx.WSGITransport(app), base_url="http://test") as client:
            return client.request(method, path, **options)


@pytest.fixture(params=["asgi", "wsgi"])
def get(request):
    """Ask for a page through either kind of app."""
    return Visitor(request.param)


@pytest.fixture
def store_down(store):
    """Have every call of the store fail."""
    faulty = FaultyBackend(store.backend)
    previous = set_default_store(Store(store.config, backend=faulty))
    with faulty.outage():
        yield
    set_default_store(previous)


async def test_cache_stats_are_json(get):
    """The figures of cache_stats, of all or of one prefix."""
    cached_inference(abs, -1)
    cached_inference(abs, -1)
    cached_inference(abs, -1, cache_prefix="other")
    answer = await get("GET", "/cache_stats")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert (answer.json()["hits"], answer.json()["misses"]) == (1, 2)
    answer = await get("GET", "/cache_stats?prefix=other")
    assert (answer.json()["hits"], answer.json()["misses"]) == (0, 1)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        pytest.param("GET", "/nothing", 404, id="unknown page"),
        pytest.param("POST", "/cache_stats", 405, id="not a GET"),
        pytest.param("DELETE", "/healthz", 405, id="not a GET of a probe"),
        pytest.param("GET", "/cache_stats?prefix=%1f", 400, id="a prefix that makes no sense"),
    ],
)
async def test_mistakes_are_told_in_json(get, method, path, status):
    """A clear status and message, never a traceback."""
    answer = await get(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]


@pytest.mark.parametrize("path", ["/", "", "/nothing", "/healthz/more"])
async def test_an_unknown_page_lists_the_pages(get, path):
    answer = await get("GET", path)
    assert answer.status_code == 404
    assert all(page in answer.json()["error"] for page in PAGES)


@pytest.mark.parametrize("path", PAGES)
async def test_head_has_no_body(get, path):
    """HEAD answers with the headers of GET."""
    answer = await get("HEAD", path)
    assert (answer.status_code, answer.content) == (200, b"")
    assert int(answer.headers["content-length"]) > 0


async def test_a_store_that_is_down_is_a_503(get, tmp_path):
    """Retry later, says the answer, and not more."""
    (tmp_path / "file").write_text("")
    previous = set_default_store(open_store(f"lmdb://{tmp_path}/file/store"))
    try:
        answer = await get("GET", "/cache_stats")
    finally:
        set_default_store(previous)
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert str(tmp_path) not in answer.text


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/stats"])
async def test_pages_that_need_no_store_answer_without_one(get, store_down, path):
    assert (await get("GET", path)).status_code == 200


# Probes


async def test_healthz_answers_while_the_process_does(get):
    """Whether it is ready or not."""
    readiness.register("test", lambda: "no")
    try:
        answer = await get("GET", "/healthz")
    finally:
        readiness.unregister("test")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


async def test_readyz_says_why_not(get):
    """A probe begins the load, and a later one finds it done."""
    gate = threading.Event()
    register_model("slow", lambda: gate.wait(20))
    answer = await get("GET", "/readyz")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.json() == {"ready": False, "reasons": ["model 'slow' is not loaded"]}
    gate.set()
    get_model("slow")
    answer = await get("GET", "/readyz")
    assert (answer.status_code, answer.json()) == (200, {"ready": True, "reasons": []})


async def test_readyz_of_a_worker_that_leaves_is_a_503(get):
    readiness.drain()
    try:
        answer = await get("GET", "/readyz")
    finally:
        readiness.serve()
    assert answer.status_code == 503
    assert answer.json()["reasons"] == ["the worker is about to end"]


async def test_readyz_shows_nothing_of_errors(get):
    """The message of an exception may contain anything."""

    def load():
        raise OSError("password")

    register_model("secret", load)
    with pytest.raises(ModelError):
        get_model("secret")
    answer = await get("GET", "/readyz")
    assert answer.status_code == 503
    assert "password" not in answer.text


async def test_probes_wait_for_no_thread():
    """Every thread of the loop may wait for a store that is down."""
    loop, gate = asyncio.get_running_loop(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        loop.set_default_executor(pool)
        busy = asyncio.create_task(asyncio.to_thread(gate.wait, 20))
        await asyncio.sleep(0)
        visitor = Visitor("asgi")
        try:
            for path in ("/healthz", "/readyz"):
                answer = await asyncio.wait_for(visitor("GET", path), 10)
                assert answer.status_code == 200
        finally:
            gate.set()
            await busy


# Figures


async def test_stats_tell_what_this_worker_has(get):
    register_model("cold", lambda: 1)
    register_model("warm", lambda: 1)
    get_model("warm")
    with Serving(lambda: list, name="sorts", batch_keys=[1, ("a", "b")]) as serving:
        serving.run("x", key=("a", "b"))
        until(lambda: serving.ready, "it idles")
        shown = (await get("GET", "/stats")).json()
    worker = shown["worker"]
    assert (worker["pid"], worker["phase"]) == (os.getpid(), "serving")
    assert worker["reasons"] == ["model 'cold' is not loaded"]
    assert 0 < worker["uptime_s"] < 24 * 3600
    assert worker["memory"]["rss_bytes"] >= worker["memory"]["uss_bytes"] > 1e6
    models = {model["name"]: model for model in shown["models"]}
    assert (models["cold"]["loaded"], models["cold"]["load"]) == (False, None)
    assert models["warm"]["loaded"]
    assert set(models["warm"]["load"]) == {"seconds", "memory"}
    [figures_] = shown["servings"]
    assert (figures_["name"], figures_["ready"], figures_["items"]) == ("sorts", True, 1)
    assert {"key": "('a', 'b')", "queued": 0, "batches": 1, "items": 1} in figures_["keys"]
    assert [set(load["memory"]) for load in figures_["loads"]] == [
        {"rss_bytes", "pss_bytes", "uss_bytes"}
    ]


async def test_without_a_server_this_process_is_the_only_worker(get):
    [worker] = (await get("GET", "/stats")).json()["workers"]
    assert (worker["pid"], worker["state"], worker["generation"]) == (os.getpid(), "serving", None)
    assert worker["rss_bytes"] >= worker["pss_bytes"] > 1e6


async def test_the_workers_of_a_server_are_those_of_its_board(get, monkeypatch):
    """One that has ended meanwhile has no memory any more."""
    monkeypatch.setattr(figures, "_workers", figures._workers)  # as it was, in the end
    board = [
        {"pid": os.getpid(), "state": "serving", "generation": 2},
        {"pid": 2**22 + 1, "state": "leaving", "generation": 1},  # more than a pid can be
    ]
    figures.show_workers(lambda: board)
    here, gone = (await get("GET", "/stats")).json()["workers"]
    assert here["generation"] == 2
    assert here["pss_bytes"] > 0
    assert gone == {**board[1], "rss_bytes": None, "pss_bytes": None}


# Tokens and mounts


@pytest.mark.parametrize(
    ("header", "status"),
    [
        pytest.param(None, 401, id="none"),
        pytest.param("", 401, id="empty"),
        pytest.param("Bearer", 401, id="a scheme alone"),
        pytest.param("Bearer ", 401, id="an empty token"),
        pytest.param("Bearer s3cre", 401, id="its beginning"),
        pytest.param("Bearer s3cret ", 200, id="a space behind"),
        pytest.param("Bearer s3cret2", 401, id="more than it"),
        pytest.param("Basic s3cret", 401, id="another scheme"),
        pytest.param("s3cret", 401, id="no scheme"),
        pytest.param("Bearer s3cret", 200, id="right"),
        pytest.param("bearer s3cret", 200, id="right, the scheme in lower case"),
    ],
)
async def test_with_a_token_most_pages_need_it(get, monkeypatch, header, status):
    monkeypatch.setenv("HORNBEAM_ADMIN_TOKEN", "s3cret")
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    for path in ("/stats", "/cache_stats"):
        answer = await get("GET", path, headers=headers)
        assert answer.status_code == status
        assert answer.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)
    for path in ("/healthz", "/readyz"):
        assert (await get("GET", path, headers=headers)).status_code == 200
    assert (await get("GET", "/nothing", headers=headers)).status_code in (401, 404)


def test_a_header_may_hold_any_bytes():
    assert not is_allowed("s3cret", "Bearer \xe4")
    assert not is_allowed("s3cret", "Bearer \u20ac")


@pytest.mark.parametrize("token", ["", " ", "two words", "line\n", "ümlaut"])
def test_a_token_that_cannot_be_sent_is_refused(get, monkeypatch, token):
    """An empty one too: it is more likely a secret that is missing than a wish for none."""
    monkeypatch.setenv("HORNBEAM_ADMIN_TOKEN", token)
    with pytest.raises(ConfigError, match="HORNBEAM_ADMIN_TOKEN") as refused:
        get.app()
    assert not token.strip() or token not in str(refused.value)


async def test_they_are_mounted_in_apps(get):
    """As the docstrings say."""
    if get.kind == "asgi":
        app = FastAPI()
        app.mount("/hornbeam", asgi_app())
    else:
        app = DispatcherMiddleware(Flask(__name__), {"/hornbeam": wsgi_app()})
    for path in PAGES:
        assert (await get("GET", f"/hornbeam{path}", app=app)).status_code == 200
    assert (await get("GET", "/stats", app=app)).status_code == 404
