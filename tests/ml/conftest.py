"""A fresh store for every test of hornbeam_ml."""

from __future__ import annotations

import pytest

from hornbeam_state import open_store, set_default_store


@pytest.fixture(autouse=True)
def store(tmp_path):
    """Make a fresh embedded store the process default."""
    fresh = open_store(f"lmdb://{tmp_path}/store")
    previous = set_default_store(fresh)
    yield fresh
    set_default_store(previous)
    fresh.close()
