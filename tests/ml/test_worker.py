"""The worker class, under a real gunicorn."""

from __future__ import annotations

import functools
import os
import re
import signal
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi import FastAPI
from flask import Flask
from gunicorn_process import Gunicorn, alive, poll
from starlette.applications import Starlette

from hornbeam_ml.http.interfaces import interface_of, wanted_interface
from hornbeam_ml.lifecycle import boot
from hornbeam_ml.threads import fair_share, usable_cores
from hornbeam_state.errors import ConfigError

# One app of each kind with the same routes; tests put code in front of it.
APP = """
import asyncio, json, os, pathlib, sys, threading, time
from bare_asgi import respond

ROUTES = {}
here = pathlib.Path(__file__).parent

def route(fn):
    ROUTES["/" + fn.__name__] = fn
    return fn

@route
def pid():
    return str(os.getpid())

SECONDS = 3.5

@route
def work():
    "Blocks a request thread, as a model that computes does."
    here.joinpath("started").touch()
    time.sleep(SECONDS)
    return "done"

@route
def environ():
    return json.dumps(dict(os.environ))

def wsgi(environ, start_response):
    body = ROUTES.get(environ["PATH_INFO"], pid)().encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]

async def starting():
    "What the lifespan does at startup."

async def asgi(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        try:
            await starting()
        except Exception as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        here.joinpath("shut-down").touch()
        await send({"type": "lifespan.shutdown.complete"})
        return
    if scope["path"] == "/hang":
        time.sleep(60)
    await respond(send, (await asyncio.to_thread(ROUTES.get(scope["path"], pid))).encode())
"""

BOTH = pytest.mark.parametrize("kind", ["wsgi", "asgi"])
# Written down by gunicorn's hooks, which get the worker itself.
SETTINGS = """
def post_worker_init(worker):
    import app
    @app.route
    def derived():
        return f"{worker.cfg.threads} {worker.tpool._max_workers} {worker.budget} {worker.age}"
"""


@pytest.fixture
def serve(tmp_path):
    """Start servers of the app above, and end them all with the test."""
    servers = []

    def start(kind, *options, code="", env=None):
        written = tmp_path / "app.new"
        written.write_text(APP + textwrap.dedent(code))
        written.replace(tmp_path / "app.py")  # at once: another server may be importing it
        (tmp_path / "conf.py").write_text(SETTINGS)
        options = ("-c", "conf.py", *options)
        servers.append(Gunicorn(f"app:{kind}", *options, cwd=tmp_path, env=env))
        return servers[-1]

    yield start
    with ThreadPoolExecutor() as pool:  # each may take a while to end
        list(pool.map(lambda server: server.__exit__(), servers))


# Which interface?


async def coroutine_app(scope, receive, send):
    pass


def wsgi_app(environ, start_response):
    pass


def decorated(fn):
    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        return fn(*args, **kwargs)

    return wrapper


def adapting(fn):
    @functools.wraps(fn)
    def wrapper(environ, start_response):
        return fn

    return wrapper


class PlainMiddleware:
    def __call__(self, scope, receive, send):
        return coroutine_app(scope, receive, send)


class CoroutineMiddleware:
    async def __call__(self, *args):
        pass


class DjangoLike:
    def __call__(self, environ, start_response):
        return []

    def method(self, environ, start_response):
        return []


class SlotMiddleware:  # as Sentry's: the instance decides what __call__ is
    __slots__ = ("__call__",)

    def __init__(self):
        self.__call__ = self._run

    async def _run(self, scope, receive, send):
        pass


class Asgi2:
    def __init__(self, scope):
        pass

    async def __call__(self, receive, send):
        pass


