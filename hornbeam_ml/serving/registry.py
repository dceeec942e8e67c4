"""The servings of this process: all of them, and those with a name."""

from __future__ import annotations

import itertools
import os
import weakref
from typing import Any, Protocol

from hornbeam_ml.errors import ModelError


class _Member(Protocol):
    """What the registry needs of a serving."""

    @property
    def closed(self) -> bool: ...

    @property
    def ready(self) -> bool: ...

    def start(self) -> Any: ...

    def forget_after_fork(self) -> None: ...


_numbers = itertools.count()
_all: weakref.WeakValueDictionary[int, _Member] = weakref.WeakValueDictionary()  # oldest first
_named: dict[str, _Member] = {}


def add(serving: _Member, name: str | None) -> None:
    """Note a serving, which is kept when it has a name: `predict` has to find it.

    A name that is taken goes to the new serving; the old one serves on without it.
    """
    _all[next(_numbers)] = serving
    if name is not None:
        _named[name] = serving


def remove(serving: _Member, name: str | None) -> None:
    """Forget a serving that was closed."""
    if name is not None and _named.get(name) is serving:
        del _named[name]


def find(name: str) -> Any:
    """Return the serving with a name.

    Raises:
        ModelError: there is none; the message lists the names.
    """
    serving = _named.get(name)
    if serving is None:
        known = ", ".join(sorted(_named)) or "none"
        raise ModelError(f"no serving is registered as {name!r}; registered: {known}")
    return serving


def readiness() -> dict[str, bool]:
    """Return the names, and whether the serving with each is ready."""
    return {name: serving.ready for name, serving in list(_named.items())}


def start_all() -> None:
    """Load every serving that is not loaded yet, one after the other; blocks.

    Raises:
        ModelError: one failed to load.
    """
    for serving in list(_all.values()):
        if not serving.closed:
            serving.start()


def _forget_after_fork() -> None:
    for serving in list(_all.values()):
        serving.forget_after_fork()


os.register_at_fork(after_in_child=_forget_after_fork)
