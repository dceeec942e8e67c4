"""The model host: servings of a module in a process of its own, and clients that call it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from gunicorn_process import alive, poll
from host_process import HostProcess, client_of

from hornbeam_ml import (
    DeadlineExceeded,
    ModelError,
    Overloaded,
    Serving,
    apredict,
    predict,
)
from hornbeam_ml.errors import ClientDisconnected
from hornbeam_ml.host.spec import HostSpec
from hornbeam_ml.request import Request, set_current_request
from hornbeam_ml.serving import chosen_hosts, registry
from hornbeam_ml.serving.hosts import FIRST_CONTACT_S, Hosts
from hornbeam_state.errors import ConfigError, NodeDown
from hornbeam_state.transports import local

MODELS = """
import os, threading, time
import numpy as np
from hornbeam_ml import DONE, Serving

here = []

def dawdle(step):
    def wait(item):
        if item == step:
            open(f"in-{step}", "w").close()
            while not os.path.exists(f"go-{step}"):
                time.sleep(0.01)
        return item
    return wait

def load_sizes():
    here.append("sizes")
    def model(batch):
        if "slow" in batch:
            time.sleep(0.3)
        batch = list(map(dawdle("model"), batch))
        return [(item, os.getpid(), len(batch)) for item in batch]
    return model

def load_arrays():
    return lambda batch: batch * 2

def load_chunks():
    def model(batch):
        for step in range(3):
            yield [(item, step) for item in batch]
        yield [DONE for _ in batch]
    return model

def load_bad():
    def model(batch):
        if "bad" in batch:
            raise ValueError("no such thing")
        if "stuck" in batch:
            time.sleep(30)
        return batch
    return model

state = {}

def load_words():
    state["words"] = {"a": 1, "b": 2}
    return lambda batch: batch

sizes = Serving(load_sizes, name="sizes", batch_size=64)
arrays = Serving(load_arrays, name="arrays", collate="stack")
chunks = Serving(load_chunks, name="chunks")
bad = Serving(load_bad, name="bad", queue_limit=2, batch_size=1)
keyed = Serving(
    lambda: lambda batch, key: [(key, item) for item in batch], name="keyed", batch_keys=["x", "y"]
)
dawdling = Serving(
    load_chunks, name="dawdling", preprocess=dawdle("before"), postprocess=dawdle("after")
)
dawdlers = Serving(
    lambda: lambda batch: batch,
    name="dawdlers",
    preprocess=dawdle("before"),
    postprocess=dawdle("after"),
)
words = Serving(
    load_words,
    name="words",
    preprocess=lambda word: state["words"][word],
    postprocess=lambda number: f"word {number}",
)
unnamed = Serving(lambda: lambda batch: [os.getpid() for _ in batch])
"""

NO_WEIGHTS = """
from hornbeam_ml import Serving

def load():
    raise OSError("no weights")