class WsgiIterable:
    def __init__(self, environ, start_response):
        pass

    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("app", "interface"),
    [
        pytest.param(FastAPI(), "asgi3", id="fastapi"),
        pytest.param(Starlette(), "asgi3", id="starlette"),
        pytest.param(Flask("x"), "wsgi", id="flask"),
        pytest.param(DjangoLike(), "wsgi", id="django-like"),
        pytest.param(DjangoLike().method, "wsgi", id="method"),
        pytest.param(coroutine_app, "asgi3", id="coroutine-function"),
        pytest.param(wsgi_app, "wsgi", id="function"),
        pytest.param(PlainMiddleware(), "asgi3", id="middleware-plain-call"),
        pytest.param(CoroutineMiddleware(), "asgi3", id="middleware-any-arguments"),
        pytest.param(SlotMiddleware(), "asgi3", id="middleware-slot"),
        pytest.param(lambda scope, receive, send: None, "asgi3", id="lambda"),
        pytest.param(
            functools.partial(lambda prefix, environ, start: None, "x"), "wsgi", id="partial-wsgi"
        ),
        pytest.param(
            functools.partial(lambda scope, receive, send, *, debug: None, debug=1),
            "asgi3",
            id="partial-asgi",
        ),
        pytest.param(functools.partial(coroutine_app), "asgi3", id="partial-coroutine"),
        pytest.param(decorated(coroutine_app), "asgi3", id="decorated-coroutine"),
        pytest.param(decorated(wsgi_app), "wsgi", id="decorated-wsgi"),
        pytest.param(lambda environ, start_response, x=None: None, "wsgi", id="optional-argument"),
        pytest.param(Asgi2, "asgi2", id="asgi2-class"),
        pytest.param(lambda scope: coroutine_app, "asgi2", id="asgi2-function"),
        pytest.param(WsgiIterable, "wsgi", id="wsgi-class"),
    ],
)
def test_the_interface_is_told_from_the_app(app, interface):
    """Frameworks, functions, partials, decorated functions and middleware."""
    assert interface_of(app) == interface
    assert interface_of(app, "wsgi") == "wsgi"
    if interface != "wsgi":
        assert interface_of(app, "asgi") == interface


def test_a_decorator_that_changes_the_interface_is_what_counts():
    """A WSGI function that wraps something else is WSGI."""
    assert interface_of(adapting(lambda scope, receive, send: None)) == "wsgi"


@pytest.mark.parametrize(
    ("app", "message"),
    [
        pytest.param(lambda *args: None, "HORNBEAM_INTERFACE=wsgi", id="any-arguments"),
        pytest.param(lambda a, b, c, d: None, "HORNBEAM_INTERFACE=wsgi", id="four"),
        pytest.param(lambda a, b=1, c=2: None, "HORNBEAM_INTERFACE=wsgi", id="one-or-three"),
        pytest.param(dict, "HORNBEAM_INTERFACE=wsgi", id="no-signature"),
        pytest.param(FastAPI, "HORNBEAM_INTERFACE=wsgi", id="class-of-an-app"),
        pytest.param(lambda: None, "parentheses", id="factory"),
        pytest.param(42, "not callable", id="not-callable"),
    ],
)
def test_an_app_that_could_be_either_is_refused(app, message):
    """The message says how to decide."""
    with pytest.raises(ConfigError, match=message):
        interface_of(app)


def test_the_wish_for_an_interface_is_checked():
    """Unset, empty and any case are fine, another word is not."""
    assert wanted_interface({}) == wanted_interface({"HORNBEAM_INTERFACE": ""}) == "auto"
    assert wanted_interface({"HORNBEAM_INTERFACE": "ASGI "}) == "asgi"
    with pytest.raises(ConfigError, match=r"HORNBEAM_INTERFACE='maybe': use wsgi, asgi or auto"):
        wanted_interface({"HORNBEAM_INTERFACE": "maybe"})


# Settings.


@BOTH
def test_sighup_keeps_threads_and_budget(serve, kind):
    """gunicorn makes a new configuration object then, where `--threads` is 1 again."""
    server = serve(kind, "-w", "2")
    server.until(lambda: server.log.count("Ready: ") == 2, "both workers")
    first = server.get("/derived").text.split()
    share = fair_share(usable_cores(), 2)
    assert first[:3] == ["32", "32", str(share)]
    server.send(signal.SIGHUP)
    second = server.until(
        lambda: (now := server.get("/derived").text.split())[3:] > ["2"] and now, "a new worker"
    )
    assert second[:3] == first[:3]
    environ = server.get("/environ").json()
    assert environ["OMP_NUM_THREADS"] == environ["OPENBLAS_NUM_THREADS"] == str(share)
    assert "Traceback" not in server.log


