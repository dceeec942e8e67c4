"""What a call is on the wire: arguments, and what goes with them, as a `Request`. Pure."""

from __future__ import annotations

from math import inf, isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

from hornbeam_state.errors import CodecError
from hornbeam_state.transports.base import Request

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Context(NamedTuple):
    """What goes with the arguments of a call.

    Attributes:
        names: Names of those arguments, the last ones, that have names.
        cast: Which cast this is: one that comes again runs once. None: it is a call.
        traceparent: The trace it belongs to.
        turn: The call of the same node that waits for this one: both share its turn to run.
        to: The process that a call is for, by its token: one that has the name later refuses it.
    """

    names: tuple[str, ...] = ()
    cast: str | None = None
    traceparent: str | None = None
    turn: str | None = None
    to: str | None = None


def make_request(
    key: tuple[str, str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    timeout_ms: float | None,
    context: Context,
) -> Request:
    """Return a request. The arguments are each a value of it, so that arrays are not copied.

    Args:
        key: The module and the function.
        args: Arguments without names.
        kwargs: Arguments with names.
        timeout_ms: Milliseconds until the caller stops waiting; None: never.
        context: What goes with them; the names are filled in here.

    Raises:
        TypeError, ValueError: an argument is none that a call can have.
    """
    named = kwargs or {}
    if not all(isinstance(text, str) for text in (*key, *named)):
        raise TypeError("module, function and the names of arguments are of type str")
    fields = context._replace(names=tuple(named))._asdict()
    return Request(
        target=key[0],
        method=key[1],
        values=(*args, *named.values()),
        options={key: value for key, value in fields.items() if value},
        timeout=_seconds(timeout_ms),
    )


def read_context(request: Request) -> Context:
    """Return what goes with the arguments.

    Raises:
        CodecError: it is damaged.
    """
    context = Context(
        **{key: value for key, value in request.options.items() if key in Context._fields}
    )
    texts = (context.cast, context.traceparent, context.turn, context.to, *context.names)
    if any(not isinstance(text, str | None) for text in texts):
        raise CodecError("damaged call: its options are not texts")
    if len(context.names) > len(request.values):
        raise CodecError("damaged call: more names than arguments")
    return context


def read_arguments(request: Request, names: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments without names, and those with."""
    values = list(request.values)
    first = len(values) - len(names)
    return values[:first], dict(zip(names, values[first:], strict=True))


def _seconds(timeout_ms: float | None) -> float:
    if timeout_ms is None:
        return inf
    if isinstance(timeout_ms, bool) or not isinstance(timeout_ms, int | float):
        raise TypeError(f"timeout_ms is a number or None, not {type(timeout_ms).__qualname__}")
    if not (isfinite(timeout_ms) and timeout_ms > 0):
        raise ValueError(f"timeout_ms={timeout_ms}: give milliseconds above 0, or None")
    return timeout_ms / 1000