a = Serving(load, name="a")
"""


@pytest.fixture(autouse=True)
def _no_servings_left():
    yield
    for serving in list(registry._all.values()):
        serving.close(drain=False, timeout=1)


@pytest.fixture
def host(tmp_path):
    with HostProcess(tmp_path, MODELS) as process:
        yield process


@pytest.fixture
def models(host):
    with client_of(host) as module:
        # Calls wait ten seconds for a host that says nothing, and one for a model that it loads.
        poll(lambda: chosen_hosts.current().problem() is None, "everything is loaded")
        yield module


def is_running(serving):
    return serving.stats().running > 0


def test_a_serving_of_that_name_runs_in_the_host(host, models):
    models.sizes.start()
    assert models.sizes.run("a") == ("a", host.pids()[0], 1)
    assert models.here == []  # nothing was loaded in this process
    assert models.sizes.ready
    poll(lambda: models.sizes.stats().items == 1, "it was counted")
    assert models.sizes.run_batch(["a", "b"])[1][0] == "b"
    assert models.sizes.run_inline(["a", "b"]) == [
        ("a", host.pids()[0], 2),
        ("b", host.pids()[0], 2),
    ]
    assert models.sizes.run_batch([]) == []


async def test_the_awaitable_twins(host, models):
    await models.sizes.astart()
    pid = host.pids()[0]
    assert await models.sizes.arun("a") == ("a", pid, 1)
    assert [found[0] for found in await models.sizes.arun_batch("abc")] == ["a", "b", "c"]
    assert await models.sizes.arun_inline(["a"]) == [("a", pid, 1)]
    assert [chunk async for chunk in models.chunks.astream("x")] == [("x", 0), ("x", 1), ("x", 2)]
    assert await apredict("sizes", "p") == ("p", pid, 1)


def test_calls_of_several_threads_share_batches(host, models):
    models.sizes.start()
    with ThreadPoolExecutor(24) as pool:
        slow = pool.submit(models.sizes.run, "model")
        poll((host.directory / "in-model").exists, "the slow one runs")
        calls = [pool.submit(models.sizes.run, str(item)) for item in range(20)]
        poll(lambda: models.sizes.stats().queued == 20, "the others wait")
        (host.directory / "go-model").touch()
        found = [call.result() for call in calls]
        slow.result()
    assert [item for item, _, _ in found] == list(map(str, range(20)))
    assert {size for _, _, size in found} == {20}


def test_arrays_come_as_they_are(models):
    batch = np.arange(12, dtype=np.float32).reshape(3, 4)
    result = models.arrays.run(batch)
    assert result.dtype == np.float32
    assert (result == batch * 2).all()
    result[0] = 0  # it is the caller's own
    with pytest.raises(ValueError, match="shape"):
        models.arrays.run(np.zeros(7))


def test_streams_and_futures(models):
    with models.chunks.stream("x") as stream:
        assert next(stream) == ("x", 0)
        assert list(stream) == [("x", 1), ("x", 2)]
    future = models.sizes.submit("f")
    assert future.result(10)[0] == "f"


def test_a_submitted_call_can_be_cancelled(models):
    running = models.bad.submit("stuck")
    poll(lambda: is_running(models.bad), "it runs")
    waiting = models.bad.submit("never")
    poll(lambda: models.bad.stats().queued == 1, "it waits")
    assert waiting.cancel()
    poll(lambda: models.bad.stats().queued == 0, "it was taken back")
    assert running.cancel()  # nobody waits for it any more, though it runs to its end


def test_errors_come_as_they_are(models):
    with pytest.raises(ValueError, match="no such thing"):
        models.bad.run("bad")
    with pytest.raises(ValueError, match=r"it has: 'x', 'y'"):
        models.keyed.run(1, key="z")
    assert models.keyed.run(1, key="y") == ("y", 1)
    running = models.bad.submit("stuck")
    poll(lambda: is_running(models.bad), "it runs")
    with pytest.raises(DeadlineExceeded):
        models.bad.run("x", timeout_ms=50)
    poll(lambda: models.bad.stats().queued == 0, "it was taken back")
    waiting = [models.bad.submit("x") for _ in range(2)]
    poll(lambda: models.bad.stats().queued == 2, "the queue is full")
    with pytest.raises(Overloaded) as caught:
        models.bad.run("x")
    assert caught.value.retry_after_s > 0
    for future in (*waiting, running):
        future.cancel()


def test_preprocess_and_postprocess_run_where_load_did(models):
    assert models.words.run("b") == "word 2"
    assert models.state == {}
    with pytest.raises(KeyError, match="c"):
        models.words.run("c")


@pytest.mark.parametrize("step", ["before", "after"])
def test_a_slow_preprocess_or_postprocess_holds_up_nobody_else(host, models, step):
    slow = models.dawdlers.submit(step)
    poll((host.directory / f"in-{step}").exists, "it is slow")
    assert models.sizes.run("x", timeout_ms=20_000)[0] == "x"
    (host.directory / f"go-{step}").touch()
    assert slow.result(20) == step


def test_nor_does_that_of_a_stream(host, models):
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(lambda: list(models.dawdling.stream("before")))
        poll((host.directory / "in-before").exists, "it is slow")
        assert models.sizes.run("x", timeout_ms=20_000)[0] == "x"
        (host.directory / "go-before").touch()
        assert slow.result(20) == [("before", step) for step in range(3)]


def test_predict_by_name_needs_no_definition_here(host, models):
    host.ready()
    models.sizes.close()
    assert predict("sizes", "x")[1] == host.pids()[0]
    assert predict("keyed", 1, key="x", where="host") == ("x", 1)
    assert predict("keyed", 1, key="x", inline=True) == ("x", 1)
    with pytest.raises(ModelError, match="nothing"):
        predict("nothing", "x")


def test_local_is_this_process(host, models):
    host.ready()
    assert predict("sizes", "x", where="local")[1] == os.getpid()
    assert models.unnamed.run(1) == os.getpid()
    assert models.sizes.run("x")[1] == host.pids()[0]


def test_only_the_named_ones(tmp_path):
    with HostProcess(tmp_path, MODELS, "keyed", "words") as host, client_of(host) as models:
        assert models.keyed.run(1, key="x") == ("x", 1)
        assert models.sizes.run("x")[1] == os.getpid()
        assert "serves sizes" not in host.log


def test_a_closed_serving_is_closed_here_alone(models):
    models.sizes.run("x")
    models.sizes.close()
    with pytest.raises(Exception, match="closed"):
        models.sizes.run("x")
    assert predict("sizes", "x", where="host")[0] == "x"


def test_the_host_dies_and_comes_back(host, models):
    models.bad.start()
    with ThreadPoolExecutor(8) as pool:
        stuck = [pool.submit(models.bad.run, "stuck")]
        poll(lambda: is_running(models.bad), "it runs")
        stuck += [pool.submit(models.bad.run, "x") for _ in range(2)]
        poll(lambda: models.bad.stats().queued == 2, "they wait")
        pid = host.kill_one()
        for future in stuck:
            with pytest.raises(NodeDown, match="try again") as caught:
                future.result(20)
            assert caught.value.retry_after_s > 0
    assert not models.bad.ready or host.pids() != [pid]
    poll(lambda: models.bad.ready, "it is back")
    assert models.bad.run("y") == "y"
    assert host.pids() != [pid]


async def test_async_callers_of_a_host_that_dies(host, models):
    await models.bad.astart()
    stuck = asyncio.create_task(models.bad.arun("stuck"))
    await asyncio.to_thread(poll, lambda: is_running(models.bad), "it runs")
    host.kill_one()
    with pytest.raises(NodeDown):
        await asyncio.wait_for(stuck, 20)
    await asyncio.to_thread(poll, lambda: models.bad.ready, "it is back")
    assert await models.bad.arun("y") == "y"


def test_a_host_that_is_away_is_an_error_soon(host, models):
    models.sizes.start()
    os.kill(host.process.pid, signal.SIGKILL)  # nobody starts it again
    poll(lambda: not models.sizes.ready, "the loss is noticed")
    start = time.monotonic()
    with pytest.raises(NodeDown, match="hosted_models"):
        models.sizes.run("x")
    assert time.monotonic() - start < FIRST_CONTACT_S


def test_two_processes_share_the_calls(tmp_path):
    with HostProcess(tmp_path, MODELS, workers=2) as host, client_of(host) as models:
        host.ready()
        models.sizes.start()

        def loaded():
            return [link.has("sizes", "loaded") for link in chosen_hosts.current()._links.all()]

        poll(lambda: loaded() == [True, True], "both are known to be loaded")
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(models.sizes.run, ["slow"] * 8))
        assert {pid for _, pid, _ in found} == set(host.pids())
        gone = host.kill_one()
        poll(
            lambda: len(chosen_hosts.current()._links.told()) < 2 or gone not in host.pids(),
            "noticed",
        )
        assert models.sizes.run("x")[1] != gone  # the other one goes on


def test_other_code_is_refused(host):
    host.ready()
    with client_of(host) as models:
        models.sizes.run("x")
    host.file.write_text(host.file.read_text() + "\nchanged = True\n")
    with client_of(host) as models, pytest.raises(ModelError, match="another version of the code"):
        models.sizes.run("x")


@pytest.mark.parametrize(
    ("source", "names", "message"),
    [
        ("import nothing_of_that_name", (), "nothing_of_that_name"),
        ("1 / 0", (), "ZeroDivisionError"),
        (MODELS, ("sizes", "size"), "defines no 'size'; it has"),
        ("import os", (), "defines no serving with a name"),
        (NO_WEIGHTS, (), "serving 'a' failed to load: OSError: no weights"),
    ],
)
def test_a_host_that_cannot_load_says_why(tmp_path, source, names, message):
    with HostProcess(tmp_path, source, *names) as host:
        sys.path.insert(0, str(host.directory))
        found = Hosts(host.sockets, host.spec, local.connect)
        try:
            with pytest.raises(ModelError, match=message):
                found.wait_loaded("a", 20)
        finally:
            found.close()
            sys.path.remove(str(host.directory))
        poll(lambda: "starting it again" in host.log, "it is tried again")


def test_a_module_that_is_not_there_is_said_at_once(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "hornbeam_ml.cli", "host", "no_such_module"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        timeout=20,
    )
    assert done.returncode == 2
    assert "no module 'no_such_module'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_client_that_leaves_takes_its_call_back(models):
    running = models.bad.submit("stuck")
    poll(lambda: is_running(models.bad), "it runs")
    request = Request()
    outcome = []

    def call():
        set_current_request(request)
        try:
            outcome.append(models.bad.run("x"))
        except ClientDisconnected as error:
            outcome.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    poll(lambda: models.bad.stats().queued == 1, "it waits")
    request.leave()
    thread.join(20)
    assert isinstance(outcome[0], ClientDisconnected)
    poll(lambda: models.bad.stats().queued == 0, "it was taken back")
    running.cancel()


async def test_cancelling_a_task_is_not_swallowed(models):
    set_current_request(Request())
    await models.bad.astart()
    running = asyncio.create_task(models.bad.arun("stuck"))
    await asyncio.to_thread(poll, lambda: is_running(models.bad), "it runs")
    waiting = asyncio.create_task(models.bad.arun("x"))
    await asyncio.to_thread(poll, lambda: models.bad.stats().queued == 1, "it waits")
    for task in (waiting, running):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    set_current_request(None)


def test_a_forked_child_connects_anew(host, models):
    models.sizes.run("x")
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if models.sizes.run("child")[1] == host.pids()[0] else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert models.sizes.run("x")[1] == host.pids()[0]


def test_sigterm_lets_running_calls_finish(host, models):
    models.sizes.start()
    pid = host.pids()[0]
    future = models.sizes.submit("model")
    poll((host.directory / "in-model").exists, "it runs")
    host.process.send_signal(signal.SIGTERM)
    poll(lambda: not models.sizes.ready, "it says that it ends")
    (host.directory / "go-model").touch()
    assert future.result(20)[0] == "model"
    assert host.process.wait(20) == 0
    assert not alive(pid)
    assert not host.sockets.exists()


def test_the_processes_end_with_their_supervisor(host):
    host.ready()
    pid = host.pids()[0]
    host.process.kill()
    poll(lambda: not alive(pid), "the process ended")


def test_a_host_ends_when_its_lease_does(tmp_path):
    (tmp_path / "leased.py").write_text(MODELS)
    read, write = os.pipe()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "hornbeam_ml.cli", "host", "leased"),
            *("--sockets", str(tmp_path / "s"), "--lease", str(read)),
        ],
        cwd=tmp_path,
        pass_fds=[read],
    )
    try:
        os.close(read)
        poll((tmp_path / "s" / "0.sock").exists, "it listens")
        assert process.poll() is None
        os.close(write)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def test_without_a_host_there_is_a_clear_error(tmp_path, monkeypatch):
    (tmp_path / "lonely.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HORNBEAM_HOST", "lonely")
    monkeypatch.setattr(chosen_hosts, "FIRST_CONTACT_S", 0.2)
    chosen_hosts.use(chosen_hosts.from_environment)
    try:
        with pytest.raises(NodeDown, match="the model host of lonely cannot be reached"):
            Serving(lambda: lambda batch: batch, name="x").run(1)
    finally:
        monkeypatch.delenv("HORNBEAM_HOST")
        chosen_hosts.use(chosen_hosts.from_environment)


@pytest.mark.parametrize("text", ["app.models:", "app models", "app..models", ":x", "a:b,,c"])
def test_what_cannot_be_a_host_is_refused(text, monkeypatch):
    monkeypatch.setenv("HORNBEAM_HOST", text)
    chosen_hosts.use(chosen_hosts.from_environment)
    with pytest.raises(ConfigError, match="HORNBEAM_HOST"):
        chosen_hosts.current()
    monkeypatch.delenv("HORNBEAM_HOST")
    chosen_hosts.use(chosen_hosts.from_environment)


def test_looking_for_the_code_imports_nothing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    inner = tmp_path / "unimported" / "inner"
    inner.mkdir(parents=True)
    for file in (inner.parent / "__init__.py", inner / "__init__.py"):
        file.write_text("1 / 0")
    (inner / "models.py").write_text("1 / 0")
    assert HostSpec("unimported.inner.models").source() == inner / "models.py"
    assert HostSpec("unimported.inner").source() == inner / "__init__.py"
    (inner.parent / "plain").mkdir()  # needs no __init__.py
    (inner.parent / "plain" / "models.py").write_text("1 / 0")
    assert HostSpec("unimported.plain.models").source().parent.name == "plain"
    assert "unimported" not in sys.modules
    for missing in (
        "unimported.nothing",
        "unimported.plain",
        "unimported.inner.models.deeper",
        "no_such.models",
    ):
        with pytest.raises(ConfigError, match="there is no module"):
            HostSpec(missing).source()


def test_two_hosts_of_one_directory(host, models):
    models.sizes.start()
    command = [sys.executable, "-m", "hornbeam_ml.cli", "host", str(host.spec)]
    with subprocess.Popen(
        [*command, "--sockets", str(host.sockets)],
        cwd=host.directory,
        stderr=subprocess.PIPE,
        text=True,
    ) as second:
        said = next(line for line in second.stderr if "failed" in line or "Error" in line)
        assert "another server listens at" in said
        second.terminate()
        assert "Traceback" not in second.stderr.read()
    assert models.sizes.run("x")[1] == host.pids()[0]
    assert host.sockets.exists()


def test_a_path_that_is_too_long_is_said_at_once(host):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "hornbeam_ml.cli", "host", str(host.spec)),
            *("--sockets", str(host.directory / ("long" * 30))),
        ],
        capture_output=True,
        text=True,
        cwd=host.directory,
        check=False,
        timeout=20,
    )
    assert done.returncode == 2
    assert "choose a shorter directory" in done.stderr


def test_a_log_that_was_rotated_is_opened_anew(tmp_path):
    (tmp_path / "logged.py").write_text(MODELS)
    log, before = tmp_path / "host.log", tmp_path / "host.log.1"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "hornbeam_ml.cli", "host", "logged"),
            *("--sockets", str(tmp_path / "s"), "--log-file", str(log)),
        ],
        cwd=tmp_path,
    )
    try:
        poll(lambda: log.exists() and "serves words" in log.read_text(), "it is loaded")
        log.rename(before)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        os.kill(int(children), signal.SIGKILL)
        poll(lambda: log.exists() and "serves words" in log.read_text(), "it is loaded again")
        assert "ended with signal 9" in log.read_text()
        assert "ended with" not in before.read_text()
    finally:
        process.terminate()
        assert process.wait(20) == 0
