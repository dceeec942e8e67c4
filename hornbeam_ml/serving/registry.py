"""The servings of this process: all of them, and those with a name."""

from __future__ import annotations

import contextlib
import itertools
import os
import weakref
from typing import TYPE_CHECKING, Any, Final, Protocol

from hornbeam_ml.errors import ModelError
from hornbeam_ml.readiness import register as register_check

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from hornbeam_ml.memory import LoadCost
    from hornbeam_state.transports.base import Request

_CLOSING_S: Final = 5.0


class _Member(Protocol):
    """What the registry needs of a serving."""

    @property
    def closed(self) -> bool: ...

    @property
    def ready(self) -> bool: ...

    @property
    def unfinished(self) -> int: ...

    @property
    def loaded(self) -> bool: ...

    @property
    def idempotent(self) -> bool: ...

    @property
    def problem(self) -> str | None: ...

    def start(self) -> Any: ...

    def close(self, *, drain: bool, timeout: float) -> None: ...

    def forget_after_fork(self) -> None: ...


class Offer(Protocol):
    """What a model host can serve."""

    @property
    def loaded(self) -> bool:
        """Whether it is loaded."""
        ...

    @property
    def ready(self) -> bool:
        """Whether it takes calls."""
        ...

    def start(self) -> Any:
        """Load it; blocks."""
        ...

    @property
    def load_costs(self) -> Sequence[LoadCost]:
        """What loading took, of each instance."""
        ...

    def info(self) -> dict[str, Any]:
        """Return what clients have to know beforehand, once it is loaded."""
        ...

    async def answer(self, request: Request) -> Sequence[Any]:
        """Answer a call."""
        ...

    def answer_stream(self, request: Request) -> AsyncIterator[Any]:
        """Answer a call for chunks."""
        ...


_numbers = itertools.count()
_offers: weakref.WeakValueDictionary[str, Offer] = weakref.WeakValueDictionary()
_all: weakref.WeakValueDictionary[int, _Member] = weakref.WeakValueDictionary()  # oldest first
_named: dict[str, _Member] = {}


def add(serving: _Member, name: str | None) -> None:
    """Note a serving, which is kept when it has a name: `predict` has to find it.

    A name that is taken goes to the new serving; the old one serves on without it.
    """
    _all[next(_numbers)] = serving
    if name is not None:
        _named[name] = serving


def offer(target: str, thing: Offer) -> None:
    """Note what a model host serves, by the name that clients call it by."""
    _offers[target] = thing


def offers() -> dict[str, Offer]:
    """Return what a model host can serve, by name."""
    return {ref.key: thing for ref in _offers.valuerefs() if (thing := ref()) is not None}


def remove(serving: _Member, name: str | None) -> None:
    """Forget a serving that was closed."""
    if name is not None and _named.get(name) is serving:
        del _named[name]


def get(name: str) -> Any:
    """Return the serving with a name, or None."""
    return _named.get(name)


def find(name: str) -> Any:
    """Return the serving with a name.

    Raises:
        ModelError: there is none; the message lists the names.
    """
    serving = get(name)
    if serving is None:
        raise unknown(name)
    return serving


def unknown(name: str) -> ModelError:
    """Return the error for a name that no serving of this process has; it lists the names."""
    known = ", ".join(sorted(_named)) or "none"
    return ModelError(f"no serving is registered as {name!r}; registered: {known}")


def loaded() -> dict[str, bool]:
    """Return the names of servings that are loaded, and whether each is idempotent."""
    return {name: one.idempotent for name, one in list(_named.items()) if one.loaded}


def readiness() -> dict[str, bool]:
    """Return the names, and whether the serving with each is ready."""
    return {name: serving.ready for name, serving in list(_named.items())}


def unfinished() -> int:
    """Return how many calls of all servings wait or run."""
    return sum(serving.unfinished for serving in _living())


def open_servings() -> list[Any]:
    """Return the servings that are not closed, the oldest first."""
    return [serving for serving in _living() if not serving.closed]


def start_all() -> None:
    """Load every serving that is not loaded yet, one after the other; blocks.

    Raises:
        ModelError: one failed to load.
    """
    for serving in open_servings():
        serving.start()


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Close the servings that were made in a block when it ends, and give names back."""
    before, named = _living(), dict(_named)
    try:
        yield
    finally:
        for serving in open_servings():
            if serving not in before:
                serving.close(drain=False, timeout=_CLOSING_S)
        _named.clear()
        _named.update({name: serving for name, serving in named.items() if not serving.closed})


def _living() -> list[_Member]:
    """Return the servings that there are; threads may make and forget others meanwhile."""
    return [serving for ref in _all.valuerefs() if (serving := ref()) is not None]


def _why_not_ready() -> str:
    """Never waits: for a lock of a queue at most, which nobody holds for long."""
    problems = (problem for serving in open_servings() if (problem := serving.problem))
    return ", ".join(dict.fromkeys(problems))  # those of a model host have one in common


def _forget_after_fork() -> None:
    for serving in _living():
        serving.forget_after_fork()


os.register_at_fork(after_in_child=_forget_after_fork)
register_check("servings", _why_not_ready)
