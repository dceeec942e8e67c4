"""Importing before the fork: HORNBEAM_PRELOAD and --preload, in a real gunicorn."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import textwrap
from pathlib import Path

import httpx
import pytest
from gunicorn_process import Gunicorn, poll

from hornbeam_ml.memory import memory_of

APP = """
import gc, json, os, sys
from pathlib import Path
from bare_asgi import live, respond
here = Path(__file__).parent
ROUTES = {}

def route(fn):
    ROUTES["/" + fn.__name__] = fn

@route
def state():
    return {"pid": os.getpid(), "module": getattr(sys.modules.get("slow"), "STATE", None)}

def wsgi(environ, start_response):
    body = json.dumps(ROUTES.get(environ["PATH_INFO"], os.getpid)()).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]

async def asgi(scope, receive, send):
    if scope["type"] == "lifespan":
        return await live(receive, send)
    await respond(send, json.dumps(ROUTES.get(scope["path"], os.getpid)()).encode())
"""
MODULE = """
import os
STATE = {"pid": os.getpid(), "threads": os.environ.get("OMP_NUM_THREADS")}
"""
CONF = """
import gc, os
from pathlib import Path
def pre_fork(server, worker):
    said = f"{gc.get_freeze_count()} {gc.isenabled()} {os.environ.get('OMP_NUM_THREADS')}"
    Path("pre_fork").write_text(said)
"""


@pytest.fixture
def serve(tmp_path):
    """Start servers of the app above, and end them with the test."""
    servers = []

    def start(*options, code="", kind="wsgi", conf=CONF, **env):
        (tmp_path / "app.py").write_text(APP + textwrap.dedent(code))
        (tmp_path / "slow.py").write_text(MODULE)
        (tmp_path / "conf.py").write_text(conf)
        servers.append(Gunicorn(f"app:{kind}", "-c", "conf.py", *options, cwd=tmp_path, env=env))
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__()


def states(server, workers):
    """Return what each worker says of itself."""
    found = {}

    def all_answered():
        with httpx.Client(base_url=server.url, timeout=20) as client:
            state = client.get("/state").json()
        found[state["pid"]] = state["module"]
        return server.workers() <= found.keys() and len(server.workers()) == workers

    server.until(all_answered, "an answer of each worker")
    return [found[pid] for pid in server.workers()]


def ended(server):
    """Wait for a start that fails; return the lines that say why."""
    assert server.end(60) == 3
    return [line for line in server.log.splitlines() if "[ERROR]" in line]


# Importing modules


def test_modules_are_imported_once_before_the_fork(serve, tmp_path):
    """With the workers' thread budget, which the arbiter does not keep; new ones inherit it too."""
    env = {"HORNBEAM_PRELOAD": "slow, xml.dom.minidom", "HORNBEAM_THREADS": "3"}
    server = serve("--workers", "2", **env).ready()
    wanted = {"pid": server.pid, "threads": "3"}
    assert states(server, 2) == [wanted] * 2
    frozen, collects, threads = (tmp_path / "pre_fork").read_text().split()
    assert (int(frozen) > 1000, collects, threads) == (True, "True", "None")
    first = server.workers()
    server.send(signal.SIGHUP)
    server.until(lambda: len(server.workers()) == 2 and not server.workers() & first, "new workers")
    assert states(server, 2) == [wanted] * 2
    assert "Native threads" not in server.log


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        pytest.param(
            "slow,nowhere", "'nowhere' cannot be imported: ModuleNotFoundError", id="missing"
        ),
        pytest.param("xml.nothing", "'xml.nothing' cannot be imported", id="dotted"),
        pytest.param("broken", "ZeroDivisionError: division by zero", id="raises"),
        pytest.param("leaves", "SystemExit: 0", id="exits"),
    ],
)
def test_a_module_that_cannot_be_imported_stops_the_start(serve, tmp_path, names, reason):
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)")
    server = serve("--workers", "2", HORNBEAM_PRELOAD=names)
    lines = ended(server)
    assert len([line for line in lines if "HORNBEAM_PRELOAD: " in line and reason in line]) == 1
    assert "Traceback" not in server.log
    assert "Booting worker" not in server.log


