"""`install_error_handlers`: finding the apps of frameworks, wherever they are."""

from __future__ import annotations

from inspect import getattr_static
from types import MemberDescriptorType, MethodType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from hornbeam_ml.http.interfaces import interface_of
from hornbeam_ml.web import flask_errors, starlette_errors
from hornbeam_ml.web.asgi_errors import AsgiErrors
from hornbeam_ml.web.wsgi_errors import WsgiErrors

if TYPE_CHECKING:
    from collections.abc import Iterator

App = TypeVar("App")
# What middleware calls the app inside; what dispatchers call those they choose from.
_INSIDE: Final = (
    *("app", "_app", "application", "wsgi_app", "asgi_app", "wsgi_application", "router"),
    "__wrapped__",
)
_SEVERAL: Final = ("routes", "mounts")
_DEEPEST: Final = 20


def install_error_handlers(app: App) -> App:
    """Have the errors of hornbeam answered as what they mean to HTTP clients.

    `Overloaded`, `StoreUnavailable` and `NodeDown` become 503 with ``Retry-After``,
    `DeadlineExceeded` becomes 504, each with a short JSON body, ``{"detail": ...}``, in which there
    is nothing of the error. What the app handles itself stays as it is: these errors, a base class
    of them (`Exception` too), the status 503 or 504, or HTTP errors in general. An error after the
    response has started is raised as ever.

    Call it when everything is mounted and all middleware is added, before the app serves; a second
    call does nothing. Under ``gunicorn -k hornbeam`` there is no need to.

    Args:
        app: FastAPI, Starlette, Flask, or any ASGI or WSGI callable. Apps of these frameworks are
            also found inside of middleware and where they are mounted, unless in a closure. Other
            frameworks make a 500 of any error before it gets here.

    Returns:
        The app itself for these frameworks, otherwise a callable around it.

    Raises:
        RuntimeError: the app has started.
        ConfigError: the app is neither ASGI nor WSGI.

    Example:
        >>> app = install_error_handlers(FastAPI())  # doctest: +SKIP
    """
    install_in_frameworks(app)
    if _is_framework(app) or isinstance(app, AsgiErrors | WsgiErrors):
        return app
    interface = interface_of(app)
    if interface == "wsgi":
        return WsgiErrors(app)  # type: ignore[return-value] # as good as
    if interface == "asgi2":
        from uvicorn.middleware.asgi2 import ASGI2Middleware

        return AsgiErrors(ASGI2Middleware(app))  # type: ignore[return-value,arg-type]
    return AsgiErrors(app)  # type: ignore[return-value]


def install_in_frameworks(app: Any) -> None:
    """Install them in each app of a framework that can be found in an app.

    Raises:
        RuntimeError: one has started.
    """
    for found in list(_apps_in(app)):
        if starlette_errors.is_starlette(found):
            starlette_errors.install(found)
        elif flask_errors.is_flask(found):
            flask_errors.install(found)


def _is_framework(app: Any) -> bool:
    return starlette_errors.is_starlette(app) or flask_errors.is_flask(app)


def _apps_in(app: Any) -> Iterator[Any]:
    """Yield the apps of frameworks in an app, itself included."""
    seen: set[int] = set()
    layer = [app]
    for _ in range(_DEEPEST):
        layer = [part for part in layer if id(part) not in seen]
        seen.update(map(id, layer))
        for part in layer:
            if _is_framework(part):
                yield part
        layer = [inner for part in layer for inner in _parts_of(part)]


def _parts_of(app: Any) -> Iterator[Any]:
    """Yield what an app may be made of, running no code of it."""
    for name in _INSIDE:
        inner = _attribute(app, name)
        if callable(inner):
            yield inner
    for name in _SEVERAL:
        several = _attribute(app, name)
        if isinstance(several, dict):
            yield from several.values()
        elif isinstance(several, list):
            yield from several
    if isinstance(app, MethodType):
        yield app.__self__


def _attribute(app: Any, name: str) -> Any:
    found = getattr_static(app, name, None)
    return getattr(app, name, None) if isinstance(found, MemberDescriptorType) else found
