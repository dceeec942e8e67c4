"""A fresh store for every test of hornbeam_ml; callers and models for those of servings."""

from __future__ import annotations

import pytest
from serving_helpers import Held, TaskCallers, ThreadCallers

from hornbeam_state import open_store, set_default_store


@pytest.fixture(autouse=True)
def store(tmp_path):
    """Make a fresh embedded store the process default."""
    fresh = open_store(f"lmdb://{tmp_path}/store")
    previous = set_default_store(fresh)
    yield fresh
    set_default_store(previous)
    fresh.close()


@pytest.fixture(params=[ThreadCallers, TaskCallers], ids=["threads", "tasks"])
def callers(request):
    """Callers of one kind."""
    made = request.param()
    yield made
    made.close()


@pytest.fixture
def model():
    """A model that is not held."""
    return Held()


@pytest.fixture
def held():
    """A model whose batches wait to be released; in the end all are."""
    made = Held(hold=True)
    yield made
    made.open()