def test_a_reload_with_such_a_module_goes_on_with_what_there_is(serve, tmp_path):
    conf = "raw_env = ['HORNBEAM_PRELOAD={}']"
    server = serve(conf=conf.format("slow")).ready()
    (tmp_path / "conf.py").write_text(conf.format("nowhere"))
    for wanted in (1, 2):
        (first,) = server.workers()
        server.send(signal.SIGHUP)
        server.until(
            lambda gone=first: len(server.workers()) == 1 and gone not in server.workers(), "reload"
        )
        assert states(server, 1)[0]["pid"] == server.pid
        assert server.log.count("Handling signal: hup") == wanted
    assert server.log.count("'nowhere' cannot be imported") == 2
    assert "going on without it" in server.log


def test_workers_share_what_was_imported(serve, tmp_path):
    """What a module holds is in memory once."""
    (tmp_path / "large.py").write_text("DATA = bytearray(b'x') * 50_000_000")
    code = "import large\nROUTES['/data'] = lambda: sum(large.DATA[::4096])"
    memory = {}
    for name, options in {"own": [], "env": [], "preload": ["--preload"]}.items():
        env = {"HORNBEAM_PRELOAD": "large"} if name == "env" else {}
        with serve("--workers", "2", *options, code=code, **env).ready() as server:
            states(server, 2)
            assert server.get("/data").json() > 0
            memory[name] = sum(memory_of(pid).pss_bytes for pid in (server.pid, *server.workers()))
    assert memory["env"] < memory["own"] - 40e6 > memory["preload"], memory


def test_workers_have_their_own_budget_after_a_reload(serve, tmp_path):
    """Fewer threads than the arbiter imported torch with, and then more."""
    code = """
        ROUTES["/count"] = lambda: sys.modules["torch"].get_num_threads()
    """
    conf = "raw_env = ['HORNBEAM_PRELOAD=torch', 'HORNBEAM_THREADS={}']"
    server = serve(code=code, conf=conf.format(2)).ready(60)
    assert server.get("/count").json() == 2
    for budget in (1, 3):
        (tmp_path / "conf.py").write_text(conf.format(budget))
        server.send(signal.SIGHUP)
        server.until(lambda count=budget: server.try_get("/count") == str(count), "another budget")


# What is refused, and what is not


@pytest.mark.parametrize(
    ("code", "what"),
    [
        pytest.param(
            "import torch\nmodel = torch.nn.Linear(2, 2)\nmodel(torch.ones(1, 2))",
            r"a model ran before the fork \(torch.nn.modules.linear.Linear.forward, "
            r"in \S+app.py line {line}\)",
            id="torch",
        ),
        pytest.param(
            "from hornbeam_ml import register_model, get_model\n"
            "register_model('m', dict)\nget_model('m')",
            r"a model was loaded before the fork \('m', in \S+app.py line {line}\)",
            id="model",
        ),
        pytest.param(
            "from hornbeam_ml import Serving\n"
            "serving = Serving(load=lambda: list, name='s', batch_size=2)\nserving.start()",
            r"a serving was started before the fork \(\S* ?'s', in \S+app.py line {line}\)",
            id="serving",
        ),
        pytest.param(
            "from hornbeam_ml import Embedder\nfrom embedding_models import REAL\n"
            "Embedder(REAL, backend='torch', cache=False).encode('a text')",
            r"a serving was started before the fork \(.*, in \S+app.py line {line}\)",
            id="embedder",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "from hornbeam_ml.forks import fork_hazards\n(here / '0').symlink_to('/dev/nvidia-uvm')\n"
            "fork_hazards._OPEN_FILES = here",
            r"a GPU was in use before the fork \(/dev/nvidia-uvm is open\)",
            id="GPU",
        ),
    ],
)
def test_what_ran_before_the_fork_is_refused(serve, code, what):
    """With --preload, at a line of the app; or in a module that HORNBEAM_PRELOAD names."""
    server = serve("--preload", code=code)
    line = (APP + code).count("\n") + 1
    (said,) = [line for line in ended(server) if "failed to boot: " in line]
    assert re.search(what.format(line=line), said), said
    assert "register_model(...) or Serving(load=...), which run after the fork" in said


def test_a_preloaded_module_that_runs_a_model_is_refused(serve, tmp_path):
    (tmp_path / "runs.py").write_text(
        "from hornbeam_ml import *\nregister_model('m', dict)\nget_model('m')"
    )
    server = serve(HORNBEAM_PRELOAD="runs")
    assert any("runs.py line 3" in line for line in ended(server))


