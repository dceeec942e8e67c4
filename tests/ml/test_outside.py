"""The same small app without gunicorn: plain uvicorn, Flask's client, a script, pytest."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from gunicorn_process import DECIDING, ROOT, poll

# Batches of exactly four: the timer is longer than any test.
APP = """
import threading
from hornbeam_ml import Serving, acached_inference, asgi_app, cached_inference, get_model, register_model
from hornbeam_state import astate_incr, state_incr

loads, calls, batches = [], [], []

def load():
    loads.append("double")
    return double_all

def double_all(items):
    batches.append(len(items))
    return [2 * item for item in items]

double = Serving(load, name="double", batch_size=4, batch_timeout_ms=60_000)

def load_words():
    loads.append("words")
    return str.upper

register_model("words", load_words)

def shout(text):
    calls.append(text)
    return get_model("words")(text)

def facts():
    return {"loads": loads, "calls": calls, "batches": batches}
"""
ASGI = """
from fastapi import FastAPI
from app import *

app = FastAPI()
app.mount("/hornbeam", asgi_app())

@app.get("/count")
async def count():
    return await astate_incr("requests")

@app.get("/double")
async def doubled(item: int):
    return await double.arun(item)

@app.get("/shout")
async def shouted(text: str):
    return await acached_inference(shout, text, version=1)

@app.get("/facts")
def what_happened():
    return facts()
"""
WSGI = """
from flask import Flask, jsonify, request
from app import *

app = Flask(__name__)

@app.get("/count")
def count():
    return jsonify(state_incr("requests"))

@app.get("/double")
def doubled():
    return jsonify(double.run(int(request.args["item"])))

@app.get("/shout")
def shouted():
    return jsonify(cached_inference(shout, request.args["text"], version=1))

@app.get("/facts")
def what_happened():
    return jsonify(facts())
"""


@pytest.fixture
def run(tmp_path):
    """Start Python with some arguments beside the app; end what still runs with the test."""
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "asgi.py").write_text(ASGI)
    (tmp_path / "wsgi.py").write_text(WSGI)
    inherited = {name: value for name, value in os.environ.items() if not DECIDING.match(name)}
    started = []

    def start(*arguments, output=subprocess.PIPE):
        started.append(
            subprocess.Popen(
                [sys.executable, *arguments],
                cwd=tmp_path,
                env={**inherited, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def check_the_app(get):
    """State counts, results are cached, models are loaded once, concurrent calls share a batch."""
    assert [get("/count") for _ in range(3)] == [1, 2, 3]
    assert [get("/shout?text=hello") for _ in range(3)] == ["HELLO"] * 3
    with ThreadPoolExecutor(4) as pool:
        doubled = list(pool.map(lambda item: get(f"/double?item={item}"), range(4)))
    assert doubled == [0, 2, 4, 6]
    facts = get("/facts")
    assert (facts["calls"], facts["batches"]) == (["hello"], [4])
    assert sorted(facts["loads"]) == ["double", "words"]


# uvicorn


def test_under_plain_uvicorn(run, tmp_path):
    """A probe of readiness has the models loaded; what was cached and counted is on the disk."""
    log = tmp_path / "log"
    with log.open("w") as output:
        server = run("-m", "uvicorn", "asgi:app", "--port", "0", output=output)
    found = poll(lambda: re.search(r"running on (http://\S+)", log.read_text()), "it listens")
    with httpx.Client(base_url=found[1], timeout=20) as client:

        def get(path):
            return client.get(path).json()

        assert get("/facts")["loads"] == []
        assert client.get("/hornbeam/readyz").status_code == 503
        poll(lambda: client.get("/hornbeam/readyz").status_code == 200, "it is ready")
        assert get("/facts")["loads"] == ["words", "double"]
        check_the_app(get)
        assert get("/hornbeam/stats")["servings"][0]["batches"] == 1
    server.send_signal(signal.SIGTERM)
    assert server.wait(20) in (0, -signal.SIGTERM)
    assert "Traceback" not in log.read_text()
    assert (tmp_path / ".hornbeam").is_dir()


# Flask


def test_with_the_test_client_of_flask(run):
    script = f"""
from wsgi import app
{textwrap.dedent(check_source())}
def get(path):
    response = app.test_client().get(path)
    assert response.status_code == 200, response.text
    return response.json

assert get("/facts")["loads"] == []
check_the_app(get)
print("fine")
"""
    process = run("-W", "error", "-c", script)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "fine\n")


def check_source():
    """Return the source of `check_the_app`, to run it in the process of the app."""
    import inspect

    return "from concurrent.futures import ThreadPoolExecutor\n" + inspect.getsource(check_the_app)


# A script


def test_in_a_script(run):
    """Models are loaded when they are first asked for; it ends when it has nothing more to do."""
    script = """
from app import *
assert loads == []
futures = [double.submit(item) for item in range(4)]
print([future.result(20) for future in futures], loads, state_incr("runs"))
print(cached_inference(shout, "hello", version=1), calls)
"""
    for runs, calls in ((1, ["hello"]), (2, [])):  # the store remembers
        process = run("-W", "error", "-X", "dev", "-c", script)
        output, _ = process.communicate(timeout=60)
        assert output.splitlines() == [f"[0, 2, 4, 6] ['double'] {runs}", f"HELLO {calls}"]
        assert process.returncode == 0


WAITING = {
    "an idle serving": "double.start(); print('started', flush=True); threading.Event().wait()",
    "a caller that waits": "double.start(); print('started', flush=True); double.run(1)",
    "a batch that runs": """
