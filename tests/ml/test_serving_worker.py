"""Servings in a real gunicorn: loaded before the first request, batches across requests."""

from __future__ import annotations

import signal
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
from gunicorn_process import Gunicorn

APP = """
import json, os, threading, time, urllib.parse
from bare_asgi import live, respond
from hornbeam_ml import Serving, apredict, predict

loaded_in, started, go = [], threading.Event(), threading.Event()

def load():
    loaded_in.append(os.getpid())
    time.sleep(0.3)
    def model(batch):
        if batch == ["first"]:
            started.set()
            go.wait(60)
        return [len(batch)] * len(batch)
    return model

serving = Serving(load, name="sizes", warmup="warm-up", batch_size=8)
unnamed = Serving(lambda: lambda batch: batch)

def answer(path, result):
    if path == "/state":
        stats = serving.stats()
        ready = [serving.ready, unnamed.ready]
        return json.dumps([os.getpid(), loaded_in, ready, [stats.running, stats.queued]])
    if path == "/go":
        go.set()
    return json.dumps(result)

def wsgi(environ, start_response):
    path = environ["PATH_INFO"]
    item = path.removeprefix("/item/")
    body = answer(path, predict("sizes", item) if path != item else None).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]

async def asgi(scope, receive, send):
    if scope["type"] == "lifespan":
        return await live(receive, send)
    path = scope["path"]
    item = path.removeprefix("/item/")
    result = await apredict("sizes", item) if path != item else None
    await respond(send, answer(path, result).encode())
"""


@pytest.mark.parametrize("kind", ["wsgi", "asgi"])
def test_it_is_loaded_before_the_first_request_and_batches_requests(tmp_path, kind):
    (tmp_path / "app.py").write_text(textwrap.dedent(APP))
    with Gunicorn(f"app:{kind}", cwd=tmp_path) as server, ThreadPoolExecutor(8) as pool:
        server.logged("Ready:")

        def counts(running, queued):
            def reached():
                return server.get("/state").json()[-1] == [running, queued]

            server.until(reached, f"{running} running, {queued} queued")

        pid, loaded_in, ready, _ = server.get("/state").json()
        assert loaded_in == [pid]
        assert ready == [True, True]
        first = pool.submit(server.get, "/item/first")
        counts(1, 0)
        rest = []
        for number in range(1, 5):
            rest.append(pool.submit(server.get, f"/item/{number}"))
            counts(1, number)
        server.get("/go")
        assert first.result().json() == 1
        assert [call.result().json() for call in rest] == [4, 4, 4, 4]
        server.send(signal.SIGTERM)
        assert server.end() == 0
        assert "Traceback" not in server.log


def test_a_serving_that_fails_to_load_stops_the_server_with_one_line(tmp_path):
    code = APP.replace("time.sleep(0.3)", "raise OSError('no such weights')")
    (tmp_path / "app.py").write_text(code)
    with Gunicorn("app:wsgi", cwd=tmp_path) as server:
        assert server.end() == 3
        assert "serving 'sizes' failed to load: OSError: no such weights" in server.log
