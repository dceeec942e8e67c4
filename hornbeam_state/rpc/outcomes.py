"""Errors as callers get them: what a function raised, and what became of the call."""

from __future__ import annotations

import traceback
from typing import Final

from hornbeam_state.errors import HornbeamError, NodeDown, RemoteError, RpcError

_MOST_TRACEBACK: Final = 8192


def remote(error: BaseException, *, with_traceback: bool = False) -> HornbeamError:
    """Return the error that the caller of a function gets for one that it raised.

    An error of hornbeam is the same for the caller, who can act on it: `Overloaded`, say. All
    others become a `RemoteError`, so that none looks as if it had been raised by the call. So does
    one about a call to another node: it says nothing of this one.

    Args:
        error: What the function raised.
        with_traceback: Whether the caller is told where; that may show values.
    """
    if isinstance(error, RemoteError) or (
        isinstance(error, HornbeamError) and not isinstance(error, RpcError)
    ):
        return error
    told = RemoteError(type(error).__name__, _message(error))
    if with_traceback:
        told.remote_traceback = "".join(traceback.format_exception(error))[-_MOST_TRACEBACK:]
    return told


def unsent(message: str) -> NodeDown:
    """Return the error for a call that certainly did not reach its node."""
    error = NodeDown(message)
    error.sent = False
    return error


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - it is the code of an application
        return "its message cannot be read"
