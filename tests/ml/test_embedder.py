"""The embedder: its vectors are those of sentence-transformers, on every backend, from any thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from embedding_models import DIM, REAL, make_model, prepare_here, some_texts
from serving_helpers import until

from hornbeam_ml import Embedder, ModelError, cache_scope, predict, with_stream
from hornbeam_ml.embedder import loading, workshop
from hornbeam_ml.embedder.measurements import Measurement, Report, fastest
from hornbeam_ml.embedder.probe import least_cosine
from hornbeam_ml.embedder.wish import Wish
from hornbeam_ml.embedder.workshop import Workshop, workshop_for
from hornbeam_ml.streams import Stream
from hornbeam_state.errors import ConfigError, DeadlineExceeded, Overloaded

TEXTS = ["", "a", "the cat sat on the mat", "naïve café, 東京", *some_texts(20), "word " * 300]


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory):
    """A directory for converted models that is these tests' own."""
    place = tmp_path_factory.mktemp("kept")
    before = os.environ.get("HORNBEAM_CACHE")
    os.environ["HORNBEAM_CACHE"] = str(place)
    yield place
    if before is None:
        del os.environ["HORNBEAM_CACHE"]
    else:
        os.environ["HORNBEAM_CACHE"] = before


@pytest.fixture(autouse=True)
def in_this_process(request, monkeypatch):
    """Convert and measure here.

    Tests that ask for `own_process` do it as it is done.
    """
    if "own_process" not in request.fixturenames:
        monkeypatch.setattr(loading, "_run_preparation", prepare_here)


@pytest.fixture
def own_process():
    """Leave the preparation to the program that is there for it."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small model and where it lies."""
    path = tmp_path_factory.mktemp("tiny")
    return make_model(path), path / "model"


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    """An export of it."""
    path = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch, Embedder(tiny[1]) as embedder:
        patch.setattr(loading, "_run_preparation", prepare_here)
        embedder.export(path)
    return path


# Equality with sentence-transformers.


@pytest.mark.parametrize(
    ("backend", "precision", "cosine"),
    [
        pytest.param("torch", "exact", 0.999999, id="torch"),
        pytest.param("openvino", "fp32", 0.999999, id="openvino"),
        pytest.param("onnx", "exact", 0.999999, id="onnx"),
        pytest.param("onnx", "int8", 0.9, id="int8"),
        pytest.param("sentence-transformers", "auto", 0.999999, id="itself"),
        pytest.param("auto", "auto", 0.999, id="auto"),
        pytest.param("auto", "exact", 0.999999, id="exact"),
    ],
)
def test_vectors_are_those_of_sentence_transformers(tiny, backend, precision, cosine):
    """For empty, short, long and odd texts, alone and together."""
    model, path = tiny
    wanted = model.encode(TEXTS)
    with Embedder(path, backend=backend, precision=precision, cache=False) as embedder:
        vectors = embedder.encode(TEXTS)
        alone = np.stack([embedder.encode(text) for text in TEXTS])
        assert vectors.dtype == alone.dtype == np.float32
        assert vectors.shape == wanted.shape == (len(TEXTS), DIM)
        assert least_cosine(vectors, wanted) >= cosine
        assert least_cosine(alone, wanted) >= cosine
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
        assert embedder.dim == DIM
        if backend != "auto":
            assert embedder.backend == backend
        if precision == "exact":
            assert embedder.precision == "fp32"


# What is converted is the hard part; torch runs the checkpoint's own modules.
@pytest.mark.parametrize("backend", [pytest.param("torch", marks=pytest.mark.slow), "openvino"])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"pooling": "cls"}, id="first token"),
        pytest.param({"pooling": "max", "normalize": False}, id="maximum, not normalised"),
        pytest.param({"pooling": "mean_sqrt_len_tokens"}, id="root of the length"),
        pytest.param({"pooling": "lasttoken"}, id="last token"),
        pytest.param({"dense": True}, id="dense layer"),
        pytest.param({"max_length": 12}, id="short texts only"),
        pytest.param(
            {"prompts": {"query": "query: "}, "default_prompt_name": "query"}, id="a prompt"
        ),
    ],
)
def test_any_model_works(tmp_path, settings, backend):
    """Pooling, dense layers, prompts and the longest text are the model's own."""
    model = make_model(tmp_path, seed=1, **settings)
    wanted = model.encode(TEXTS)
    embedder = Embedder(tmp_path / "model", backend=backend, precision="fp32", cache=False)
    with embedder:
        assert least_cosine(embedder.encode(TEXTS), wanted) >= 0.99999
        assert np.allclose(embedder.encode(TEXTS), wanted, atol=1e-4)
        assert embedder.dim == wanted.shape[1]
        assert embedder.backend == backend


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_model_that_needs_more_than_tokens_runs_as_it_is(tmp_path, caplog, backend):
    """Its pooling leaves the prompt out, which token ids do not say."""
    model = make_model(
        tmp_path,
        prompts={"query": "some prompt of its own: "},
        default_prompt_name="query",
        pooling_options={"include_prompt": False},
    )
    with Embedder(tmp_path / "model", backend=backend, cache=False) as embedder:
        assert np.allclose(embedder.encode(TEXTS), model.encode(TEXTS), atol=1e-5)
        assert embedder.backend == "sentence-transformers"
        assert np.linalg.norm(embedder.encode("a", normalize=False)) != pytest.approx(1, abs=1e-3)
    (record,) = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert "SentenceTransformer.encode, since" in record.getMessage()