def load_slow():
    def slow(items):
        print('started', flush=True)
        time.sleep(1)
        return items
    return slow
import time
Serving(load_slow, name="slow").run(1)
""",
    "a load in the background": """
import time
def load_slow():
    print('started', flush=True)
    time.sleep(1)
register_model("slow", load_slow)
from hornbeam_ml.background_load import load_in_background
double.start()
load_in_background()
threading.Event().wait()
""",
    "tasks of an event loop": """
import asyncio
async def main():
    async with asyncio.TaskGroup() as group:
        group.create_task(double.arun(1))
        await asyncio.sleep(0.1)
        print('started', flush=True)
asyncio.run(main())
""",
}


def waits(pid):
    """Tell whether the main thread of a process sleeps in the kernel."""
    return Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


@pytest.mark.parametrize("code", WAITING.values(), ids=WAITING)
def test_a_script_ends_with_ctrl_c(run, code):
    """By the signal, as scripts do, with one traceback, and nothing else of ours."""
    # A shell has its background jobs ignore SIGINT, the test suite among them.
    heeding = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    process = run("-c", f"{heeding}from app import *\nregister_model('words', str)\n{code}")
    assert process.stdout.readline() == "started\n"
    # CPython misses a signal that comes in the instant in which its main thread begins to wait for
    # a lock (69 of 15,000 scripts without anything of ours). A hand on a keyboard comes later.
    time.sleep(0.3)
    poll(lambda: waits(process.pid), "its main thread waits")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert output.rstrip().endswith("KeyboardInterrupt")
    for unwanted in ("Exception ignored", "Fatal", "RuntimeError", "never awaited"):
        assert unwanted not in output


# pytest

CONFTEST = "from hornbeam_ml.testing import fresh_lmdb_store, fresh_store, fresh_store_always\n"
TESTS = """
import os, subprocess, sys
import pytest
from app import *
from hornbeam_ml import ModelError, cache_stats, predict
from hornbeam_ml.serving import registry
from hornbeam_state import default_store, expose, state_get, state_keys
from hornbeam_state.rpc.exposed import exposed_names

def use_it():
    assert state_keys() == []
    assert state_incr("requests") == 1
    assert cached_inference(shout, "hello", version=1) == "HELLO"
    assert cache_stats()["misses"] == 1

@pytest.mark.parametrize("turn", range(2))
def test_a_store_of_its_own(turn):
    use_it()

@pytest.mark.asyncio
@pytest.mark.parametrize("turn", range(2))
async def test_a_task(turn):
    use_it()
    assert await astate_incr("requests") == 2
    assert await acached_inference(shout, "hello", version=1) == "HELLO"
    assert cache_stats()["hits"] == 1

@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_task_of_anyio(fresh_store):
    assert await astate_incr("requests") == 1
    assert fresh_store.get("requests") == 1

def test_models_of_the_app_are_there_and_loaded_once():
    assert get_model("words")("a") == "A"
    assert loads.count("words") == 1

@pytest.mark.parametrize("turn", range(2))
def test_what_a_test_registers_is_its_own(turn):
    with pytest.raises(ModelError):
        get_model("mine")
    with pytest.raises(ModelError):
        predict("mine", 1)
    assert "test.mine" not in exposed_names()
    expose(lambda: turn, module="test", name="mine")
    register_model("mine", lambda: turn)
    register_model("words", lambda: turn)
    mine = Serving(lambda: lambda items: items, name="mine")
    Serving(lambda: lambda items: [turn for _ in items], name="double")
    assert (get_model("mine"), get_model("words"), predict("mine", 1), predict("double", 1)) == (
        turn, turn, 1, turn)
    assert mine.ready

def test_names_are_given_back():
    assert get_model("words")("a") == "A"
    assert registry.find("double") is double
    assert registry.open_servings() == [double]

def test_other_processes_share_it(fresh_lmdb_store):
    url = f"lmdb://{fresh_lmdb_store.config.path}"
    code = "from hornbeam_state import *; print(state_incr('requests'))"
    asked = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True,
        env={**os.environ, "HORNBEAM_STORE": url})
    assert (asked.stdout, state_get("requests")) == (b"1\\n", 1)

def test_no_thread_of_a_test_goes_on():
    assert [t.name for t in threading.enumerate() if t.name.startswith(("mine", "double"))] == []
"""


def test_in_pytest(run, tmp_path):
    """Each test begins with an empty store and what the app registered, whatever ran before."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_app.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nfilterwarnings = error\nasyncio_default_fixture_loop_scope = function\n"
    )
    process = run("-m", "pytest", "-q", "-p", "no:cacheprovider")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "11 passed" in output
    assert not Path(tmp_path / ".hornbeam").exists()


def test_in_pytest_for_those_who_ask(run, tmp_path):
    """A store that nobody asked for is the process's own."""
    (tmp_path / "conftest.py").write_text("from hornbeam_ml.testing import fresh_store\n")
    (tmp_path / "test_app.py").write_text("""
from hornbeam_state import default_store, state_incr

def test_asks(fresh_store):
    assert default_store() is fresh_store
    assert state_incr("requests") == 1

def test_does_not():
    assert default_store().config.scheme == "lmdb"
""")
    process = run("-m", "pytest", "-q", "-p", "no:cacheprovider")
    output, _ = process.communicate(timeout=120)
    assert "2 passed" in output
