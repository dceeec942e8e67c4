"""A fresh store for every test of hornbeam_ml; callers and models for those of servings."""

from __future__ import annotations

import pytest
from serving_helpers import Held, TaskCallers, ThreadCallers

from hornbeam_ml.testing import isolated


@pytest.fixture(autouse=True)
def store(tmp_path):
    """Make a fresh embedded store the process default."""
    with isolated(f"lmdb://{tmp_path}/store") as fresh:
        yield fresh


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