@pytest.mark.slow
def test_the_real_model_keeps_its_cosine():
    """all-MiniLM-L6-v2, in whatever precision was found to be the fastest."""
    from sentence_transformers import SentenceTransformer

    texts = [*TEXTS, *some_texts(40, seed=7)]
    wanted = SentenceTransformer(str(REAL), device="cpu").encode(texts)
    with Embedder(REAL, backend="openvino", cache=False) as embedder:
        assert least_cosine(embedder.encode(texts), wanted) >= 0.999
        assert embedder.dim == 384


def test_normalisation_can_be_chosen(tiny):
    """None: as the model does it; the two others are the same vectors, scaled."""
    with Embedder(tiny[1], backend="torch", precision="exact") as embedder:
        plain = embedder.encode("some text", normalize=False)
        scaled = embedder.encode("some text", normalize=True)
        assert np.linalg.norm(plain) != pytest.approx(1, abs=0.01)
        assert np.linalg.norm(scaled) == pytest.approx(1, abs=1e-6)
        assert np.allclose(plain / np.linalg.norm(plain), scaled, atol=1e-6)
        assert np.array_equal(embedder.encode("some text"), scaled)


# Calls.


async def test_threads_and_tasks_get_their_own(tiny):
    """32 threads and 32 tasks at the same time, each with other texts."""
    model, path = tiny
    texts = some_texts(256, seed=3)
    wanted = model.encode(texts)
    with Embedder(path, backend="torch", precision="exact", cache=False) as embedder:
        with ThreadPoolExecutor(32) as pool:
            from_threads = list(pool.map(embedder.encode, texts))
        from_tasks = await asyncio.gather(*[embedder.aencode(text) for text in texts])
        together = await embedder.aencode(texts)
        stats = embedder.stats()
    for vectors in (from_threads, from_tasks, together):
        assert np.allclose(vectors, wanted, atol=1e-5)
    assert stats.batches < stats.items == 3 * len(texts)
    assert stats.padding < 0.5


async def test_what_is_no_text_is_refused(tiny):
    """The caller hears of it, and nobody else."""
    with Embedder(tiny[1], backend="torch") as embedder:
        for wrong in (None, 3, b"bytes", ["fine", None]):
            with pytest.raises(TypeError):
                embedder.encode(wrong)
            with pytest.raises(TypeError):
                await embedder.aencode(wrong)
        assert embedder.encode([]).shape == (0, DIM)
        assert (await embedder.aencode([])).shape == (0, DIM)
        assert embedder.encode(("a", "b")).shape == (2, DIM)


def test_inline_calls_run_on_the_current_stream(tiny):
    """Apart from other callers and without the cache."""
    used = []
    with Embedder(tiny[1], backend="torch", precision="exact") as embedder, Stream() as stream:
        wanted = embedder.encode(TEXTS)
        run = embedder._model.engine.run

        def noting(batch):
            used.append(threading.current_thread().name)
            return run(batch)

        embedder._model.engine.run = noting
        vectors = with_stream(stream, lambda: embedder.encode(TEXTS, inline=True))
    assert np.allclose(vectors, wanted, atol=1e-6)
    assert used
    assert all(name == used[0] for name in used)
    assert threading.current_thread().name not in used


def test_predict_knows_it_by_name(tiny):
    """With the vectors that encode gives."""
    with Embedder(tiny[1], backend="torch", precision="exact", name="texts") as embedder:
        assert np.array_equal(predict("texts", "some text"), embedder.encode("some text"))


