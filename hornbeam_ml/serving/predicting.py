"""`predict`: a serving by its name, wherever it runs."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

from hornbeam_ml.errors import ModelError
from hornbeam_ml.serving import chosen_hosts
from hornbeam_ml.serving.client import HostedCalls
from hornbeam_ml.serving.nodes import aon_nodes, on_nodes
from hornbeam_ml.serving.registry import find, get, unknown

if TYPE_CHECKING:
    from collections.abc import Hashable

    from hornbeam_ml.serving.client import DistantCalls
    from hornbeam_ml.serving.hosts import Hosts
    from hornbeam_ml.serving.local import LocalCalls
    from hornbeam_ml.serving.serving import Serving

    Calls: TypeAlias = Serving | LocalCalls | DistantCalls

Where = Literal["auto", "local", "host", "remote"]
_WHERE: Final = get_args(Where)


def predict(
    name: str,
    item: Any,
    *,
    key: Hashable = None,
    timeout_ms: float | None = None,
    where: Where = "auto",
    inline: bool = False,
    hedge_ms: float | None = None,
) -> Any:
    """Return the result of one item from the serving with a name; see `Serving.run`.

    On nodes the less busy of two random ones gets the call. If it has certainly not begun there,
    since the node is gone or refused it, another one gets it; if it may have, it is not repeated.

    Args:
        name: The serving's name.
        item: What its model takes.
        key: One of its `batch_keys`, when it has any.
        timeout_ms: When to stop waiting, of all tries together.
        where: ``"local"``: in this process. ``"host"``: in the model host of this machine.
            ``"remote"``: on another node. ``"auto"``: the nearest of these that has it. A serving
            that is defined here, and that the host runs, runs there.
        inline: Run it on the current stream, in no batch with others; see `Serving.run_inline`.
        hedge_ms: Where it goes to nodes: if there is no result by then, a second node is asked
            too, and the first result counts. For a serving with ``idempotent=True``.

    Raises:
        ModelError: there is no serving with that name; the message says where it was looked for.
        NodeDown: the host or node that had the call is gone.
        ValueError: `hedge_ms` makes no sense, or the serving is not declared idempotent.
    """
    _check(where, hedge_ms)
    calls = _find(name, where, hedge_ms)
    if inline:
        return calls.run_inline([item], key=key)[0]
    return calls.run_batch([item], key=key, timeout_ms=timeout_ms)[0]


async def apredict(
    name: str,
    item: Any,
    *,
    key: Hashable = None,
    timeout_ms: float | None = None,
    where: Where = "auto",
    inline: bool = False,
    hedge_ms: float | None = None,
) -> Any:
    """Awaitable twin of `predict`."""
    _check(where, hedge_ms)
    calls = await _afind(name, where, hedge_ms)
    if inline:
        return (await calls.arun_inline([item], key=key))[0]
    return (await calls.arun_batch([item], key=key, timeout_ms=timeout_ms))[0]


def _check(where: str, hedge_ms: float | None) -> None:
    if where not in _WHERE:
        raise ValueError(f"where={where!r}: use {', '.join(map(repr, _WHERE))}")
    if hedge_ms is not None and not (isfinite(hedge_ms) and hedge_ms > 0):
        raise ValueError(f"hedge_ms={hedge_ms!r}: give milliseconds above 0, or None")


def _find(name: str, where: Where, hedge_ms: float | None) -> Calls:
    found: Calls | None = _find_here(name, where)
    if found is None and where != "remote":
        found = _in_host(name, where, chosen_hosts.serving(name))
    if found is not None:
        return found
    try:
        return on_nodes(name, hedge_ms)
    except ModelError as error:
        raise _nowhere(name, where, error) from None


async def _afind(name: str, where: Where, hedge_ms: float | None) -> Calls:
    found: Calls | None = _find_here(name, where)
    if found is None and where != "remote":
        found = _in_host(name, where, await chosen_hosts.aserving(name))
    if found is not None:
        return found
    try:
        return await aon_nodes(name, hedge_ms)
    except ModelError as error:
        raise _nowhere(name, where, error) from None


def _find_here(name: str, where: Where) -> Serving | LocalCalls | None:
    """Return what is defined in this process; None: look further."""
    if where in {"host", "remote"}:
        return None
    serving: Serving | None = find(name) if where == "local" else get(name)
    return serving.here if serving is not None and where == "local" else serving


def _in_host(name: str, where: Where, found: Hosts | None) -> HostedCalls | None:
    """Return what the model host runs; None: look further."""
    if found is not None:
        return HostedCalls(name, found)
    if where == "host":
        raise ModelError(f"no model host serves {name!r}")
    return None


def _nowhere(name: str, where: Where, error: ModelError) -> ModelError:
    """Return an error that names every place that was looked at."""
    if where == "remote":
        return error
    host = "no model host" if chosen_hosts.current() is None else "not in the model host"
    return ModelError(f"{unknown(name)}; {host}; {error}")
