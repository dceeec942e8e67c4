"""Calls to nodes over the process default store: the functions that users import.

They have one piece of state: the channels to nodes, which belong to the default store.
"""

from __future__ import annotations

import os
import secrets
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

from hornbeam_state.default import default_store
from hornbeam_state.rpc.caller import CAST_TIMEOUT_MS, Caller, context
from hornbeam_state.rpc.choosing import split_name
from hornbeam_state.rpc.requests import make_request
from hornbeam_state.rpc.server import own_nodes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from hornbeam_state.rpc.entries import Entry, NodeInfo
    from hornbeam_state.transports.base import Request

_caller: Caller | None = None
_lock = threading.Lock()


def default_caller() -> Caller:
    """Return what makes the calls of this process over the default store."""
    store, caller = default_store(), _caller
    return caller if caller is not None and caller.store is store else _make_default()


def _make_default() -> Caller:
    global _caller  # noqa: PLW0603 - the one process default
    with _lock:
        store, before = default_store(), _caller
        if before is not None and before.store is store:
            return before
        made = _caller = Caller(store)
        if before is not None:
            before.close()
        return made


def _reset_after_fork() -> None:
    global _lock  # noqa: PLW0603 - a thread of the parent may have held it
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_reset_after_fork)


def nodes(match: str | None = None, *, exposes: str | None = None) -> list[str]:
    """Return the names of the live nodes other than this process's, sorted.

    It is as of a quarter second ago at most. A node that is killed is gone from it after four
    seconds, one that is closed at once.

    Args:
        match: A part of the name before the ``@``.
        exposes: ``"module.function"`` that the node has to expose.

    Raises:
        StoreUnavailable: the registry cannot be reached.
    """
    return _others(default_caller().registry.live(), match, exposes)


async def anodes(match: str | None = None, *, exposes: str | None = None) -> list[str]:
    """Awaitable twin of `nodes`."""
    return _others(await default_caller().registry.alive(), match, exposes)


def node_info(name: str) -> NodeInfo:
    """Return what a node last said of itself.

    Raises:
        NodeDown: there is none of that name.
    """
    return default_caller().registry.info(name)


async def anode_info(name: str) -> NodeInfo:
    """Awaitable twin of `node_info`."""
    return await default_caller().registry.ainfo(name)


def rpc_call(
    node: str,
    module: str,
    function: str,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    timeout_ms: float | None = 5000,
) -> Any:
    """Call a function on a node and return its result; blocks.

    It runs at most once, also when this process or the node dies. Interrupted, or too late, it is
    cancelled: what waits for its turn there never runs, and the result of what runs is dropped.

    Args:
        node: The full name of the node.
        module: The module of the function, as it was exposed there.
        function: Its name.
        args: Values of the codec. Arrays must not change until the call is done.
        kwargs: The same, with names.
        timeout_ms: Until when the result has to be here; None: no bound.

    Raises:
        NodeDown: the node is not there, or went away; `sent` says whether the function may have
            run.
        NotExposed: it does not expose the function.
        RemoteError: the function raised something else than an error of hornbeam.
        Overloaded: more calls wait than there may.
        DeadlineExceeded: the timeout passed; the function may have run.
        CodecError: an argument or the result is of an unknown type, or too large.
        HornbeamError: the function raised it.
    """
    return default_caller().call(node, _request((module, function), args, kwargs, timeout_ms, node))


async def arpc_call(
    node: str,
    module: str,
    function: str,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    timeout_ms: float | None = 5000,
) -> Any:
    """Awaitable twin of `rpc_call`. Cancelled, it cancels the call."""
    request = _request((module, function), args, kwargs, timeout_ms, node)
    return await default_caller().acall(node, request)