def test_deadlines_and_the_queue_hold(tiny):
    """As for any serving."""
    go_on = threading.Event()
    embedder = Embedder(tiny[1], backend="torch", cache=False, queue_limit=1, precision="exact")
    with embedder:
        embedder.start()
        run = embedder._model.engine.run

        def slow(batch):
            go_on.wait(30)
            return run(batch)

        embedder._model.engine.run = slow
        streams = embedder._model.wish.streams
        with ThreadPoolExecutor(streams) as pool:
            busy = []
            while len(busy) < streams:
                busy.append(pool.submit(embedder.encode, "busy"))
                until(lambda: embedder.stats().running == len(busy), "it runs")
            with pytest.raises(DeadlineExceeded):
                embedder.encode("late", timeout_ms=10)
            waiting = threading.Thread(target=embedder.encode, args=("waits",))
            waiting.start()
            until(lambda: embedder.stats().queued, "it waits")
            with pytest.raises(Overloaded):
                embedder.encode("one too many")
            go_on.set()
            assert all(each.result(30).shape == (DIM,) for each in busy)
            waiting.join(30)


# The cache.


async def test_each_text_is_computed_once(tiny):
    """By whomever, alone or among others; a changed vector is its caller's own."""
    with Embedder(tiny[1], backend="torch", precision="exact") as embedder:
        texts = some_texts(20, seed=11)
        with cache_scope() as scope:
            first = embedder.encode(texts)
        assert (scope.misses, scope.hits) == (20, 0)
        with cache_scope() as scope:
            first[0][:] = 0
            again = await embedder.aencode([*texts, texts[0]])
            one = await embedder.aencode(texts[0])
        assert (scope.misses, scope.hits + scope.coalesced) == (0, 22)
        assert embedder.stats().items == 20
        assert np.array_equal(again[0], one)
        assert np.linalg.norm(one) == pytest.approx(1, abs=1e-5)


async def test_a_long_list_waits_for_room_in_the_queue(tiny):
    """With the cache too, where each text is a call of its own; nothing is refused."""
    texts = some_texts(150, seed=5)
    with Embedder(tiny[1], backend="torch", precision="exact", queue_limit=40) as embedder:
        vectors = await embedder.aencode(texts)
        with cache_scope() as scope:
            again = await asyncio.to_thread(embedder.encode, texts)
        stats = embedder.stats()
    assert np.allclose(vectors, tiny[0].encode(texts), atol=1e-6)
    assert np.array_equal(vectors, again)
    assert (scope.hits, stats.refused) == (150, 0)


async def test_a_deadline_is_for_all_texts_of_a_call(tiny):
    """The last ones begin late."""
    texts = some_texts(200, seed=6)
    with Embedder(tiny[1], backend="sentence-transformers", queue_limit=40) as embedder:
        embedder.start()
        with pytest.raises(DeadlineExceeded):
            await embedder.aencode(texts, timeout_ms=20)
        with pytest.raises(DeadlineExceeded):
            await asyncio.to_thread(embedder.encode, texts, timeout_ms=20)


def test_models_and_precisions_do_not_share_entries(tiny, tmp_path):
    """Nor do normalised vectors and others."""
    make_model(tmp_path, seed=5)
    with (
        Embedder(tiny[1], backend="torch", precision="exact") as one,
        Embedder(tmp_path / "model", backend="torch", precision="exact") as other,
        Embedder(tiny[1], backend="openvino", precision="exact") as third,
    ):
        text = "the same text for all"
        vectors = [each.encode(text) for each in (one, other, third)]
        assert not np.allclose(vectors[0], vectors[1], atol=0.01)
        assert np.allclose(vectors[0], vectors[2], atol=1e-4)
        assert one.fingerprint == third.fingerprint != other.fingerprint
        assert [each.stats().items for each in (one, other, third)] == [1, 1, 1]


