"""For tests of apps: a store, and registries of models and servings, of each test's own.

Fixtures for pytest, which are imported into a ``conftest.py``::

    from hornbeam_ml.testing import fresh_store

    def test_a_request_is_counted(fresh_store):
        client.get("/embed?text=hello")
        assert fresh_store.get("requests") == 1

So that every test has it without asking for it, import `fresh_store_always` instead, or write
``usefixtures = ["fresh_store"]`` into pytest's settings. `fresh_lmdb_store` is an embedded store
in the directory of the test, for tests that start processes of their own.

In each test `state_get`, `cached_inference` and the rest use a store that nothing else uses, and
that is gone after it. What was registered before, as when the app was imported, is there, and is
not loaded again for each test; models that the test registers and functions that it exposes are
forgotten after it, and servings that it makes are closed. So import the app at the top of a file:
the second test to import it inside would find nothing registered.

Coroutine tests of pytest-asyncio and anyio may use it, and so may processes of pytest-xdist. Other
test runners have `isolated`, which is a plain context manager.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from hornbeam_ml import background_load, models
from hornbeam_ml.serving import registry
from hornbeam_state import open_store, set_default_store
from hornbeam_state.rpc import exposed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hornbeam_state import Store

__all__ = ["fresh_lmdb_store", "fresh_store", "fresh_store_always", "isolated"]


@contextlib.contextmanager
def isolated(url: str = "memory://") -> Iterator[Store]:
    """Make a new store the process default in a block, and undo what is registered in it.

    In the end models that were registered and functions that were exposed in the block are
    forgotten, servings that were made in it closed, names given back, and the store closed. The
    previous default store stays open.

    Args:
        url: The store, as in ``HORNBEAM_STORE``. One that exists already is not emptied.
    """
    with contextlib.closing(open_store(url)) as store:
        previous = set_default_store(store)
        try:
            with models.scope(), registry.scope(), background_load.scope(), exposed.scope():
                yield store
        finally:
            set_default_store(previous)


@pytest.fixture
def fresh_store() -> Iterator[Store]:
    """Give the test an empty store in memory, and registries of its own; see `isolated`."""
    with isolated() as store:
        yield store


@pytest.fixture(autouse=True)
def fresh_store_always() -> Iterator[Store]:
    """Give every test what `fresh_store` gives, whether it asks or not."""
    with isolated() as store:
        yield store


@pytest.fixture
def fresh_lmdb_store(tmp_path: Path) -> Iterator[Store]:
    """Give the test an empty embedded store in its own directory, as several processes share."""
    with isolated(f"lmdb://{tmp_path}/store") as store:
        yield store