def test_torch_before_the_fork(serve):
    """Weights are made and computed with, no model runs; workers compute with all their threads."""
    code = """
        import torch
        from concurrent.futures import ThreadPoolExecutor
        model = torch.nn.Linear(800, 800)
        large = torch.ones(2000, 2000)
        (large @ large + large).sum()
        set_num_threads = torch.set_num_threads

        @route
        def compute():
            with ThreadPoolExecutor(1) as other:
                other.submit(lambda: large @ large + large).result()
                there = other.submit(torch.get_num_threads).result()
            answer = model(large[:800, :800])
            hooks = len(torch.nn.modules.module._global_forward_pre_hooks)
            builtin = type(torch.set_num_threads).__name__
            finders = [finder for finder in sys.meta_path if type(finder).__name__ == "AfterImport"]
            return [answer.shape, torch.get_num_threads(), there, hooks, builtin, finders]

        @route
        def set_here():
            set_num_threads(1)
            return torch.get_num_threads()
    """
    server = serve("--preload", code=code, kind="asgi", HORNBEAM_THREADS="2").ready(60)
    wanted = [[800, 800], 2, 2, 0, "builtin_function_or_method", []]
    assert server.get("/compute").json() == wanted
    assert server.get("/set_here").json() == 1
    assert "Native threads" not in server.log


def test_an_app_that_asks_torch_for_fewer_threads_before_the_fork_keeps_them(serve):
    code = """
        import torch
        torch.set_num_threads(1)
        ROUTES["/count"] = torch.get_num_threads
    """
    server = serve("--preload", code=code, HORNBEAM_THREADS="2").ready(60)
    assert server.get("/count").json() == 1


def test_a_native_thread_of_the_arbiter_is_warned_of(serve):
    """Those that Python started, as gunicorn does for its control socket, do not count."""
    code = """
        import ctypes, threading, time
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        C = ctypes.CDLL(None)
        C.pthread_create(ctypes.byref(ctypes.c_ulong()), None, C.pause, None)
    """
    server = serve("--preload", code=code).ready()
    assert "Native threads in the arbiter: 1." in server.log


# The real thing

RESTARTS = 100
WORKERS = 4


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="no /proc")
def test_no_worker_hangs_in_a_hundred_restarts(tmp_path):
    """By SIGKILL, SIGTERM and SIGHUP; each new worker answers what the first ones answered."""
    pytest.importorskip("sentence_transformers")
    apps = Path(__file__).parents[2] / "benchmarks" / "apps"
    env = {
        "HORNBEAM_PRELOAD": "torch,sentence_transformers",
        "HORNBEAM_THREADS": "2",  # so that OpenMP has threads
        "HORNBEAM_STORE": f"lmdb://{tmp_path}/store",
    }
    options = ("--workers", str(WORKERS), "--chdir", str(apps))
    with Gunicorn("embed:app", *options, cwd=tmp_path, env=env) as server:
        seen, answers = {}, set()

        def all_answer():
            with httpx.Client(base_url=server.url, timeout=60) as client:
                pid = client.get("/threads").json()["pid"]
                if pid not in seen:
                    seen[pid] = True
                    text = "a text of some words " * 20
                    for path in ("/embed", "/embed-in-threads"):
                        answers.add(client.post(path, json={"text": text}).text)
            return server.workers() <= seen.keys() and len(server.workers()) == WORKERS

        server.until(all_answer, "the first workers answer", 120)
        assert "torch/lib" in Path(f"/proc/{server.pid}/maps").read_text()
        signals = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
        for turn in range(RESTARTS // WORKERS):
            sig, before = signals[turn % len(signals)], server.workers()
            if sig == signal.SIGHUP:
                server.send(sig)
            else:
                for pid in before:
                    os.kill(pid, sig)
            poll(
                lambda gone=before: not server.workers() & gone,
                f"{sig.name}: the old are gone",
                120,
            )
            server.until(all_answer, f"the workers answer after {turn + 1} turns", 120)
        assert len(seen) >= RESTARTS + WORKERS
        assert len(answers) == 1
        print(json.dumps({"workers": len(seen), "answers": len(answers)}), file=sys.stderr)
