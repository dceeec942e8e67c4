"""The servings of a process, while threads make and forget others."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from hornbeam_ml.serving import registry


class Closed:
    """A serving of which nothing is left to do."""

    closed = True
    unfinished = 0


@pytest.fixture
def restless():
    """A thread that makes and forgets servings, and often takes turns with this one."""
    ended = threading.Event()

    def make_and_forget():
        while not ended.is_set():
            registry.add(Closed(), None)

    before = sys.getswitchinterval()
    thread = threading.Thread(target=make_and_forget)
    try:
        sys.setswitchinterval(1e-5)
        thread.start()
        yield
    finally:
        ended.set()
        thread.join()
        sys.setswitchinterval(before)


def test_all_are_found_while_others_come_and_go(restless):
    """Nobody who asks gets an error instead: readiness, a worker that leaves, a test that ends."""
    kept = Closed()
    with registry.scope():
        registry.add(kept, None)
        kept.closed = False
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            assert registry.open_servings() == [kept]
            assert registry.unfinished() == 0
            with registry.scope():
                pass
        kept.closed = True