def rpc_cast(
    node: str,
    module: str,
    function: str,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    key: str | None = None,
) -> None:
    """Have a function called on a node; returns when that is taken down.

    What it returns is dropped, and what it raises is logged there. With a store on Redis it runs
    at least once within a day: it is kept while the node is away or starts again, and tried again
    when the function raises or the node dies, five times in all; then it is one of the
    `dead_letters`. With another store it waits in the node: it runs once if the node lives on, and
    never if the node dies before.

    Args:
        node: The full name of the node, which has to be there now.
        module: The module of the function, as it was exposed there.
        function: Its name.
        args: Values of the codec.
        kwargs: The same, with names.
        key: Of several casts to a node with one key, one runs: within a day, or with another store
            while the node remembers it.

    Raises:
        NodeDown: the node is not there, or went away; if `sent` is True it may run nevertheless.
        DeadlineExceeded: it was not taken down within seconds; it may run nevertheless.
        NotExposed, Overloaded, CodecError: as `rpc_call` does.
    """
    default_caller().call(node, _cast_request((module, function), args, kwargs, node, key=key))


async def arpc_cast(
    node: str,
    module: str,
    function: str,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    key: str | None = None,
) -> None:
    """Awaitable twin of `rpc_cast`."""
    await default_caller().acall(
        node, _cast_request((module, function), args, kwargs, node, key=key)
    )


def rpc_stream(
    node: str,
    module: str,
    function: str,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    timeout_ms: float | None = 5000,
) -> Iterator[Any]:
    """Return an iterator over what a generator on a node yields.

    The call begins with the first item that is asked for. A stream that fails ends with an error;
    what came before is delivered. Closing or dropping the iterator closes the generator. A listener
    that is thousands of items behind gets `Overloaded`.

    Args:
        node: The full name of the node.
        module: The module of the generator, as it was exposed there.
        function: Its name.
        args: Values of the codec.
        kwargs: The same, with names.
        timeout_ms: Until when the last item has to be here; None: no bound.
    """
    return default_caller().stream(
        node, _request((module, function), args, kwargs, timeout_ms, node)
    )


def arpc_stream(
    node: str,
    module: str,
    function: str,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    timeout_ms: float | None = 5000,
) -> AsyncIterator[Any]:
    """Twin of `rpc_stream`: an async iterator, called without `await`."""
    return default_caller().astream(
        node, _request((module, function), args, kwargs, timeout_ms, node)
    )


def call(function: str, *args: Any, timeout_ms: float | None = 5000, **kwargs: Any) -> Any:
    """Call ``"module.function"`` on a live node that exposes it: the less busy of two random ones.

    This process counts when it is such a node. If the node is gone, and certainly did not get the
    call, another one does, in the time that is left. Otherwise as `rpc_call`, which also is the way
    to pass an argument named ``function`` or ``timeout_ms``.

    Raises:
        NotExposed: no live node exposes it.
    """
    make = partial(_request, split_name(function), args, kwargs, timeout_ms)
    return default_caller().call_any(function, make)


async def acall(function: str, *args: Any, timeout_ms: float | None = 5000, **kwargs: Any) -> Any:
    """Awaitable twin of `call`. Cancelled, it cancels the call."""
    make = partial(_request, split_name(function), args, kwargs, timeout_ms)
    return await default_caller().acall_any(function, make)


def cast(function: str, *args: Any, **kwargs: Any) -> None:
    """Have ``"module.function"`` called on a live node that exposes it; see `call`, `rpc_cast`."""
    default_caller().call_any(function, partial(_cast_request, split_name(function), args, kwargs))


async def acast(function: str, *args: Any, **kwargs: Any) -> None:
    """Awaitable twin of `cast`."""
    make = partial(_cast_request, split_name(function), args, kwargs)
    await default_caller().acall_any(function, make)


def _request(
    key: tuple[str, str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    timeout_ms: float | None,
    node: str,
) -> Request:
    return make_request(key, args, kwargs, timeout_ms, context(node))


def _cast_request(
    names: tuple[str, str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    node: str,
    *,
    key: str | None = None,
) -> Request:
    if not isinstance(key, str | None):
        raise TypeError(f"the key of a cast is a str, not {type(key).__qualname__}")
    if key == "":
        raise ValueError("the key of a cast is not empty")
    which = context(node, cast=secrets.token_hex(12) if key is None else key)
    return make_request(names, args, kwargs, CAST_TIMEOUT_MS, which)


def _others(entries: Sequence[Entry], match: str | None, exposes: str | None) -> list[str]:
    own = {one.name for one in own_nodes()}
    return [
        entry.name
        for entry in entries
        if entry.name not in own
        and (match is None or match in entry.name.partition("@")[0])
        and (exposes is None or exposes in entry.functions)
    ]
