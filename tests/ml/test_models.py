"""Models are loaded once per process, and whoever asks waits."""

from __future__ import annotations

import asyncio
import threading

import pytest

from hornbeam_ml import (
    HornbeamError,
    ModelError,
    Serving,
    aget_model,
    get_model,
    register_model,
)
from hornbeam_ml.models import load_all, loaded_models


def test_a_model_is_loaded_once_however_many_ask():
    """Threads that ask at the same time wait for one load."""
    calls, gate = [], threading.Event()

    def load():
        calls.append(1)
        gate.wait(10)
        return object()

    register_model("slow", load)
    found = []
    threads = [threading.Thread(target=lambda: found.append(get_model("slow"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(set(map(id, found))) == 1


async def test_the_twin_does_not_hold_up_the_event_loop():
    """While a model loads, the loop goes on."""
    gate = threading.Event()
    register_model("gated", lambda: gate.wait(10) and "model")
    asking = asyncio.create_task(aget_model("gated"))
    while "gated" not in loaded_models() or not asking.done():
        await asyncio.sleep(0)
        gate.set()
    assert await asking == "model"
    assert await aget_model("gated") == "model"


def test_an_unknown_name_lists_the_known_ones():
    """A wrong name is a clear error."""
    register_model("known", lambda: 1)
    with pytest.raises(ModelError, match=r"'nope'.*known"):
        get_model("nope")


async def test_the_twin_knows_an_unknown_name_too():
    """The twin raises the same error."""
    with pytest.raises(ModelError, match="nope"):
        await aget_model("nope")


def test_a_load_that_fails_says_which_and_is_tried_again():
    """A failed load is a ModelError with the cause; the next call tries again."""
    attempts = []

    def load():
        attempts.append(1)
        if len(attempts) == 1:
            raise OSError("no such file")
        return "model"

    register_model("flaky", load)
    with pytest.raises(ModelError, match="'flaky' failed to load: OSError: no such file") as caught:
        get_model("flaky")
    assert isinstance(caught.value.__cause__, OSError)
    assert isinstance(caught.value, HornbeamError)
    assert get_model("flaky") == "model"


def test_a_warmup_runs_before_the_model_counts_as_loaded():
    """The model is called with the example once."""
    seen = []
    register_model("warm", lambda: seen.append, warmup="example")
    get_model("warm")
    assert seen == ["example"]


def test_a_model_that_asks_for_itself_is_an_error_and_no_deadlock():
    """A load that needs its own result cannot hang."""
    register_model("self", lambda: get_model("self"))
    with pytest.raises(ModelError, match="asks for itself"):
        get_model("self")


def test_load_all_loads_what_is_left():
    """Every registered model is loaded, one that is loaded already is not."""
    calls = []
    for name in ("a", "b"):
        register_model(f"all-{name}", lambda name=name: calls.append(name) or name)
    get_model("all-a")
    register_model("self", lambda: 1)
    load_all()
    assert calls == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "load"),
    [
        pytest.param("", lambda: 1, id="empty name"),
        pytest.param(1, lambda: 1, id="name of another type"),
        pytest.param("m", "not callable", id="load is no function"),
        pytest.param("m", aget_model, id="load is a coroutine function"),
    ],
)
def test_a_registration_that_makes_no_sense_is_refused(name, load):
    """Mistakes are found where they are made."""
    with pytest.raises(TypeError):
        register_model(name, load)


def test_servings_with_a_name_are_listed_too():
    """Each with whether it is ready; one that is closed is gone."""
    register_model("both", lambda: 1)
    with Serving(lambda: list, name="sorts"), Serving(lambda: list, name="both") as both:
        assert (loaded_models()["sorts"], loaded_models()["both"]) == (False, False)
        both.start()
        assert not loaded_models()["both"]
        get_model("both")
        assert loaded_models()["both"]
        assert not loaded_models()["sorts"]
    assert "sorts" not in loaded_models()
    assert loaded_models()["both"]
