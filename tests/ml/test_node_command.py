"""``hornbeam node``: a module's functions and servings in a process that is kept running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial

import pytest
from gunicorn_process import alive, poll
from node_process import NodeCommand, waits, write_module
from rpc_helpers import default_store_at

from hornbeam_ml import cli, supervisor
from hornbeam_state import NodeDown, node_info, nodes, rpc_call

WORKER = """
import os, time
from pathlib import Path
from hornbeam_ml import Serving, register_model
from hornbeam_state import expose, node

@expose
def pid():
    return os.getpid()

@expose
def name():
    return node()

@expose
def wait_for(path):
    Path(path + ".began").touch()
    while not Path(path).exists():
        time.sleep(0.01)
    return "done"

def load():
    return lambda batch: batch

echo = Serving(load, name="echo")
register_model("loaded", lambda: Path("loaded").touch() or len)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    made = tmp_path_factory.mktemp("node")
    write_module(made, WORKER)
    return made


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    return f"lmdb://{tmp_path_factory.mktemp('store')}"


@pytest.fixture(scope="module")
def shared(directory, url):
    """A node that all tests use, who leave it as it was."""
    options = ("--name", "gpu", "--tag", "a100", "--tag", "fp8", "--concurrency", "2")
    with NodeCommand(directory, url, *options) as running:
        yield running.ready()


@pytest.fixture(autouse=True)
def store(url):
    """The default store is that of the nodes."""
    with default_store_at(url) as made:
        yield made


@pytest.fixture
def gate(tmp_path):
    """A file that lets `wait_for` go on; also when the test fails."""
    path = tmp_path / "gate"
    yield path
    path.touch()


class TestServing:
    def test_it_says_one_line_when_others_can_call_it(self, shared, url):
        assert shared.said == [
            f"{shared.name} ready: ml_worker, 3 functions, 1 serving, concurrency 2, store {url}"
        ]

    def test_functions_are_called_by_its_name(self, shared):
        assert rpc_call(shared.name, "ml_worker", "pid") == shared.child()
        assert nodes("gpu") == [shared.name]

    def test_options_are_in_the_registry(self, shared):
        info = node_info(shared.name)
        assert (info.tags, info.concurrency, info.servings) == (("a100", "fp8"), 2, ("echo",))

    def test_models_are_loaded_before_it_is_ready(self, shared, directory):
        assert (directory / "loaded").exists()

    def test_it_knows_its_name(self, shared):
        assert rpc_call(shared.name, "ml_worker", "name") == shared.name


def refused(directory, url, *options, module="ml_worker", env=None):
    """Return what a node that cannot start says, which exits with 2 and serves nothing."""
    with NodeCommand(directory, url, *options, module=module, env=env) as node:
        assert node.wait() == 2, node.log
        assert node.said == []
        errors = [line for line in node.log.splitlines() if "[INFO]" not in line]
    assert len(errors) == 1
    return errors[0]


