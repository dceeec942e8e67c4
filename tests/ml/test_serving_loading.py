"""Servings: loading, warming up, and the settings. With threads and with tasks."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from serving_helpers import LIMIT_S, Held, answers, queued

from hornbeam_ml import (
    DeadlineExceeded,
    ModelError,
    Serving,
)
from hornbeam_ml.models import load_all
from hornbeam_state.errors import ConfigError

# Loading


def test_it_is_loaded_at_the_first_call_once(callers):
    loads = []
    with Serving(lambda: loads.append(1) or list) as serving:
        assert not serving.ready
        assert sorted(answers([callers.run(serving, item) for item in range(8)])) == list(range(8))
        assert serving.ready
    assert loads == [1]
    assert not serving.ready


def test_a_load_that_fails_says_why_to_everybody_and_is_tried_again(callers):
    attempts, gate = [], threading.Event()

    def load():
        attempts.append(1)
        assert gate.wait(LIMIT_S)
        if len(attempts) == 1:
            raise OSError("no such weights")
        return list

    with Serving(load, name="flaky") as serving:
        calls = [callers.run(serving, item) for item in range(3)]
        queued(serving, 3)
        gate.set()
        for error in answers(calls):
            assert isinstance(error, ModelError)
            assert "'flaky' failed to load: OSError: no such weights" in str(error)
            assert isinstance(error.__cause__, OSError)
        assert callers.run(serving, 1).result(LIMIT_S) == 1


@pytest.mark.parametrize("returned", [None, "text"], ids=["nothing", "no function"])
def test_a_load_has_to_return_a_function(callers, returned):
    with Serving(lambda: returned) as serving:
        assert "no function" in str(callers.run(serving, 1).exception(LIMIT_S))


def test_a_worker_loads_servings_too():
    """Registered models come first; a closed serving is left alone."""
    model = Held()
    with Serving(lambda: model, warmup=1, batch_keys="ab" and ["a", "b"]) as serving:
        Serving(lambda: 1 / 0).close()
        load_all()
        assert serving.ready
    assert list(zip(model.batches, model.keys, strict=True)) == [([1], "a"), ([1], "b")]


def test_the_warmup_goes_through_every_bucket_and_key_before_it_is_ready():
    shapes = []

    def model(batch, key):
        shapes.append((key, len(batch)))
        return batch

    options = {"buckets": (1, 2, 4), "batch_size": 4, "batch_keys": ["a", "b"]}
    with Serving(lambda: model, collate="stack", warmup=np.zeros(3), **options) as serving:
        serving.start()
        assert sorted(shapes) == [(key, size) for key in "ab" for size in (1, 2, 4)]
        assert serving.stats().batches == 0


def test_a_load_is_told_its_device():
    with Serving(lambda device: lambda batch: [device] * len(batch), device="cpu") as serving:
        assert serving.run(1) == "cpu"


async def test_starting_has_a_twin_that_does_not_hold_up_the_loop():
    gate = threading.Event()
    async with Serving(lambda: gate.wait(LIMIT_S) and list) as serving:
        with pytest.raises(DeadlineExceeded):
            await serving.astart(timeout=0.01)
        gate.set()
        await serving.astart()
        assert serving.ready


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"batch_size": 0}, "batch_size", id="no batch"),
        pytest.param({"streams": 0}, "streams", id="no stream"),
        pytest.param({"queue_limit": 1.5}, "queue_limit", id="half an item"),
        pytest.param({"batch_timeout_ms": -1}, "batch_timeout_ms", id="negative timer"),
        pytest.param({"deadline_ms": 0}, "deadline_ms", id="no time"),
        pytest.param({"collate": "pile"}, "collate", id="unknown way to collate"),
        pytest.param({"buckets": (32,)}, "collate='stack'", id="buckets for lists"),
        pytest.param({"collate": "stack", "buckets": (4, 2)}, "growing", id="unsorted buckets"),
        pytest.param({"collate": "stack", "buckets": (4,)}, "batch_size=32", id="small buckets"),
        pytest.param({"batch_keys": []}, "batch_keys", id="no keys"),
        pytest.param({"batch_keys": "ab"}, "batch_keys", id="a str for keys"),
        pytest.param({"device": "gpu"}, "cuda:1", id="unknown device"),
        pytest.param({"device": ["cpu"], "instances": 2}, "instances=2", id="too few devices"),
        pytest.param({"compile": "jax"}, "compile", id="unknown compiler"),
        pytest.param({"compile": "torch"}, "warmup", id="nothing to compile with"),
        pytest.param({"name": ""}, "name", id="empty name"),
        pytest.param({"preprocess": 1}, "preprocess", id="no function"),
        pytest.param({"pads": False}, "pads", id="no function that says whether it pads"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Serving(lambda: list, **options)


def test_something_to_load_is_needed():
    with pytest.raises(ConfigError, match="load"):
        Serving("model")


@pytest.mark.slow
def test_compiling_is_done_while_it_loads():
    """One graph for each bucket; no call pays for it."""
    torch = pytest.importorskip("torch")
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))

    def load():
        return torch.inference_mode()(model.forward)

    options = {"collate": "stack", "batch_size": 4, "buckets": (1, 4), "streams": 2}
    with Serving(load, compile="torch", warmup=torch.zeros(4), **options) as serving:
        serving.start()
        compiled = counters["stats"]["unique_graphs"]
        assert compiled == 2
        rows = torch.randn(7, 4)
        results = torch.stack(serving.run_batch(list(rows)))
        assert torch.allclose(results, model(rows), atol=1e-6)
        assert counters["stats"]["unique_graphs"] == compiled
