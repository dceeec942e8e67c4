"""What an embedder does when files, processes, callers or the model are not as they should be."""

from __future__ import annotations

import asyncio
import contextlib
import json
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
from embedding_models import DIM, make_model, prepare_here

from hornbeam_ml import Embedder, ModelError, ServingClosed, apredict, predict
from hornbeam_ml.embedder import conversion, loading
from hornbeam_ml.embedder.checkpoint import Checkpoint
from hornbeam_ml.embedder.directories import directory_of
from hornbeam_ml.embedder.measurements import Measurement, Report, Request
from hornbeam_ml.embedder.settings import Unsupported
from hornbeam_ml.embedder.workshop import SETTINGS, Workshop, workshop_for
from hornbeam_state.errors import ConfigError, DeadlineExceeded


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """A directory for converted models that is this test's own."""
    monkeypatch.setenv("HORNBEAM_CACHE", str(tmp_path / "kept"))


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    """Convert and measure in this process; the list of what was asked for."""
    requests = []

    def noted(request):
        requests.append(request)
        return prepare_here(request)

    monkeypatch.setattr(loading, "_run_preparation", noted)
    return requests


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Where models lie that were converted before."""
    return tmp_path_factory.mktemp("converted")


@pytest.fixture(autouse=True)
def convert_once(converted, monkeypatch):
    """Convert each model once for all tests, as that takes seconds."""

    def once(convert):
        def copied(model, path, *rest):
            weights = [round(float(part.double().sum()), 6) for part in model.parameters()]
            made = converted / f"{abs(hash(tuple(weights)))}-{path.suffix[1:]}"
            if not made.exists():
                made.mkdir()
                convert(model, made / path.name, *rest)
            shutil.copytree(made, path.parent, dirs_exist_ok=True)

        return copied

    for name in ("to_openvino", "to_onnx"):
        monkeypatch.setattr(conversion, name, once(getattr(conversion, name)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Where a small model lies."""
    path = tmp_path_factory.mktemp("tiny")
    make_model(path)
    return path / "model"


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Where another lies."""
    path = tmp_path_factory.mktemp("other")
    make_model(path, seed=5)
    return path / "model"


def on_openvino(model):
    return Embedder(model, backend="openvino", precision="fp32", cache=False)


@pytest.fixture
def quick_export(monkeypatch):
    """Exports are for one library: the other takes seconds."""
    monkeypatch.setattr(loading, "is_installed", lambda name: name == "openvino")


# Exports.


@pytest.mark.usefixtures("quick_export")
def test_the_choice_for_an_export_is_remembered(tiny, tmp_path, prepared):
    """A later start does not measure again."""
    Embedder(tiny).export(tmp_path / "export")
    prepared.clear()
    for _ in range(2):
        with Embedder(tmp_path / "export", cache=False) as embedder:
            embedder.start()
    assert len(prepared) == 1


@pytest.mark.usefixtures("quick_export")
def test_an_export_replaces_that_of_another_model(tiny, other, tmp_path):
    """As after training: nothing of the old one is left beside the new tokenizer."""
    path, copied = tmp_path / "export", tmp_path / "copied"
    Embedder(tiny).export(path)
    Embedder(tiny).export(copied)
    with on_openvino(path) as embedder:
        first = embedder.encode("some text")
    Embedder(other).export(path)
    with on_openvino(path) as embedder:
        assert embedder.fingerprint == Embedder(other).fingerprint
        assert abs(embedder.encode("some text") @ first) < 0.9
    Embedder(copied).export(path)
    with on_openvino(path) as embedder:
        assert np.allclose(embedder.encode("some text"), first, atol=1e-5)


@pytest.mark.usefixtures("quick_export")
def test_an_export_overwrites_no_model(tiny, other, tmp_path):
    """Neither the one it is made of, nor another that lies there."""
    with pytest.raises(ModelError, match="another directory"):
        Embedder(tiny).export(tiny)
    with pytest.raises(ModelError, match="another directory"):
        Embedder(tiny).export(other)
    assert not (tiny / SETTINGS).exists()
    Embedder(tiny).export(tmp_path / "export")
    with pytest.raises(ModelError, match="another directory"):
        Embedder(tmp_path / "export").export(tmp_path / "export")


# Kept files.


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        pytest.param("openvino/model.xml", "halved", marks=pytest.mark.slow),
        ("openvino/model.bin", "halved"),
        pytest.param("openvino/model.bin", "gone", marks=pytest.mark.slow),
        ("tokenizer.json", "halved"),
        ("hornbeam.json", "gone"),
    ],
)
def test_damaged_files_are_made_again(tiny, caplog, prepared, name, harm):
    """A full disk, a power cut: the next start heals it, and says so."""
    with on_openvino(tiny) as embedder:
        wanted = embedder.encode("some text")
    path = workshop_for(embedder.fingerprint).path(name)
    data = path.read_bytes()
    path.unlink()
    if harm == "halved":
        path.write_bytes(data[: len(data) // 2])
    for _ in range(2):
        with on_openvino(tiny) as embedder:
            assert np.allclose(embedder.encode("some text"), wanted, atol=1e-6)
    assert caplog.text.count("made again") == 1
    assert len(prepared) == 2


def test_a_damaged_session_is_noticed_when_it_is_opened(tiny):
    """By onnxruntime, too, before the first text comes."""
    with Embedder(tiny, backend="onnx", precision="fp32", cache=False) as embedder:
        wanted = embedder.encode("some text")
    path = workshop_for(embedder.fingerprint).path("onnx/model.onnx")
    path.write_bytes(path.read_bytes()[:1000])
    with Embedder(tiny, backend="onnx", precision="fp32", cache=False) as embedder:
        assert np.allclose(embedder.encode("some text"), wanted, atol=1e-6)


def test_a_failure_is_not_remembered_for_good(tiny, prepared, monkeypatch):
    """Disks are full at times; with an engine named there is nothing to remember at all."""
    measure = loading._run_preparation

    def on_a_full_disk(request):
        report = measure(request)
        failed = [
            found
            if found.backend == "torch"
            else Measurement(backend=found.backend, precision=found.precision, problem="no space")
            for found in report.measurements
        ]
        return Report(measurements=failed)

    monkeypatch.setattr(loading, "is_installed", lambda name: name != "onnx")
    monkeypatch.setattr(loading, "_run_preparation", on_a_full_disk)
    with on_openvino(tiny) as embedder, pytest.raises(ModelError, match="no space"):
        embedder.start()
    for _ in range(2):  # the second process of the same start
        with Embedder(tiny, precision="exact", cache=False) as embedder:
            assert embedder.backend == "torch"
    assert len(prepared) == 2
    monkeypatch.setattr(loading, "_run_preparation", measure)
    monkeypatch.setattr(loading, "FAILURES_COUNT_S", 0.0)
    with on_openvino(tiny) as embedder:
        embedder.start()
    with Embedder(tiny, precision="exact", cache=False) as embedder:
        embedder.start()
    assert len(prepared) == 4


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_another_precision_than_asked_for_is_an_error(tiny, tmp_path, monkeypatch, precision):
    """Also where nothing can be kept, and torch in fp32 would do for `auto`."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HORNBEAM_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(loading, "cpu_flags", lambda: ["avx512_bf16"])
    with Embedder(tiny, precision=precision) as embedder, pytest.raises(ModelError):
        embedder.start()