class TestStarting:
    @pytest.mark.parametrize(
        ("source", "why"),
        [
            pytest.param("import nonesuch", r"'nonesuch' (broken.py, line 1)", id="import"),
            pytest.param("import sys; sys.exit(1)", "SystemExit: 1 (broken.py, line 1)", id="exit"),
            pytest.param("x = 1", "broken exposes no function and defines no", id="nothing"),
            pytest.param(
                """
                from hornbeam_ml import Serving
                def load():
                    raise OSError("no weights")
                s = Serving(load, name="s")
                """,
                "OSError: no weights",
                id="load",
            ),
        ],
    )
    def test_a_module_that_cannot_be_served(self, tmp_path, url, source, why):
        write_module(tmp_path, source, "broken")
        assert why in refused(tmp_path, url, module="broken")

    def test_a_module_that_is_not_there(self, tmp_path, url):
        assert "No module named 'nonesuch'" in refused(tmp_path, url, module="nonesuch")

    def test_a_name_that_is_taken(self, shared, directory, url):
        said = refused(directory, url, "--name", "gpu")
        assert f"the node name {shared.name} is taken by process {shared.child()}" in said

    def test_a_store_that_cannot_be_reached(self, directory):
        said = refused(directory, "redis://:pass-word@127.0.0.1:1/0?timeout=0.2")
        assert "127.0.0.1:1" in said
        assert "pass-word" not in said

    def test_a_store_of_one_process(self, directory):
        assert "give one that is shared" in refused(directory, "memory://")

    def test_a_name_that_is_none(self, directory, url):
        assert "'a b@" in refused(directory, url, "--name", "a b")

    @pytest.mark.parametrize(
        ("option", "value", "hint"),
        [
            pytest.param("--concurrency", "0", "give a whole number, 1 or more", id="concurrency"),
            pytest.param("--graceful-timeout", "nan", "give seconds, 0 or more", id="no seconds"),
            pytest.param("--graceful-timeout", "-1", "give seconds, 0 or more", id="negative"),
            pytest.param("--log-level", "loud", "give debug, info, warning, error", id="level"),
        ],
    )
    def test_options_that_make_no_sense(self, option, value, hint, capsys):
        with pytest.raises(SystemExit) as caught:
            cli.main(["node", "ml_worker", option, value])
        assert caught.value.code == 2
        assert f"argument {option}: {hint}" in capsys.readouterr().err

    def test_the_environment_names_it_and_logs_are_json(self, directory, url):
        env = {"HORNBEAM_NODE": "env-named"}
        with NodeCommand(directory, url, "--json-logs", env=env) as node:
            assert node.ready().name.startswith("env-named@")
            node.end()
            assert node.wait() == 0
        lines = [json.loads(line) for line in node.log.splitlines()]
        assert {"time", "level", "logger", "pid", "message"} == set(lines[0])
        assert f"The node {node.name} is ready" in [line["message"] for line in lines]

    def test_a_warning_is_json_too(self, tmp_path, url):
        source = "import warnings\nfrom hornbeam_state import expose\nwarnings.warn('old')\nexpose(len, module='m')\n"
        write_module(tmp_path, source, module="warns")
        with NodeCommand(tmp_path, url, "--json-logs", module="warns") as node:
            node.ready()
            lines = [json.loads(line) for line in node.log.splitlines()]
        [warned] = [line for line in lines if line["logger"] == "py.warnings"]
        assert "UserWarning: old" in warned["message"]

    def test_without_a_name_it_has_that_of_the_module(self, directory, url):
        with NodeCommand(directory, url) as node:
            assert node.ready().name.startswith("ml_worker@")