def test_the_fingerprint_is_of_the_content(tiny, tmp_path):
    """A copy is the same model; one trained again in place is another."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny[1], copy)
    (copy / "README.md").write_text("other words")
    assert Embedder(copy).fingerprint == Embedder(tiny[1]).fingerprint
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert Embedder(copy).fingerprint != Embedder(tiny[1]).fingerprint


# Choosing, converting, keeping.


def found(backend, precision, speed, cosine=1.0, problem=""):
    return Measurement(
        backend=backend, precision=precision, texts_per_s=speed, cosine=cosine, problem=problem
    )


@pytest.mark.parametrize(
    ("measurements", "best"),
    [
        pytest.param([], None, id="none"),
        pytest.param([found("torch", "fp32", 1)], "torch fp32", id="the only one"),
        pytest.param([found("torch", "fp32", 1), found("onnx", "fp32", 2)], "onnx fp32", id="faster"),
        pytest.param([found("torch", "fp32", 1), found("onnx", "fp32", 2, 0.9989)], "torch fp32", id="not as good"),
        pytest.param([found("torch", "fp32", 1), found("onnx", "fp32", 0, 0, "broken")], "torch fp32", id="broken"),
        pytest.param([found("onnx", "fp32", 9, 0.998)], None, id="fp32 that is something else"),
        pytest.param([found("onnx", "int8", 9, 0.98)], "onnx int8", id="asked for"),
        pytest.param([found("onnx", "int8", 0, 0, "broken")], None, id="asked for, broken"),
    ],
)  # fmt: skip
def test_the_fastest_that_is_as_good_is_taken(measurements, best):
    chosen = Report(measurements=measurements).best()
    assert (chosen and f"{chosen.backend} {chosen.precision}") == best
    if len(measurements) > 1:
        assert fastest(measurements) == chosen


@pytest.mark.parametrize(
    ("backend", "precision", "device", "expected"),
    [
        pytest.param("auto", "auto", "cpu", "tf tb of ob nf", id="auto"),
        pytest.param("auto", "exact", "cpu", "tf of nf", id="exact"),
        pytest.param("auto", "bf16", "cpu", "tb ob", id="bf16"),
        pytest.param("auto", "int8", "cpu", "ni", id="int8"),
        pytest.param("auto", "auto", "cuda:0", "tf tb", id="on a GPU"),
        pytest.param("onnx", "auto", "cpu", "nf", id="one library"),
    ],
)
def test_candidates(backend, precision, device, expected):
    wish = Wish(backend=backend, precision=precision, device=device, streams=2)
    letters = {"torch": "t", "openvino": "o", "onnx": "n"}
    pairs = wish.candidates(installed=list(letters), has_bf16=True)
    assert " ".join(letters[name] + precision[0] for name, precision in pairs) == expected


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"backend": "tensorflow"}, id="backend"),
        pytest.param({"precision": "fp8"}, id="precision"),
        pytest.param({"backend": "torch", "precision": "int8"}, id="both"),
        pytest.param({"device": "tpu"}, id="device"),
        pytest.param({"max_batch_tokens": -1}, id="tokens"),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_once(settings):
    with pytest.raises(ConfigError):
        Embedder("anything", **settings)


def test_a_model_that_is_not_there_is_named(tmp_path):
    with Embedder(tmp_path / "nowhere") as embedder, pytest.raises(ModelError, match="no dir"):
        embedder.encode("a")
    (tmp_path / "empty").mkdir()
    with Embedder(tmp_path / "empty") as embedder, pytest.raises(ModelError, match="empty"):
        embedder.encode("a")


def test_the_choice_is_made_once(tiny, caplog, own_process):
    """And said in one line; a later process opens the files, and needs no torch."""
    caplog.set_level(logging.INFO, "hornbeam.embedder")
    with Embedder(tiny[1], precision="exact") as embedder:
        chosen = embedder.backend
    (line,) = [each.getMessage() for each in caplog.records if "fastest of" in each.getMessage()]
    assert f"runs on {chosen} fp32" in line
    program = (
        "import sys; from hornbeam_ml import Embedder;"
        f"e = Embedder({str(tiny[1])!r}, backend='openvino', precision='fp32', cache=False);"
        "print(e.encode('a').shape, 'torch' in sys.modules)"
    )
    with Embedder(tiny[1], backend="openvino", precision="fp32") as embedder:
        embedder.start()
    assert run(program) == f"({DIM},) False"


def test_a_file_that_was_lost_is_made_again(tiny):
    """Somebody cleaned up."""
    with Embedder(tiny[1], backend="openvino", precision="fp32", cache=False) as embedder:
        wanted = embedder.encode("some text")
    kept = workshop_for(embedder.fingerprint)
    for name in ("openvino/model.xml", "openvino/model.bin"):
        kept.path(name).unlink()
    with Embedder(tiny[1], backend="openvino", precision="fp32", cache=False) as embedder:
        assert np.allclose(embedder.encode("some text"), wanted, atol=1e-6)


def test_without_a_place_to_keep_things_torch_does(tiny, tmp_path, monkeypatch, caplog):
    """A server in a read-only container serves; it says why it is slow."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HORNBEAM_CACHE", str(tmp_path / "file"))
    with Embedder(tiny[1]) as embedder:
        assert (embedder.backend, embedder.precision) == ("torch", "fp32")
    assert "HORNBEAM_CACHE" in caplog.text
    with Embedder(tiny[1], backend="openvino") as embedder, pytest.raises(ModelError):
        embedder.encode("a")