# Models that are replaced where they lie.


def retrained(model):
    """Change the weights a little."""
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.with_suffix(".new").write_bytes(data)
    weights.with_suffix(".new").replace(weights)


def test_a_model_that_changes_while_it_is_loaded_is_loaded_again(tiny, tmp_path, monkeypatch):
    """What is cached for a fingerprint is of its weights, also when it was asked for before."""
    model, open_source, opened = tmp_path / "model", loading.Source.open, []
    shutil.copytree(tiny, model)

    def change_once(source, wish):
        opened.append(source.fingerprint)
        engine = open_source(source, wish)
        if len(opened) == 1:
            retrained(model)
        return engine

    monkeypatch.setattr(loading.Source, "open", change_once)
    with Embedder(model, backend="torch", precision="exact") as embedder:
        first = embedder.fingerprint
        retrained(model)
        embedder.start()
        assert len({first, *opened}) == 2
        assert embedder.fingerprint == opened[-1] == Embedder(model).fingerprint


def test_nothing_is_kept_of_a_model_that_changes_while_it_is_converted(tiny, tmp_path):
    """It might be of the one, under the name of the other."""
    model, files = tmp_path / "model", Workshop(tmp_path / "files")
    shutil.copytree(tiny, model)
    fingerprint = Embedder(model).fingerprint
    retrained(model)
    request = Request(
        model=str(model),
        fingerprint=fingerprint,
        workshop=str(files.directory),
        device="cpu",
        engines=[("openvino", "fp32")],
        streams=1,
    )
    files.directory.mkdir()
    with pytest.raises(ModelError, match="changed"):
        prepare_here(request)
    assert files.settings() is None
    assert not files.path("openvino/model.xml").exists()


