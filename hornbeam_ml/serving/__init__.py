"""Dynamic batching: concurrent calls of one model run as one batch.

The way of a call: its items are checked in the caller's thread or task (`serving`) and wait in a
bounded queue (`queue`), where a policy says when a batch closes and what goes into it (`policy`).
The thread of a stream takes the batch (`runner`), runs the model (`bisection`, `model`) and wakes
the callers (`calls`, `waiting`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from hornbeam_ml.serving.calls import DONE
from hornbeam_ml.serving.registry import find
from hornbeam_ml.serving.serving import Serving
from hornbeam_ml.serving.stats import KeyStats, ServingStats

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = ["DONE", "KeyStats", "Serving", "ServingStats", "apredict", "predict"]


def predict(
    name: str,
    item: Any,
    *,
    key: Hashable = None,
    timeout_ms: float | None = None,
    where: Literal["auto", "local"] = "auto",
    inline: bool = False,
) -> Any:
    """Return the result of one item from the serving with a name; see `Serving.run`.

    Args:
        name: The serving's name.
        item: What its model takes.
        key: One of its `batch_keys`, when it has any.
        timeout_ms: When to stop waiting.
        where: ``"local"``: in this process. ``"auto"``: the nearest that has it.
        inline: Run it on the current stream, in no batch with others; see `Serving.run_inline`.

    Raises:
        ModelError: there is no serving with that name.
    """
    serving = _find(name, where)
    if inline:
        return serving.run_inline([item], key=key)[0]
    return serving.run(item, key=key, timeout_ms=timeout_ms)


async def apredict(
    name: str,
    item: Any,
    *,
    key: Hashable = None,
    timeout_ms: float | None = None,
    where: Literal["auto", "local"] = "auto",
    inline: bool = False,
) -> Any:
    """Awaitable twin of `predict`."""
    serving = _find(name, where)
    if inline:
        return (await serving.arun_inline([item], key=key))[0]
    return await serving.arun(item, key=key, timeout_ms=timeout_ms)


def _find(name: str, where: str) -> Serving:
    if where not in ("auto", "local"):
        raise ValueError(f"where={where!r}: use 'auto' or 'local'")
    serving: Serving = find(name)
    return serving