@pytest.mark.slow
def test_others_wait_for_the_one_that_converts(tiny, tmp_path):
    """Four processes start at once on a machine that has not seen the model."""
    program = (
        "from hornbeam_ml import Embedder;"
        f"print(Embedder({str(tiny[1])!r}, backend='openvino', cache=False).encode('a').shape)"
    )
    environ = {**os.environ, "HORNBEAM_CACHE": str(tmp_path)}
    with ThreadPoolExecutor(4) as pool:
        shapes = list(pool.map(lambda _: run(program, environ), range(4)))
    assert shapes == [f"({DIM},)"] * 4
    (directory,) = (tmp_path / "embedders").iterdir()
    assert len(list(directory.glob("choice-*.json"))) == 1


def test_a_preparation_ends_with_its_process(tiny, tmp_path):
    """A server that is stopped while it converts leaves nothing behind that computes."""
    program = (
        "from hornbeam_ml import Embedder;"
        f"Embedder({str(tiny[1])!r}, backend='openvino').encode('a')"
    )
    environ = {**os.environ, "HORNBEAM_CACHE": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", program], env=environ) as process:
        children = Path(f"/proc/{process.pid}/task").glob

        def preparing():
            with contextlib.suppress(OSError):  # a thread or another child has just ended
                pids = "".join(path.read_text() for path in children("*/children")).split()
                found = [Path(f"/proc/{pid}/cmdline").read_text() for pid in pids]
                return [pid for pid, line in zip(pids, found, strict=True) if "prepare" in line]
            return []

        (child,) = until(preparing, "it prepares")
        time.sleep(0.5)  # it has begun to import
        process.kill()
    until(lambda: not Path(f"/proc/{child}").exists(), "it ends too")


def test_an_export_runs_without_torch(tiny, exported):
    """On onnxruntime and on openvino, each alone; the vectors are the same."""
    wanted = tiny[0].encode(TEXTS[:8])
    for backend, hidden in (("onnx", "openvino"), ("openvino", "onnxruntime")):
        program = f"""
import importlib.util, json, sys
find = importlib.util.find_spec
gone = ("torch", "sentence_transformers", "transformers", {hidden!r})
importlib.util.find_spec = lambda name, *rest: None if name in gone else find(name, *rest)
for name in gone:
    sys.modules[name] = None
from hornbeam_ml import Embedder
embedder = Embedder({str(exported)!r}, precision="exact", cache=False)
print(json.dumps([embedder.encode({TEXTS[:8]!r}).tolist(), embedder.backend, embedder.fingerprint]))
"""
        vectors, used, fingerprint = json.loads(run(program))
        assert used == backend
        assert np.allclose(vectors, wanted, atol=1e-4)
        assert fingerprint == Embedder(tiny[1]).fingerprint


def test_an_export_is_measured_once(exported, monkeypatch):
    """Its files lie elsewhere than the choice among them."""
    with Embedder(exported, precision="exact", cache=False) as embedder:
        wanted = embedder.encode("some text")
    monkeypatch.setattr(loading, "_run_preparation", None)  # would raise
    with Embedder(exported, precision="exact", cache=False) as embedder:
        assert np.array_equal(embedder.encode("some text"), wanted)


def test_other_versions_of_the_libraries_convert_anew(tmp_path, monkeypatch):
    """A file of one version may not be what another one reads."""
    here = {"HORNBEAM_CACHE": str(tmp_path)}
    before = workshop_for("abc", here).directory
    assert workshop_for("abc", here).directory == before
    monkeypatch.setattr(workshop, "_version", lambda name: f"{name} of tomorrow")
    assert workshop_for("abc", here).directory != before


def test_an_export_has_no_weights_for_torch(exported):
    with Embedder(exported, backend="torch") as embedder, pytest.raises(ModelError):
        embedder.encode("a")


def test_half_written_files_are_never_seen(tmp_path):
    """A converter that fails leaves nothing under the name."""
    workshop = Workshop(tmp_path)

    def fail():
        with workshop.writing("a/model.xml") as path:
            path.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list((tmp_path / "a").iterdir()) == []
    with workshop.writing("a/model.xml") as path:
        path.write_text("whole")
        path.with_suffix(".bin").write_text("more")
    assert {each.name for each in (tmp_path / "a").iterdir()} == {"model.xml", "model.bin"}
    assert not list(tmp_path.glob(".new-*"))


def run(program, environ=None):
    """Run a program in a process of its own; return the last line it prints."""
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=environ or dict(os.environ),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout.strip().splitlines()[-1]