def test_a_model_that_keeps_the_end_of_long_texts_runs_as_it_is(tiny, tmp_path):
    """Texts to probe with may be too short to show that it does."""
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    options = json.loads((model / "tokenizer_config.json").read_text())
    options["truncation_side"] = "left"
    (model / "tokenizer_config.json").write_text(json.dumps(options))
    with pytest.raises(Unsupported, match="end"):
        Checkpoint(model, "cpu").settings("some fingerprint")


# Forks.

AFTER_A_FORK = """
import asyncio, faulthandler, os, sys
from hornbeam_ml import Embedder, ModelError
with Embedder(sys.argv[1], backend=sys.argv[2], precision="fp32", cache=False) as embedder:
    wanted = embedder.encode("some text")
    for way in (embedder.encode, lambda text: asyncio.run(embedder.aencode(text))):
        child = os.fork()
        if not child:
            faulthandler.dump_traceback_later(30, exit=True)
            try:
                assert abs(way("some text") - wanted).max() < 1e-6
            except ModelError as error:
                os._exit(7 if "before this process was forked" in str(error) else 1)
            os._exit(0)  # OpenVINO's own end would abort here
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert (embedder.encode("some text") == wanted).all()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize(("backend", "code"), [("onnx", 0), ("openvino", 7)])
def test_a_forked_child_loads_its_own(tiny, backend, code):
    """As under --preload with an app that encoded a text. OpenVINO cannot, and says so."""
    with Embedder(tiny, backend=backend, precision="fp32", cache=False) as embedder:
        embedder.start()
    ran = subprocess.run(
        [sys.executable, "-c", AFTER_A_FORK, str(tiny), backend],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.split() == [str(code)] * 2, ran.stderr[-2000:]


# Calls.


@pytest.fixture
def held(tiny, monkeypatch):
    """An embedder whose batches say that they started, and wait until they may go on."""
    started, go_on = threading.Event(), threading.Event()
    with Embedder(tiny, backend="torch", precision="exact") as embedder:
        embedder.start()
        run = embedder._model.engine.run

        def slow(batch):
            started.set()
            assert go_on.wait(30)
            return run(batch)

        monkeypatch.setattr(embedder._model.engine, "run", slow)
        yield embedder, started, go_on
        go_on.set()


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff"])
@pytest.mark.parametrize("cache", [True, False])
async def test_text_that_is_no_unicode_is_refused(tiny, text, cache):
    """JSON can hold it; the same error everywhere, to its caller alone."""
    with Embedder(tiny, backend="torch", precision="exact", cache=cache, name="texts") as embedder:
        for call in (embedder.encode, lambda wrong: predict("texts", wrong)):
            with pytest.raises(ValueError, match="surrogate"):
                call(text)
        with pytest.raises(ValueError, match="surrogate"):
            await embedder.aencode(["fine", text])
        with pytest.raises(TypeError, match="bytes"):
            embedder.encode(b"bytes")
        assert embedder.encode(["fine", "a\0b", np.str_("numpy")]).shape == (3, DIM)


@pytest.mark.parametrize("cache", [True, False])
async def test_a_list_longer_than_the_queue_feeds_itself_in(tiny, cache):
    """One call is not refused because of its own texts."""
    texts = [f"text {number}" for number in range(40)]
    with Embedder(tiny, backend="torch", cache=cache, precision="exact", queue_limit=2) as embedder:
        assert embedder.encode(texts).shape == (40, DIM)
        assert (await embedder.aencode([f"{text}!" for text in texts])).shape == (40, DIM)


def test_no_tokens_at_all_make_no_sense(tiny):
    with pytest.raises(ConfigError):
        Embedder(tiny, max_batch_tokens=0)


async def test_a_closed_embedder_computes_nothing(tiny):
    """Not even inline."""
    embedder = Embedder(tiny, backend="torch", precision="exact", cache=False)
    embedder.start()
    embedder.close()
    for inline in (False, True):
        with pytest.raises(ServingClosed):
            embedder.encode("late", inline=inline)
        with pytest.raises(ServingClosed):
            await embedder.aencode("late", inline=inline)


async def test_a_deadline_counts_while_the_model_is_loaded(tiny, monkeypatch):
    """The caller is told in time; loading goes on for the next."""
    go_on, open_source = threading.Event(), loading.Source.open

    def slow(source, wish):
        assert go_on.wait(30)
        return open_source(source, wish)

    monkeypatch.setattr(loading.Source, "open", slow)
    with Embedder(tiny, backend="torch", precision="exact", cache=False) as embedder:
        with pytest.raises(DeadlineExceeded):
            embedder.encode("a", timeout_ms=20)
        with pytest.raises(DeadlineExceeded):
            await embedder.aencode("a", timeout_ms=20)
        go_on.set()
        assert embedder.encode("a").shape == (DIM,)


async def test_the_deadline_of_one_caller_is_not_that_of_others(held):
    """Of several callers with the same text, each waits for as long as it said."""
    embedder, started, go_on = held
    with ThreadPoolExecutor(2) as pool:
        hasty = pool.submit(embedder.encode, "same text", timeout_ms=600)
        assert await asyncio.to_thread(started.wait, 10)
        patient = pool.submit(embedder.encode, "same text")
        task = asyncio.create_task(embedder.aencode("same text"))
        with pytest.raises(DeadlineExceeded):
            await asyncio.wrap_future(hasty)
        with pytest.raises(DeadlineExceeded):
            await asyncio.to_thread(embedder.encode, "same text", timeout_ms=50)
        with pytest.raises(DeadlineExceeded):
            await embedder.aencode(["same text", "another"], timeout_ms=50)
        go_on.set()
        ones = await asyncio.gather(asyncio.wrap_future(patient), task)  # either may compute
        assert np.array_equal(*ones)


async def test_others_survive_the_cancellation_of_the_first(held):
    """Who computes for several callers may leave; what only it wanted never runs."""
    embedder, started, go_on = held
    first = asyncio.create_task(embedder.aencode(["shared", "mine alone"]))
    assert await asyncio.to_thread(started.wait, 10)
    second = asyncio.create_task(embedder.aencode("shared"))
    await asyncio.sleep(0.05)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    go_on.set()
    assert (await second).shape == (DIM,)
    assert embedder.stats().queued == 0


async def test_predict_does_not_stop_the_loop_while_the_model_is_loaded(tiny, monkeypatch):
    """Nor does it with a deadline, or from a thread."""
    go_on, open_source = threading.Event(), loading.Source.open

    def slow(source, wish):
        assert go_on.wait(10)
        return open_source(source, wish)

    monkeypatch.setattr(loading.Source, "open", slow)
    with Embedder(tiny, backend="torch", precision="exact", name="texts", cache=False) as embedder:
        task = asyncio.create_task(apredict("texts", "some text"))
        with ThreadPoolExecutor(1) as pool:
            thread = pool.submit(predict, "texts", "some text")
            await asyncio.sleep(0.05)
            assert not embedder.ready  # the loop runs
            go_on.set()
            ones = await asyncio.gather(task, asyncio.wrap_future(thread))
        assert np.array_equal(*ones)


def test_a_model_of_the_library_needs_no_owner(monkeypatch):
    """As with SentenceTransformer; and an empty name is no name for the working directory."""
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: asked.append(name) or ".")
    directory_of("all-MiniLM-L6-v2")
    directory_of("BAAI/bge-small-en")
    assert asked == ["sentence-transformers/all-MiniLM-L6-v2", "BAAI/bge-small-en"]
    with pytest.raises(ModelError):
        directory_of("")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's way to end children")
def test_the_preparation_ends_with_the_process_that_asked_for_it(tiny):
    """Killed, it cannot say so; another process that converts has the cores to itself."""
    program = f"from hornbeam_ml import Embedder; Embedder({str(tiny)!r}).start()"
    asking = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.DEVNULL,
    )
    try:
        preparing = wait_until(lambda: preparation_of(asking.pid))
    finally:
        asking.kill()
        asking.wait(10)
    wait_until(lambda: not is_running(preparing))


def preparation_of(process):
    """Return the id of the child that prepares, when it has begun to."""
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        for child in children.read_text().split():
            with contextlib.suppress(FileNotFoundError):
                # Once it has begun, what libraries print goes to its standard error.
                outputs = {Path(f"/proc/{child}/fd/{number}").readlink() for number in (1, 2)}
                if len(outputs) == 1:
                    return int(child)
    return None


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found
