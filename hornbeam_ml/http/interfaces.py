"""Telling what kind of app one is: WSGI, ASGI, or the older ASGI 2."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, Final, Literal

from hornbeam_state.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

Interface = Literal["wsgi", "asgi2", "asgi3"]
OVERRIDE: Final = "HORNBEAM_INTERFACE"
_BY_ARGUMENTS: Final[dict[int, Interface]] = {1: "asgi2", 2: "wsgi", 3: "asgi3"}


def wanted_interface(environ: Mapping[str, str]) -> str:
    """Return what ``HORNBEAM_INTERFACE`` says: ``auto``, ``wsgi`` or ``asgi``.

    Raises:
        ConfigError: it says something else.
    """
    wanted = environ.get(OVERRIDE, "").strip().lower() or "auto"
    if wanted not in ("auto", "wsgi", "asgi"):
        raise ConfigError(f"{OVERRIDE}={environ[OVERRIDE]!r}: use wsgi, asgi or auto")
    return wanted


def interface_of(app: Any, wanted: str = "auto") -> Interface:
    """Tell how an app wants to be called.

    Coroutine functions, and objects with a coroutine ``__call__``, are ASGI. Anything else is
    told by the number of arguments it needs: 3 (scope, receive, send) is ASGI, 2 (environ,
    start_response) is WSGI, 1 (scope) is the older ASGI 2, also as the constructor of a class.

    Args:
        app: The loaded app.
        wanted: ``wsgi`` and ``asgi`` override the above; see `wanted_interface`.

    Raises:
        ConfigError: it cannot be told; the message says how to decide it.
    """
    if wanted == "wsgi":
        return "wsgi"
    plain = inspect.isroutine(app) or inspect.isclass(app) or isinstance(app, functools.partial)
    call = app if plain else getattr(app, "__call__", app)  # noqa: B004 - the method itself
    if inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(inspect.unwrap(call)):
        return "asgi3"
    needed = _arguments_needed(call)
    if wanted == "asgi":
        return "asgi2" if needed == 1 else "asgi3"
    if needed in _BY_ARGUMENTS:
        return _BY_ARGUMENTS[needed]
    raise ConfigError(_undecided(app, needed))


def _arguments_needed(call: Any) -> int | None:
    """Count the positional arguments without a default; None where that decides nothing."""
    # A decorator's own arguments count. Where it takes any number, those of the function inside.
    for follow_wrapped in (False, True):
        try:
            signature = inspect.signature(call, follow_wrapped=follow_wrapped)
        except (TypeError, ValueError):  # not callable, or written in C
            return None
        parameters = signature.parameters.values()
        if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
            positional = [
                parameter.default is parameter.empty
                for parameter in parameters
                if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
            ]
            # (scope, receive=None, send=None) may be called with one or with three.
            return None if sum(positional) == 1 < len(positional) else sum(positional)
    return None


def _undecided(app: Any, needed: int | None) -> str:
    name = getattr(app, "__qualname__", None) or f"an object of {type(app).__qualname__}"
    if not callable(app):
        return f"the app ({name}) is not callable: name a WSGI or ASGI app, as in 'module:app'"
    if needed == 0:
        return (
            f"the app ({name}) takes no arguments: if it makes the app, write the name with "
            f"parentheses, as in 'module:{name}()'; else set {OVERRIDE}=wsgi or {OVERRIDE}=asgi"
        )
    return (
        f"cannot tell whether the app ({name}) is WSGI or ASGI: WSGI apps take 2 arguments "
        f"(environ, start_response), ASGI apps 3 (scope, receive, send); "
        f"set {OVERRIDE}=wsgi or {OVERRIDE}=asgi"
    )