def test_the_users_numbers_are_kept(serve):
    """`--threads`, `--env OMP_NUM_THREADS=…` and HORNBEAM_THREADS."""
    options = ("--threads", "3", "--env", "MKL_NUM_THREADS=7")
    one = serve("wsgi", *options, env={"OMP_NUM_THREADS": "5"})
    two = serve("asgi", *options, env={"OMP_NUM_THREADS": "5", "HORNBEAM_THREADS": "2"})
    assert one.ready().get("/derived").text.split()[:3] == ["3", "3", "5"]
    environ = one.get("/environ").json()
    assert (environ["OMP_NUM_THREADS"], environ["MKL_NUM_THREADS"]) == ("5", "7")
    assert environ["RAYON_NUM_THREADS"] == "5"
    assert two.ready().get("/derived").text.split()[2] == "2"
    assert two.get("/environ").json()["OMP_NUM_THREADS"] == "2"


LIFESPAN = pytest.param("lifespan", marks=pytest.mark.slow)  # as where a model imports it


@pytest.mark.parametrize("where", ["app", "preloaded", "model", LIFESPAN])
def test_torch_keeps_the_budget_wherever_it_is_imported(serve, where):
    """Also when it was imported before the fork."""
    pytest.importorskip("torch")
    code = textwrap.dedent("""
        from hornbeam_ml.models import register_model
        def load():
            import torch
        async def starting():
            import torch
        @route
        def compute():
            from threadpoolctl import threadpool_info
            import torch
            counts = {library["num_threads"] for library in threadpool_info()}
            torch.ones(200, 200) @ torch.ones(200, 200)
            return f"{counts} {torch.get_num_threads()}"
    """)
    if where in {"app", "preloaded"}:
        code += "import torch\n"
    if where == "model":
        code += "register_model('m', load)\n"
    options = ["--preload"] if where == "preloaded" else []
    kind = "asgi" if where == "lifespan" else "wsgi"
    server = serve(kind, *options, code=code, env={"HORNBEAM_THREADS": "1"})
    assert server.ready(60).get("/compute").text == "{1} 1"


# Heartbeats.


def test_a_slow_boot_does_not_get_the_worker_killed(serve):
    """Import and model each take longer than --timeout, the import without giving up the GIL."""
    code = """
        import ctypes
        ctypes.PyDLL(None).usleep(3_300_000)  # the arbiter looks once a second
        from hornbeam_ml.models import register_model
        register_model("slow", lambda: time.sleep(3.3))
        async def starting():
            time.sleep(3.3)
    """
    servers = [serve(kind, "--timeout", "2", code=code) for kind in ("wsgi", "asgi")]
    for server in servers:
        before = server.until(server.workers, "a worker")
        server.ready(60)
        assert server.workers() == before
        assert "TIMEOUT" not in server.log


def test_a_slow_boot_says_what_it_is_at(monkeypatch):
    """A warning from time to time, until the boot is over."""
    monkeypatch.setattr(boot, "NOTICE_S", 0.01)
    said = []
    log = type("Log", (), {"warning": lambda _, line, *args: said.append(line % args)})()
    watch = boot.BootWatch(log)
    watch.start()
    poll(lambda: said, "a warning")
    watch.step = "loading models"
    poll(lambda: said[-1].startswith("Still loading"), "a warning of the next step")
    watch.stop()
    assert re.fullmatch(r"Still importing the app after \d+ s", said[0])
    assert re.fullmatch(r"Still loading models after \d+ s", said[-1])


def test_a_boot_is_bounded(serve, tmp_path):
    """A booting worker has an hour, where gunicorn alone would wait for ever."""
    code = """
        def worker_says(worker):
            here.joinpath("grace").write_text(str(worker.tmp.last_update() - time.monotonic()))
    """
    (tmp_path / "says.py").write_text(
        "def post_worker_init(worker):\n    import app\n    app.worker_says(worker)\n"
    )
    serve("wsgi", "-c", "says.py", code=code).ready()
    assert 3500 < float((tmp_path / "grace").read_text()) <= 3600


def test_a_long_inference_does_not_get_the_worker_killed(serve):
    """3.5 s in a request thread with --timeout 2; others are answered meanwhile."""
    servers = [serve(kind, "--timeout", "2").ready() for kind in ("wsgi", "asgi")]
    before = [server.workers() for server in servers]
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(server.get, "/work") for server in servers]
        assert [server.get("/pid").text for server in servers] == [str(*pids) for pids in before]
        assert [answer.result().text for answer in answers] == ["done", "done"]
    assert [server.workers() for server in servers] == before