class TestEnding:
    def test_calls_that_run_finish_and_new_ones_are_refused(self, directory, url, gate):
        with NodeCommand(directory, url, "--name", "drains") as node:
            thread, outcomes = waits(node.ready().name, gate)
            node.end()

            def is_refused():
                try:
                    rpc_call(node.name, "ml_worker", "pid")
                except NodeDown as error:
                    return not error.sent
                return False

            poll(is_refused, "new calls are refused")
            assert nodes("drains") == []
            gate.touch()
            thread.join(30)
            assert node.wait() == 0
        assert outcomes == ["done"]

    @pytest.mark.slow
    def test_calls_that_do_not_finish_are_given_up(self, directory, url, gate):
        options = ("--name", "gives-up", "--graceful-timeout", "0.2")
        with NodeCommand(directory, url, *options) as node:
            thread, outcomes = waits(node.ready().name, gate)
            node.end()
            assert node.wait() == 0
            thread.join(30)
        assert isinstance(outcomes[0], NodeDown)
        assert outcomes[0].sent

    @pytest.mark.slow
    def test_a_second_signal_ends_it_at_once(self, directory, url, gate):
        with NodeCommand(directory, url, "--name", "twice") as node:
            thread, outcomes = waits(node.ready().name, gate)
            node.end(signal.SIGINT)
            poll(lambda: "ends; 1 calls run" in node.log, "it drains")
            node.end(signal.SIGINT)
            assert node.wait(10) == 0
            thread.join(30)
        assert isinstance(outcomes[0], NodeDown)

    @pytest.fixture
    def hangups(self):
        """Return what says how processes that are started now take the end of their terminal."""
        before = signal.getsignal(signal.SIGHUP)
        yield partial(signal.signal, signal.SIGHUP)
        signal.signal(signal.SIGHUP, before)

    def test_it_ends_with_its_terminal(self, directory, url, gate, hangups):
        """Which tells all its processes; a call that runs is finished all the same."""
        hangups(signal.SIG_DFL)
        with NodeCommand(directory, url, "--name", "hung-up") as node:
            thread, outcomes = waits(node.ready().name, gate)
            os.kill(node.child(), signal.SIGHUP)
            node.end(signal.SIGHUP)
            poll(lambda: "ends; 1 calls run" in node.log, "it drains")
            gate.touch()
            thread.join(30)
            assert node.wait() == 0
        assert outcomes == ["done"]
        assert "starting it again" not in node.log

    def test_it_outlives_its_terminal_under_nohup(self, directory, url, hangups):
        hangups(signal.SIG_IGN)
        with NodeCommand(directory, url, "--name", "stays") as node:
            child = node.ready().child()
            os.kill(child, signal.SIGHUP)
            node.end(signal.SIGHUP)
            assert rpc_call(node.name, "ml_worker", "pid", timeout_ms=10_000) == child
            node.end()
            assert node.wait() == 0
        assert "starting it again" not in node.log

    def test_a_killed_process_is_started_again_under_its_name(self, directory, url):
        with NodeCommand(directory, url, "--name", "phoenix") as node:
            first = node.ready().child()
            os.kill(first, signal.SIGKILL)
            node.ready(2)
            assert node.said[0] == node.said[1]
            again = rpc_call(node.name, "ml_worker", "pid", timeout_ms=10_000)
        assert again != first
        assert "ended with signal 9; starting it again in 0.0 s" in node.log

    def test_it_dies_with_its_parent(self, directory, url, gate):
        with NodeCommand(directory, url, "--name", "orphan") as node:
            thread, outcomes = waits(node.ready().name, gate)
            child = node.child()
            node.process.kill()
            node.process.wait()
            poll(lambda: not alive(child), "the child has ended")
            thread.join(10)
        assert isinstance(outcomes[0], NodeDown)

    @pytest.mark.slow
    def test_a_module_that_breaks_later_is_tried_again(self, tmp_path, url):
        write_module(tmp_path, WORKER)
        with NodeCommand(tmp_path, url, "--name", "mended") as node:
            child = node.ready().child()
            write_module(tmp_path, "import nonesuch")
            os.kill(child, signal.SIGKILL)
            poll(lambda: "ended with status 2; starting it again in 1.0 s" in node.log, "it fails")
            write_module(tmp_path, WORKER)
            node.ready(2)


SUPERVISES = """
import sys
from functools import partial
from hornbeam_ml.supervisor import supervise

def run(_index, loaded):
    print("runs", flush=True)
    if sys.argv[1] == "loads":
        loaded()
    return 2

sys.exit(supervise(run, what="It", grace=1.0, fatal=2))
"""


@pytest.mark.parametrize(("loads", "status"), [("never", 2), ("loads", 0)])
def test_a_fatal_status_counts_until_a_process_has_loaded(loads, status):
    command = [sys.executable, "-c", SUPERVISES, loads]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        if loads == "loads":
            assert [child.stdout.readline() for _ in range(2)] == [b"runs\n"] * 2
            child.terminate()
        assert child.wait(30) == status


SIGNALLED = """
import os, signal, sys, time
from hornbeam_ml.supervisor import supervise

real, forks = os.fork, []

def fork():
    forks.append(1)
    pid = real()
    told = pid if sys.argv[1] == "before it runs" else 0 if pid else os.getpid()
    if told and len(forks) == 1:
        os.kill(told, signal.SIGTERM)
    return pid

def run(_index, _loaded):
    if len(forks) == 1:
        time.sleep(5)  # the signal may come as late as this
    print(len(forks), flush=True)
    return 2

os.fork = fork
sys.exit(supervise(run, what="It", grace=1.0, fatal=2))
"""


@pytest.mark.parametrize("when", ["before it runs", "before its handlers"])
def test_a_process_that_is_told_to_end_while_it_begins_does(capfd, when):
    child = subprocess.run([sys.executable, "-c", SIGNALLED, when], timeout=30, check=False)
    assert (child.returncode, capfd.readouterr().out) == (2, "2\n")


def test_a_process_that_never_loads_is_tried_again_for_good():
    place = supervisor._Place(0)
    pauses = [place.end() for _ in range(1100)]
    assert pauses[:6] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0]
    assert set(pauses[6:]) == {30.0}
