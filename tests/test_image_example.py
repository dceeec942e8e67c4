"""The image classifier of the examples, under a real gunicorn: one worker, so one set of figures."""

import asyncio
import importlib.util
import json
import os
import signal
import socket
import struct
import sys
import threading
import zlib
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest
from gunicorn_process import Gunicorn
from PIL import Image

from hornbeam_ml import Serving

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "image_classifier"
TOO_LARGE = 10_000_000


def example_module(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


shapes = example_module("shapes")


class Service:
    """The example, served for as long as this module's tests run."""

    def __init__(self, server):
        self.server = server
        self._client = server.client(60, keeps=False)

    def close(self):
        self._client.close()

    def post(self, content):
        return self._client.post("/classify", content=content)

    def classify(self, png):
        response = self.post(png)
        assert response.status_code == 200, response.text
        return response.json()

    def classify_at_once(self, pngs):
        """Have all requests lie there before the worker reads the first."""
        [worker] = self.server.workers()
        url = httpx.URL(self.server.url)
        with ExitStack() as stack:
            os.kill(worker, signal.SIGSTOP)
            stack.callback(os.kill, worker, signal.SIGCONT)
            callers = [
                stack.enter_context(socket.create_connection((url.host, url.port), 60))
                for _ in pngs
            ]
            for caller, png in zip(callers, pngs, strict=True):
                head = f"POST /classify HTTP/1.0\r\ncontent-length: {len(png)}\r\n\r\n"
                caller.sendall(head.encode() + png)
            os.kill(worker, signal.SIGCONT)
            return [read_answer(caller) for caller in callers]

    def stats(self):
        return self._client.get("/stats").json()


def read_answer(caller):
    with caller.makefile("rb") as file:
        head, _, body = file.read().partition(b"\r\n\r\n")
    assert b" 200 " in head.splitlines()[0], head
    return json.loads(body)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    directory = tmp_path_factory.mktemp("image_classifier")
    env = {
        "HORNBEAM_STORE": f"lmdb://{directory}/store",
        "HORNBEAM_THREADS": "1",
        "PYTHONWARNINGS": "always",
    }
    with Gunicorn("app:app", "--chdir", str(EXAMPLE), cwd=directory, env=env) as server:
        server.logged("Ready: ", 240)
        served = Service(server)
        yield served
        served.close()


@pytest.fixture(scope="module")
def drawings():
    """Drawings that the network has not seen, with what is on them."""
    rng = np.random.default_rng(12345)
    labels = [shapes.SHAPES[number % 3] for number in range(32)]
    return [(label, shapes.png(shapes.draw(label, rng))) for label in labels]


def test_shapes_are_told_apart(service, drawings):
    """By a network that is right nearly always, and says how sure it is."""
    right = 0
    for label, png in drawings:
        answer = service.classify(png)
        probabilities = answer["probabilities"]
        assert list(probabilities) == ["circle", "square", "triangle"]
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-4)
        assert answer["label"] == max(probabilities, key=probabilities.get)
        right += answer["label"] == label
    assert right >= 29


def test_requests_at_once_share_batches_and_get_their_own_answers(service, drawings):
    """Within rounding the answers they get alone, which do not depend on neighbours or padding."""
    alone = [service.classify(png) for _, png in drawings]
    before = service.stats()
    together = service.classify_at_once([png for _, png in drawings])
    after = service.stats()
    for one, other in zip(alone, together, strict=True):
        assert one["label"] == other["label"]
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-4)
    assert len({answer["probabilities"]["circle"] for answer in together}) > 16
    assert after["items"] - before["items"] == 32
    assert 2 <= after["batches"] - before["batches"] < 32
    assert after["padded_tokens"] >= after["tokens"] == after["items"]


@pytest.mark.parametrize("mode", ["P", "RGB", "RGBA", "LA"])
def test_any_kind_of_png_is_looked_at(service, mode):
    drawn = shapes.draw("triangle", np.random.default_rng(1))
    assert service.classify(shapes.png(drawn.convert(mode)))["label"] == "triangle"


# Bad input


def png_of_size(width, height):
    return shapes.png(Image.new("L", (width, height)))


def header_of_size(width, height):
    """Return a PNG file that is no more than the promise of an image."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(chunk) - 4)
    return head + chunk + struct.pack(">I", zlib.crc32(chunk)) + data


@pytest.mark.parametrize(
    ("content", "status", "expected"),
    [
        pytest.param(b"", 422, "send an image", id="nothing"),
        pytest.param(b'{"image": "triangle"}', 422, "no sound PNG", id="json"),
        pytest.param(b"GIF89a" + b"\0" * 50, 422, "no sound PNG", id="gif"),
        pytest.param(png_of_size(32, 32)[:50], 422, "no sound PNG", id="half-png"),
        pytest.param(header_of_size(32, 32), 422, "no sound PNG", id="no-pixels"),
        pytest.param(png_of_size(31, 32), 422, "32 x 32 pixels, not 31 x 32", id="narrow"),
        pytest.param(png_of_size(640, 480), 422, "not 640 x 480", id="large-image"),
        pytest.param(header_of_size(9000, 9000), 422, "not 9000 x 9000", id="huge-image"),
        pytest.param(header_of_size(2**31 - 1, 2**31 - 1), 422, "no sound PNG", id="bomb"),
        pytest.param(b"a" * TOO_LARGE, 413, "100,000 bytes", id="10-mb"),
    ],
)
def test_bad_input_is_answered_with_what_is_wrong(service, content, status, expected):
    """Nothing of it reaches the network."""
    before = service.stats()
    response = service.post(content)
    assert response.status_code == status, response.text
    assert list(response.json()) == ["detail"]
    assert expected in response.json()["detail"]
    assert service.stats() == before


def test_a_large_body_of_unknown_length_is_refused(service):
    response = service.post(b"a" * 100_000 for _ in range(100))
    assert response.status_code == 413


async def test_a_full_queue_is_answered_with_503(monkeypatch, drawings):
    """Those that found room are answered when their batch has run."""
    monkeypatch.setitem(sys.modules, "shapes", shapes)
    example = example_module("app")
    example.classifier.close()
    go = threading.Event()

    def classify(images):
        assert go.wait(20)
        return np.tile(np.float32([0.7, 0.2, 0.1]), (len(images), 1))

    png = drawings[0][1]
    async with (
        Serving(
            lambda: classify,
            preprocess=example.decode,
            postprocess=example.answer,
            collate="stack",
            batch_size=1,
            queue_limit=1,
        ) as example.classifier,
        httpx.AsyncClient(
            transport=httpx.ASGITransport(example.app), base_url="http://test"
        ) as client,
    ):
        running = asyncio.create_task(client.post("/classify", content=png))
        await until(lambda: example.classifier.stats().running == 1)
        waiting = asyncio.create_task(client.post("/classify", content=png))
        await until(lambda: example.classifier.stats().queued == 1)
        refused = await client.post("/classify", content=png)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "Try again" in refused.json()["detail"]
        go.set()
        for answered in (await running, await waiting):
            assert answered.json()["label"] == "circle"


async def until(check):
    async with asyncio.timeout(20):
        while not check():  # noqa: ASYNC110 - figures do not wake anybody
            await asyncio.sleep(0.01)


# Life


def test_the_server_ends_without_a_trace(service):
    """Comes last, as it leaves no server behind."""
    service.classify(png_of_size(32, 32))
    service.server.send(signal.SIGTERM)
    assert service.server.end(30) == 0
    assert "Traceback" not in service.server.log
    assert "Warning" not in service.server.log