def test_a_hung_event_loop_is_killed_and_replaced(serve):
    """The loop itself notifies, so nothing hides that it hangs."""
    server = serve("asgi", "--timeout", "2").ready()
    (before,) = server.workers()
    threading.Thread(target=server.try_get, args=("/hang",), daemon=True).start()
    server.logged("WORKER TIMEOUT")
    server.until(lambda: not alive(before), "the hung worker to end")
    assert server.ready().get("/pid").text != str(before)


def test_a_draining_worker_finishes_longer_work_than_the_timeout(serve, tmp_path):
    """SIGTERM to the worker itself, while the arbiter goes on timing it."""
    servers = [serve(kind, "--timeout", "2").ready() for kind in ("wsgi", "asgi")]
    before = [next(iter(server.workers())) for server in servers]
    with ThreadPoolExecutor() as pool:
        answers = []
        for server, pid in zip(servers, before, strict=True):
            answers.append(pool.submit(server.get, "/work"))
            poll((tmp_path / "started").exists, "the request to start")
            (tmp_path / "started").unlink()
            os.kill(pid, signal.SIGTERM)
        assert [answer.result().text for answer in answers] == ["done", "done"]
    for server, pid in zip(servers, before, strict=True):
        server.until(lambda pid=pid: not alive(pid), "the worker to end")
        assert "TIMEOUT" not in server.log
        assert server.ready().get("/pid").text != str(pid)


# Models.


@BOTH
def test_models_are_loaded_once_per_worker_and_before_the_first_request(serve, kind, tmp_path):
    """After the fork, in each worker, whether the module or the lifespan registers them."""
    code = """
        from hornbeam_ml.models import get_model, register_model
        loaded = []
        def register(name):
            def load():
                time.sleep(0.5)
                with open(here / "loads", "a") as file:
                    file.write(f"{os.getpid()} {name}\\n")
                loaded.append(name)
                return "weights of " + name
            register_model(name, load)
        async def starting():
            register("late")
        register("early")
        @route
        def models():
            return f"{loaded} {get_model('early')}"
    """
    server = serve(kind, "-w", "2", code=code)
    names = ["early", "late"] if kind == "asgi" else ["early"]
    expected = f"{names} weights of early"
    assert server.get("/models").text == expected  # it came while they loaded
    server.until(lambda: server.log.count("Ready: ") == 2, "both workers")
    assert {server.get("/models").text for _ in range(20)} == {expected}
    loads = (tmp_path / "loads").read_text().splitlines()
    assert sorted(loads) == sorted(f"{pid} {name}" for pid in server.workers() for name in names)


def test_the_lifespan_may_wait_for_a_model(serve):
    """Models load beside the app's own startup."""
    code = """
        from hornbeam_ml.models import aget_model, register_model
        register_model("m", lambda: time.sleep(1) or "weights")
        async def starting():
            global got
            got = await aget_model("m")
        @route
        def model():
            return got
    """
    assert serve("asgi", code=code).get("/model").text == "weights"


# Boots that fail.

BROKEN_MODEL = """
    from hornbeam_ml.models import register_model
    def load():
        raise LookupError("no weights in /srv")
    register_model("broken", load)
"""
BROKEN_LIFESPAN = """
    async def starting():
        raise RuntimeError("the app's own reason")
"""


@pytest.mark.parametrize(
    ("kind", "code", "env", "message"),
    [
        pytest.param("wsgi", BROKEN_MODEL, {}, "'broken'.*no weights", id="model-wsgi"),
        pytest.param("asgi", BROKEN_MODEL, {}, "'broken'.*no weights", id="model-asgi"),
        pytest.param("asgi", BROKEN_LIFESPAN, {}, "the app's own reason", id="lifespan"),
        pytest.param(
            "wsgi", "", {"HORNBEAM_INTERFACE": "maybe"}, "INTERFACE='maybe'", id="interface"
        ),
        pytest.param("wsgi", "", {"HORNBEAM_THREADS": "many"}, "THREADS='many'", id="threads"),
        pytest.param("wsgi", "", {"HORNBEAM_STORE": "nonsense"}, "HORNBEAM_STORE:", id="store-url"),
        pytest.param(
            "asgi", "", {"HORNBEAM_STORE": "lmdb:///proc/1/x"}, "/proc/1/x", id="store-directory"
        ),
        pytest.param("pid", "", {}, "parentheses", id="factory"),
    ],
)
def test_a_boot_that_fails_ends_gunicorn_with_one_clear_line(serve, kind, code, env, message):
    """Exit code 3, what is wrong, and no traceback of ours."""
    server = serve(kind, code=code, env=env)
    assert server.end() == 3
    server.logged(message)
    server.logged("Worker failed to boot: ")
    assert "hornbeam_ml/" not in server.log
    assert "hornbeam_state/" not in server.log
    if "LookupError" not in server.log:
        assert "Traceback" not in server.log


