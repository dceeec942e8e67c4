"""Whether a process should get requests, and loading where no worker does it."""

from __future__ import annotations

import os
import threading
import time

import pytest
from serving_helpers import Held, in_child, until

from hornbeam_ml import Serving, background_load, get_model, readiness, register_model
from hornbeam_ml.background_load import BackgroundLoad, load_in_background
from hornbeam_state.testing import ManualClock


@pytest.fixture(autouse=True)
def phase():
    """Leave the phase as it was."""
    yield
    readiness.serve()


@pytest.fixture
def gate():
    """What a load may wait for."""
    made = threading.Event()
    yield made
    made.set()


# Phases


def test_outside_of_a_worker_a_process_serves():
    assert readiness.phase() == "serving"
    assert readiness.reasons() == []


def test_a_worker_is_ready_from_when_it_accepts_until_it_leaves():
    readiness.boot()
    assert (readiness.phase(), len(readiness.reasons())) == ("booting", 1)
    readiness.serve()
    assert (readiness.phase(), readiness.reasons()) == ("serving", [])
    readiness.drain()
    assert (readiness.phase(), len(readiness.reasons())) == ("draining", 1)


def test_a_forked_child_is_no_worker():
    readiness.drain()
    assert in_child(readiness.phase) == "serving"


# What is not loaded


def test_models_and_servings_that_are_not_loaded_are_named():
    register_model("words", lambda: 1)
    with Serving(lambda: list, name="sorts") as named, Serving(lambda: list) as nameless:
        assert readiness.reasons() == [
            "serving 'sorts' is not loaded, serving is not loaded",
            "model 'words' is not loaded",
        ]
        named.start()
        nameless.start()
        get_model("words")
        assert readiness.reasons() == []


def test_a_serving_that_failed_says_so_and_no_more():
    """What the model said may be anything."""

    def load():
        raise OSError("password")

    with Serving(load, name="fails") as serving:
        with pytest.raises(Exception, match="password"):
            serving.start()
        assert readiness.reasons() == ["serving 'fails' failed to load"]
    assert readiness.reasons() == []


def test_a_serving_hangs_until_its_batch_ends():
    model = Held(hold=True)
    with Serving(lambda: model, name="slow", deadline_ms=20) as serving:
        serving.start()
        running = serving.submit(1, timeout_ms=60_000)
        model.started(1)
        until(lambda: readiness.reasons() == ["serving 'slow' hangs"], "it hangs")
        model.open()
        running.result(20)
        until(lambda: readiness.reasons() == [], "it goes on")


def test_a_child_loads_its_own():
    with Serving(lambda: list, name="sorts") as serving:
        serving.start()
        assert in_child(readiness.reasons) == "[\"serving 'sorts' is not loaded\"]"
        assert readiness.reasons() == []


# Checks of others


def test_a_check_may_object_until_it_is_removed():
    said = ["the host is away"]
    readiness.register("host", lambda: said[0])
    try:
        assert readiness.reasons() == ["the host is away"]
        said[0] = None
        assert readiness.reasons() == []
        readiness.register("host", lambda: "replaced")
        assert readiness.reasons() == ["replaced"]
    finally:
        readiness.unregister("host")
    readiness.unregister("host")
    assert readiness.reasons() == []


def test_a_check_that_fails_is_a_reason_itself(caplog):
    """Its error is for the log, not for whoever probes."""

    def check():
        raise OSError("password")

    readiness.register("broken", check)
    try:
        assert readiness.reasons() == ["the check 'broken' failed"]
    finally:
        readiness.unregister("broken")
    assert "password" in caplog.text


# Loading in the background


def test_a_probe_begins_to_load_and_does_not_wait(gate):
    """Once, however many ask; models and servings."""
    calls = []
    register_model("gated", lambda: calls.append(1) or gate.wait(20))
    with Serving(lambda: list, name="sorts") as serving:
        for _ in range(5):
            load_in_background()
        until(lambda: calls, "the load began")
        assert not serving.ready
        gate.set()
        until(lambda: readiness.reasons() == [], "everything is loaded")
    assert calls == [1]


@pytest.mark.parametrize("change", [readiness.boot, readiness.drain])
def test_a_worker_that_boots_or_leaves_loads_nothing_more(change):
    register_model("other", lambda: 1)
    change()
    load_in_background()
    time.sleep(0.05)
    assert readiness.reasons()[1:] == ["model 'other' is not loaded"]


def test_when_all_is_loaded_no_thread_is_started():
    register_model("there", lambda: 1)
    get_model("there")
    before = set(threading.enumerate())
    load_in_background()
    assert set(threading.enumerate()) <= before  # one of an earlier test may end just now


def test_a_load_that_failed_is_tried_again_later(caplog):
    """Not at once: every probe of every balancer would load it again."""
    clock, calls = ManualClock(), []

    def load():
        calls.append(1)
        if len(calls) < 3:
            raise OSError("no such file")

    background = BackgroundLoad(load, clock=clock, pause_s=5)

    def loads_after(seconds):
        clock.advance(seconds)
        background.start()
        background.wait(20)
        return len(calls)

    assert [loads_after(seconds) for seconds in (0, 0, 4.9, 0.2, 4.9, 0.2)] == [1, 1, 1, 2, 2, 3]
    assert loads_after(0) == 4  # one that went well may be followed by another at once
    assert caplog.text.count("tries again") == 2


def test_a_child_forked_while_it_loads_loads_for_itself(gate):
    parent = os.getpid()
    # Not the gate in the child: the fork may come while the parent's thread holds its lock.
    register_model("gated", lambda: os.getpid() != parent or gate.wait(20))
    load_in_background()
    until(lambda: any(t.name == "hornbeam-load" for t in threading.enumerate()), "it loads")

    def child():
        load_in_background()
        background_load._background.wait(20)
        return readiness.reasons()

    assert in_child(child) == "[]"
