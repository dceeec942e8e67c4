"""The registry of models: each is loaded once per worker, and whoever asks for one waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hornbeam_ml.errors import ModelError
from hornbeam_ml.forks import fork_hazards
from hornbeam_ml.memory import LoadCost, LoadMeter
from hornbeam_ml.readiness import register as register_check
from hornbeam_ml.serving.registry import open_servings, readiness, start_all
from hornbeam_state.errors import MISSING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

logger = logging.getLogger("hornbeam.models")


@dataclass(eq=False)
class _Entry:
    """A registered model; `lock` is held by whoever loads it."""

    name: str
    load: Callable[[], Any]
    warmup: Any
    lock: threading.Lock = field(default_factory=threading.Lock)
    model: Any = MISSING
    loader: int | None = None
    cost: LoadCost | None = None


class Models:
    """Models by name. Safe to use from any thread; a forked child loads its own."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.Lock()

    def register(self, name: str, load: Callable[[], Any], *, warmup: Any = None) -> None:
        """Add a model; see `register_model`."""
        if not isinstance(name, str) or not name:
            raise TypeError("a model's name is a non-empty str")
        if not callable(load) or inspect.iscoroutinefunction(load):
            raise TypeError("load is a plain function that returns the model")
        with self._lock:
            self._entries[name] = _Entry(name, load, warmup)

    def get(self, name: str) -> Any:
        """Return a model, loading it now unless that was done; see `get_model`."""
        entry = self._entries.get(name)
        if entry is None:
            known = ", ".join(sorted(self._entries)) or "none"
            raise ModelError(f"no model is registered as {name!r}; registered: {known}")
        if entry.model is not MISSING:
            return entry.model
        if entry.loader == threading.get_ident():
            raise ModelError(f"model {name!r} asks for itself while it is being loaded")
        with entry.lock:
            if entry.model is MISSING:
                entry.loader = threading.get_ident()
                try:
                    entry.model = _load(entry)
                finally:
                    entry.loader = None
        return entry.model

    def registered(self) -> dict[str, Any]:
        """Return the models by name, None for one that is not loaded yet."""
        return {
            name: None if entry.model is MISSING else entry.model
            for name, entry in list(self._entries.items())
        }

    def costs(self) -> dict[str, LoadCost | None]:
        """Return what loading each took, None for one that is not loaded yet."""
        return {name: entry.cost for name, entry in list(self._entries.items())}

    def must_wait(self, name: str) -> bool:
        """Return whether `get` would load, or wait for someone who does."""
        entry = self._entries.get(name)
        return entry is not None and entry.model is MISSING

    def load_all(self) -> None:
        """Load every registered model that is not loaded yet, in the order of registration.

        Raises:
            ModelError: one failed to load; those before it stay loaded.
        """
        for name in list(self._entries):
            self.get(name)

    def clear(self) -> None:
        """Forget all models."""
        with self._lock:
            self._entries.clear()

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Undo, in the end, what is registered in a block; what is loaded in it stays loaded."""
        with self._lock:
            before = dict(self._entries)
        try:
            yield
        finally:
            with self._lock:
                self._entries = before

    def forget_after_fork(self) -> None:
        """Replace, in a forked child, the locks that threads of the parent may hold."""
        self._lock = threading.Lock()
        for entry in self._entries.values():
            entry.lock = threading.Lock()
            entry.loader = None


def _load(entry: _Entry) -> Any:
    """Load and warm up one model; whatever goes wrong names the model."""
    fork_hazards.note("a model was loaded", repr(entry.name))
    meter = LoadMeter()
    try:
        model = entry.load()
        if entry.warmup is not None:
            model(entry.warmup)
    except Exception as error:
        raise ModelError(
            f"model {entry.name!r} failed to load: {type(error).__name__}: {error}"
        ) from error
    entry.cost = meter.cost()
    logger.info("model %r loaded in %.1f s", entry.name, entry.cost.seconds)
    return model


_models = Models()  # the process default registry
os.register_at_fork(after_in_child=_models.forget_after_fork)


def register_model(name: str, load: Callable[[], Any], *, warmup: Any = None) -> None:
    """Say how a model is loaded.

    Under ``gunicorn -k hornbeam`` it is loaded once in each worker, after the fork, before the
    worker takes its first request, and without holding up the worker's heartbeat. Elsewhere it
    is loaded when it is first asked for.

    Args:
        name: What `get_model` knows it by. Registering a name again replaces the model.
        load: Takes nothing and returns the model.
        warmup: When given, an example input: the model, which must then be callable, is called
            with it once before it counts as loaded.
    """
    _models.register(name, load, warmup=warmup)


def get_model(name: str) -> Any:
    """Return a registered model, waiting until it is loaded.

    Raises:
        ModelError: no such name, or it failed to load. The next call tries again.
    """
    return _models.get(name)


async def aget_model(name: str) -> Any:
    """Awaitable twin of `get_model`; loading runs in a thread."""
    if _models.must_wait(name):
        return await asyncio.to_thread(_models.get, name)
    return _models.get(name)


def load_all() -> None:
    """Load every registered model and every serving that is not loaded yet; blocks.

    Models come first: the `load` of a serving may ask for one.

    Raises:
        ModelError: one failed to load.
    """
    _models.load_all()
    start_all()


def registered_models() -> dict[str, Any]:
    """Return the registered names, each with its model, or `None` before it is loaded."""
    return _models.registered()


def some_wait() -> bool:
    """Return whether there is a model or a serving that `load_all` would load."""
    return any(map(_models.must_wait, _models.registered())) or any(
        not serving.loaded for serving in open_servings()
    )


def load_costs() -> dict[str, LoadCost | None]:
    """Return the registered names, each with what its load took, None before it is loaded."""
    return _models.costs()


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Undo, in the end, what is registered in a block; what is loaded in it stays loaded."""
    with _models.scope():
        yield


def loaded_models() -> dict[str, bool]:
    """Return the names of models and servings, and whether each is loaded in this process.

    A serving counts while it is `ready`. When a model has the same name, both have to be.
    """
    loaded = {name: not _models.must_wait(name) for name in _models.registered()}
    for name, ready in readiness().items():
        loaded[name] = ready and loaded.get(name, True)
    return loaded


def _why_not_ready() -> str:
    missing = [name for name in _models.registered() if _models.must_wait(name)]
    return ", ".join(f"model {name!r} is not loaded" for name in missing)


register_check("models", _why_not_ready)