def test_a_failed_model_shows_where_the_app_failed(serve):
    """The traceback begins in the app's own code."""
    server = serve("wsgi", code=BROKEN_MODEL)
    assert server.end() == 3
    server.logged(r'Traceback .*\n  File ".*/app.py", line \d+, in load\n')


def test_an_app_that_fails_to_import_is_reported_as_by_gunicorn(serve):
    """The traceback is the app's, the exit code gunicorn's."""
    server = serve("wsgi", code="1 / 0")
    assert server.end() == 3
    server.logged("ZeroDivisionError")


def test_redis_that_is_down_at_boot_is_a_warning(serve):
    """It may come back; until then the functions that need it raise."""
    server = serve("wsgi", env={"HORNBEAM_STORE": "redis://127.0.0.1:1/0"}).ready()
    server.logged(r"\[WARNING\] .*127.0.0.1:1")


# Signals.


@BOTH
def test_sigterm_finishes_the_request_in_flight(serve, kind, tmp_path):
    """Then hooks run and gunicorn ends with 0."""
    server = serve(kind, code="SECONDS = 1").ready()
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(server.get, "/work")
        poll((tmp_path / "started").exists, "the request to start")
        server.send(signal.SIGTERM)
        assert answer.result().text == "done"
    assert server.end() == 0
    assert (tmp_path / "shut-down").exists() == (kind == "asgi")
    assert "Traceback" not in server.log


@BOTH
@pytest.mark.parametrize("sig", [signal.SIGQUIT, signal.SIGINT])
def test_sigquit_does_not_wait_for_requests(serve, kind, sig, tmp_path):
    """A request thread that computes does not hold the process."""
    server = serve(kind, code="SECONDS = 60").ready()
    client = threading.Thread(target=server.try_get, args=("/work",), daemon=True)
    client.start()
    poll((tmp_path / "started").exists, "the request to start")
    server.send(sig)
    server.end(15)  # gunicorn kills it after 30 s
    client.join(20)


@BOTH
def test_sigterm_ends_a_boot(serve, kind):
    """Nothing is in flight, so nothing is waited for, whatever step it is at."""
    model = """
        from hornbeam_ml.models import register_model
        register_model("endless", lambda: (here / "loading").touch() or time.sleep(60))
    """
    # Short sleeps: CPython misses a signal that comes just before a long one begins.
    importing = "(here / 'loading').touch(); [time.sleep(0.1) for _ in range(600)]"
    for code, mark in ((importing, "importing"), (model, "")):
        server = serve(kind, code=code)
        path = server._log_path.parent / "loading"
        poll(path.exists, f"to boot {mark}")
        server.send(signal.SIGTERM)
        assert server.end(15) == 0  # gunicorn kills it after 30 s
        path.unlink()
        assert "Traceback" not in server.log


@BOTH
def test_workers_go_when_the_arbiter_was_killed(serve, kind):
    """Nobody is left to stop them."""
    server = serve(kind, "-w", "2").ready()
    server.until(lambda: server.log.count("Ready: ") == 2, "both workers")
    workers = server.workers()
    server.send(signal.SIGKILL)
    poll(lambda: not any(map(alive, workers)), "the workers to go")


@BOTH
def test_max_requests_replaces_the_worker(serve, kind):
    """The limit is gunicorn's."""
    server = serve(kind, "--max-requests", "3").ready()
    (before,) = server.workers()
    for _ in range(3):
        server.try_get("/pid")
    poll(lambda: not alive(before), "the worker to be replaced")
    assert server.ready().get("/pid").text != str(before)


@BOTH
def test_sigusr1_reopens_the_logs(serve, kind, tmp_path):
    """The access log goes to the new file after a rotation."""
    log = tmp_path / "access.log"
    server = serve(kind, "--access-logfile", str(log)).ready()
    log.rename(tmp_path / "rotated.log")
    server.send(signal.SIGUSR1)
    assert server.until(lambda: server.get("/seen") and log.exists(), "a new log")
    server.until(lambda: server.get("/seen") and "GET /seen" in log.read_text(), "a line in it")
