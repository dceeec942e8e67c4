"""A model host under gunicorn: one for each configuration, for all its workers."""

from __future__ import annotations

import os
import signal
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from gunicorn_process import Gunicorn, alive, poll

MODELS = """
import os, time
from pathlib import Path
from hornbeam_ml import Serving

VERSION = 1
here = Path(__file__).parent

def load():
    def model(batch):
        if "slow" in batch:
            time.sleep(0.3)
        if "held" in batch:
            (here / "begun").touch()
            while not (here / "go").exists():
                time.sleep(0.01)
        return [[item, os.getpid(), len(batch), VERSION] for item in batch]
    return model

sizes = Serving(load, name="sizes", batch_size=64)
"""

APP = """
import json, os, sys
from fastapi import FastAPI
from hosted_models import sizes

app = FastAPI()

@app.get("/")
async def index():
    return {"pid": os.getpid(), "torch": "torch" in sys.modules, "ready": sizes.ready}

@app.get("/async/{item}")
async def run(item: str):
    return await sizes.arun(item)

@app.get("/sync/{item}")
def run_sync(item: str):
    return sizes.run(item)

def wsgi(environ, start_response):
    item = environ["PATH_INFO"].rpartition("/")[2]
    body = json.dumps(sizes.run(item) if item else [os.getpid()]).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""


@pytest.fixture
def serve(tmp_path):
    """Start servers of the app above, with a host."""
    (tmp_path / "hosted_models.py").write_text(MODELS)
    (tmp_path / "app.py").write_text(textwrap.dedent(APP))
    servers = []

    def start(*options, target="app:app", host="hosted_models", **env):
        env = {"HORNBEAM_HOST": host, "HORNBEAM_STORE": f"lmdb://{tmp_path}/store", **env}
        server = Gunicorn(target, *options, cwd=tmp_path, env=env)
        servers.append(server)
        return server.__enter__()

    yield start
    for server in servers:
        server.__exit__()


def host_of(server):
    """The pids of the supervisors of model hosts among the arbiter's children."""
    return {pid for pid in server.workers() if b"hornbeam_ml.cli" in cmdline(pid)}


def cmdline(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("target", ["app:app", "app:wsgi"])
def test_workers_share_the_host(serve, target):
    server = serve("--workers", "3", target=target).ready()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: server.get(f"/sync/{n}").json(), range(40)))
    assert [item for item, *_ in found] == list(map(str, range(40)))
    assert len({pid for _, pid, _, _ in found}) == 1  # one process computes
    (supervisor,) = host_of(server)
    server.send(signal.SIGTERM)
    assert server.end() == 0
    poll(lambda: not alive(supervisor), "the host ended with the server")


def test_calls_of_several_workers_share_batches(serve, tmp_path):
    server = serve("--workers", "3", HORNBEAM_ADMIN_PATH="/_admin").ready()

    def queued():
        (serving,) = server.get("/_admin/stats").json()["servings"]
        return serving["queued"]

    with ThreadPoolExecutor(24) as pool:
        held = pool.submit(server.get, "/async/held")
        server.until((tmp_path / "begun").exists, "a batch runs")
        found = [pool.submit(server.get, f"/async/{n}") for n in range(22)]
        server.until(lambda: queued() == 22, "the others wait")
        (tmp_path / "go").touch()
        sizes = [each.result().json()[2] for each in found]
        held.result()
    assert sizes == [22] * 22


def test_the_figures_show_the_host(serve):
    server = serve("--workers", "2", HORNBEAM_ADMIN_PATH="/_admin").ready()
    pid = server.get("/async/x").json()[1]

    def counted():
        figures = server.get("/_admin/stats").json()
        return [serving["items"] for serving in figures["servings"]] == [1] and figures

    figures = server.until(counted, "the call is counted")
    (host,) = figures["host"]
    assert host["pid"] == pid
    assert 0 < host["pss_bytes"] <= host["rss_bytes"]
    (serving,) = figures["servings"]
    assert serving["name"] == "sizes"
    assert serving["loads"][0]["seconds"] >= 0


