"""Corner cases of the ASGI lifespan, as gunicorn publishes them: real workers."""

from __future__ import annotations

import re
import signal
from textwrap import dedent

import pytest
from gunicorn_process import Gunicorn

APP = """
import asyncio
from bare_asgi import respond

STARTUP, SHUTDOWN, FAILED = "lifespan.startup", "lifespan.shutdown", ".failed"

async def app(scope, receive, send):
    if scope["type"] != "lifespan":
        return await respond(send, str(scope.get("state", "no state")).encode())
    assert (await receive())["type"] == STARTUP
    try:
        await lifespan(scope, receive, send)
    finally:
        print("LIFESPAN OVER", flush=True)

"""


@pytest.fixture
def serve(tmp_path):
    """Start a server of an app with a lifespan function like this."""

    def start(lifespan, *options):
        indented = "async def lifespan(scope, receive, send):\n" + dedent(lifespan).replace(
            "\n", "\n    "
        )
        (tmp_path / "app.py").write_text(APP + indented)
        return Gunicorn("app:app", *options, cwd=tmp_path)

    return start


COMPLETE = 'await send({"type": STARTUP + ".complete"})'
FAIL = 'await send({"type": STARTUP + FAILED, "message": "no database"})'
RAISE = 'raise ValueError("no database")'


@pytest.mark.parametrize("mode", ["auto", "on"])
@pytest.mark.parametrize("after", ["return", RAISE], ids=["return", "raise"])
def test_a_startup_that_failed_stops_the_server_with_its_message(serve, mode, after):
    with serve(f"\n{FAIL}\n{after}", "--asgi-lifespan", mode) as server:
        assert server.end() == 3
        assert "no database" in server.log
        assert "Worker failed to boot: the app's lifespan startup failed" in server.log


def test_a_startup_that_raises_under_on_stops_the_server(serve):
    with serve(f"\n{RAISE}", "--asgi-lifespan", "on") as server:
        assert server.end() == 3
        assert "ValueError: no database" in server.log
        assert "Worker failed to boot" in server.log


@pytest.mark.parametrize(
    ("lifespan", "mode", "state"),
    [
        pytest.param(RAISE, "auto", "{}", id="unsupported"),
        pytest.param(RAISE, "off", "{}", id="never asked"),
        pytest.param("return", "auto", "{}", id="returns at once"),
        pytest.param(f'scope["state"]["a"] = 1\n{COMPLETE}', "on", "{'a': 1}", id="complete, over"),
        pytest.param(f"{COMPLETE}\n{RAISE}", "auto", "{}", id="raises when complete"),
    ],
)
def test_what_serves_all_the_same(serve, lifespan, mode, state):
    with serve(f"\n{lifespan}", "--asgi-lifespan", mode) as server:
        server.logged("Ready:")
        assert server.get().text == state
        server.send(signal.SIGTERM)
        assert server.end() == 0


def test_the_state_of_a_request_is_its_own_copy(serve):
    with serve(f'\nscope["state"]["all"] = []\n{COMPLETE}') as server:
        server.logged("Ready:")
        assert {server.get().text for _ in range(3)} == {"{'all': []}"}


def test_a_startup_without_end_is_ended_like_any_boot(serve, tmp_path):
    (tmp_path / "gunicorn.conf.py").write_text(
        "import hornbeam_ml.worker\nhornbeam_ml.worker.BOOT_LIMIT_S = 1\ntimeout = 1\n"
    )
    with serve("\nawait asyncio.sleep(3600)") as server:
        server.logged("WORKER TIMEOUT")
        assert "Ready:" not in server.log


TASK = f"""
async def work():
    try:
        while True:
            print("WORKING", flush=True)
            await asyncio.sleep(0.05)
    finally:
        print("WORK ENDED", flush=True)

task = asyncio.create_task(work())
{COMPLETE}
await receive()
await send({{"type": SHUTDOWN + ".complete"}})
"""


def test_tasks_of_the_lifespan_go_on_until_the_end(serve):
    with serve(TASK) as server:
        server.logged("Ready:")
        server.logged(r"(?s)Ready:.*WORKING.*WORKING")
        server.send(signal.SIGTERM)
        assert server.end() == 0
        assert re.search(r"(?s)LIFESPAN OVER.*WORK ENDED", server.log)


def test_a_shutdown_that_failed_is_logged(serve):
    failed = f"""
{COMPLETE}
await receive()
await send({{"type": SHUTDOWN + FAILED, "message": "cannot flush"}})
await asyncio.sleep(3600)
"""
    with serve(failed) as server:
        server.logged("Ready:")
        server.send(signal.SIGTERM)
        assert server.end() == 0
        assert "cannot flush" in server.log


def test_a_certificate_that_is_none_is_one_line(serve, tmp_path):
    (tmp_path / "none.pem").write_text("nothing of use")
    with serve(f"\n{COMPLETE}", "--certfile", "none.pem", "--keyfile", "none.pem") as server:
        assert server.end() == 3
        assert "Worker failed to boot: certfile='none.pem', keyfile='none.pem': " in server.log
        assert "ssl.py" not in server.log