def test_a_worker_does_not_serve_before_the_host_does(serve, tmp_path):
    (tmp_path / "hosted_models.py").write_text(
        MODELS.replace("def load():", "def load():\n    time.sleep(1.5)")
    )
    server = serve("--workers", "2")
    assert server.get("/").json()["ready"]
    assert server.get("/async/x").json()[0] == "x"


def test_a_host_that_cannot_load_ends_the_server_with_its_reason(serve, tmp_path):
    (tmp_path / "hosted_models.py").write_text(
        MODELS.replace("def load():", "def load():\n    raise OSError('no weights')")
    )
    server = serve()
    assert server.end() == 3
    assert "serving 'sizes' failed to load: OSError: no weights" in server.log


@pytest.mark.parametrize(
    ("host", "message"),
    [("no_such_models", "there is no module 'no_such_models'"), ("a b", "give a module")],
)
def test_a_host_that_makes_no_sense_is_a_clear_line(serve, host, message):
    server = serve(host=host)
    assert server.end() == 3
    assert message in server.log
    assert "Traceback" not in server.log


def test_sighup_brings_a_new_host_and_loses_nothing(serve, tmp_path):
    server = serve("--workers", "2").ready()
    assert server.get("/async/x").json()[3] == 1
    (first,) = host_of(server)
    old = server.workers()
    (tmp_path / "hosted_models.py").write_text(MODELS.replace("VERSION = 1", "VERSION = 2"))
    server.send(signal.SIGHUP)
    seen = set()

    def done():
        answer = server.get("/async/x")
        assert answer.status_code == 200
        seen.add(answer.json()[3])
        return not old & server.workers()

    server.until(done, "the old ones are gone")
    assert seen <= {1, 2}
    assert not alive(first)
    assert len(host_of(server)) == 1
    assert server.get("/async/x").json()[3] == 2


def test_code_that_changed_gets_a_host_of_its_own(serve, tmp_path):
    """A worker that is replaced imports what is there now, which the host before does not run."""
    server = serve("--workers", "2").ready()
    hosts = host_of(server)
    (tmp_path / "hosted_models.py").write_text(MODELS.replace("VERSION = 1", "VERSION = 2"))
    os.kill(min(server.workers() - hosts), signal.SIGKILL)
    server.until(lambda: len(host_of(server)) == 2, "another host")
    server.until(lambda: server.get("/async/x").json()[3] == 2, "the new code answers")
    versions = {server.get("/async/x").json()[3] for _ in range(20)}
    assert versions <= {1, 2}


def test_the_host_is_killed_and_comes_back(serve):
    server = serve("--workers", "2").ready()
    pid = server.get("/async/x").json()[1]
    os.kill(pid, signal.SIGKILL)
    seen = set()

    def answered():
        answer = server.get("/async/x")
        seen.add(answer.status_code)
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) >= 1
        return answer.status_code == 200

    server.until(answered, "it is back")
    assert seen <= {200, 503}
    assert server.get("/async/x").json()[1] != pid


def test_the_supervisor_is_killed_and_another_one_comes(serve):
    server = serve("--workers", "2").ready()
    (supervisor,) = host_of(server)
    os.kill(supervisor, signal.SIGKILL)
    server.until(lambda: host_of(server) - {supervisor}, "another supervisor")
    server.until(lambda: server.get("/async/x").status_code == 200, "it answers")


def test_the_host_ends_when_the_arbiter_is_killed(serve):
    server = serve("--workers", "2").ready()
    (supervisor,) = host_of(server)
    pid = server.get("/async/x").json()[1]
    server.process.kill()
    poll(lambda: not alive(supervisor) and not alive(pid), "the host ended")


def test_two_servers_of_one_app_have_hosts_of_their_own(serve):
    one, other = serve().ready(), serve().ready()
    mine, theirs = (server.get("/async/x").json()[1] for server in (one, other))
    assert mine != theirs
    one.send(signal.SIGTERM)
    one.end()
    assert other.get("/async/x").json()[1] == theirs


def test_sigterm_waits_for_calls_in_the_host(serve):
    server = serve(HORNBEAM_ADMIN_PATH="/_admin").ready()

    def begun():
        (serving,) = server.get("/_admin/stats").json()["servings"]
        return serving["running"] or serving["items"]

    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(httpx.get, server.url + "/async/slow", timeout=10)
        server.until(begun, "the call has begun")
        server.send(signal.SIGTERM)
        assert slow.result().json()[0] == "slow"
    assert server.end() == 0


def test_a_host_that_cannot_be_started_is_a_clear_line(serve, tmp_path):
    full = tmp_path / ("long" * 30)
    full.mkdir()
    server = serve(TMPDIR=str(full))
    assert server.end() == 3
    assert "Worker failed to boot: the path" in server.log
    assert "choose a shorter directory" in server.log
    assert "Traceback" not in server.log
    assert not list(full.glob("hornbeam-host-*"))


def test_a_host_that_was_killed_leaves_nothing(serve, tmp_path):
    directories = tmp_path / "t"
    directories.mkdir()
    server = serve("--workers", "1", TMPDIR=str(directories)).ready()
    (first,) = host_of(server)
    (left,) = directories.glob("hornbeam-host-*")
    os.kill(first, signal.SIGKILL)
    poll(lambda: host_of(server) not in ({first}, set()), "another was started")
    poll(lambda: server.get("/async/x").status_code == 200, "it answers")
    assert left not in directories.glob("hornbeam-host-*")
    server.send(signal.SIGTERM)
    assert server.end() == 0
    poll(lambda: not list(directories.glob("hornbeam-host-*")), "its directory is gone")


def test_workers_wait_for_the_host_also_when_the_app_does_not_import_the_module(serve, tmp_path):
    (tmp_path / "hosted_models.py").write_text(
        MODELS.replace("def load():", "def load():\n    time.sleep(1.5)")
    )
    (tmp_path / "unaware.py").write_text(
        "from fastapi import FastAPI\n"
        "from hornbeam_ml import apredict\n"
        "app = FastAPI()\n"
        "@app.get('/')\n"
        "async def index():\n"
        "    return await apredict('sizes', 'x')\n"
    )
    server = serve(target="unaware:app", HORNBEAM_ADMIN_PATH="/h").ready()
    assert server.get("/").json()[0] == "x"
    (supervisor,) = host_of(server)
    os.kill(supervisor, signal.SIGSTOP)
    try:
        (process,) = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
        os.kill(int(process), signal.SIGKILL)
        away = {"ready": False, "reasons": ["the model host of hosted_models is away"]}
        poll(lambda: server.get("/h/readyz").json() == away, "the probe says so")
    finally:
        os.kill(supervisor, signal.SIGCONT)
    poll(lambda: server.get("/h/readyz").json()["ready"], "it is back")


def test_a_package_above_the_module_is_as_new_as_the_workers(serve, tmp_path):
    package = tmp_path / "packed"
    package.mkdir()
    (package / "__init__.py").write_text("VERSION = 1\n")
    (package / "models.py").write_text(MODELS.replace("VERSION = 1", "from packed import VERSION"))
    (package / "main.py").write_text(
        "from fastapi import FastAPI\n"
        "from packed import VERSION\n"
        "from packed.models import sizes\n"
        "app = FastAPI()\n"
        "@app.get('/')\n"
        "async def index():\n"
        "    return [VERSION, (await sizes.arun('x'))[3]]\n"
    )
    server = serve(target="packed.main:app", host="packed.models").ready()
    assert server.get("/").json() == [1, 1]
    (package / "__init__.py").write_text("VERSION = 'two'\n")
    server.send(signal.SIGHUP)
    poll(lambda: server.get("/").json() == ["two", "two"], "both are new")
