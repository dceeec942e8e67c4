"""The pages in front of the app of a worker, at a path of its own: ``HORNBEAM_ADMIN_PATH``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from hornbeam_ml.web.access import token_from
from hornbeam_ml.web.apps import AsgiPages, WsgiPages, path_in
from hornbeam_ml.web.pages import Pages
from hornbeam_state.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable, Mapping

    from hornbeam_ml.http.interfaces import Interface

PATH_VARIABLE: Final = "HORNBEAM_ADMIN_PATH"
# No dots alone, which clients and proxies resolve, and nothing that is quoted in a URL.
_PATH: Final = re.compile(r"(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~-]+)+")


def path_from(environ: Mapping[str, str]) -> str | None:
    """Return what ``HORNBEAM_ADMIN_PATH`` says, without a slash at its end; None: nothing.

    Raises:
        ConfigError: it is no path below ``/``.
    """
    value = environ.get(PATH_VARIABLE, "").strip()
    if not value:
        return None
    path = value.removesuffix("/")
    if _PATH.fullmatch(path):
        return path
    raise ConfigError(
        f"{PATH_VARIABLE}={value!r}: use a path such as /_hornbeam, of letters, digits and . _ ~ -"
    )


def with_pages(app: Any, interface: Interface, environ: Mapping[str, str]) -> tuple[Any, Interface]:
    """Return an app with the pages in front of it, and its interface, as the environment wants.

    The path is one of the app's own: below ``root_path`` or ``SCRIPT_NAME``. Nothing of the app
    sees requests to it. Without ``HORNBEAM_ADMIN_PATH`` the app itself is returned.

    Raises:
        ConfigError: ``HORNBEAM_ADMIN_PATH`` or ``HORNBEAM_ADMIN_TOKEN`` makes no sense.
    """
    prefix, token = path_from(environ), token_from(environ)
    if prefix is None:
        return app, interface
    if interface == "wsgi":
        return _WsgiFront(app, prefix, WsgiPages(Pages(token))), interface
    if interface == "asgi2":
        from uvicorn.middleware.asgi2 import ASGI2Middleware

        app = ASGI2Middleware(app)
    return _AsgiFront(app, prefix, AsgiPages(Pages(token))), "asgi3"


class _AsgiFront:
    """Hands requests below the prefix to the pages, and everything else to the app."""

    def __init__(self, app: Any, prefix: str, pages: AsgiPages) -> None:
        self.app = app
        self._prefix = prefix
        self._below = f"{prefix}/"
        self._pages = pages

    # No coroutine function: requests of the app pass without one more in between.
    def __call__(self, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        if scope["type"] == "http" and self._prefix in scope["path"]:
            path = path_in(scope)
            if path.startswith(self._below) or path == self._prefix:
                root = scope.get("root_path", "") + self._prefix
                path = root + path.removeprefix(self._prefix)
                return self._pages({**scope, "root_path": root, "path": path}, receive, send)
        passed: Awaitable[None] = self.app(scope, receive, send)
        return passed


class _WsgiFront:
    """The same for WSGI."""

    def __init__(self, app: Any, prefix: str, pages: WsgiPages) -> None:
        self.app = app
        self._prefix = prefix
        self._below = f"{prefix}/"
        self._pages = pages

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path.startswith(self._below) or path == self._prefix:
            below = {
                **environ,
                "SCRIPT_NAME": environ.get("SCRIPT_NAME", "") + self._prefix,
                "PATH_INFO": path.removeprefix(self._prefix),
            }
            return self._pages(below, start_response)
        body: Iterable[bytes] = self.app(environ, start_response)
        return body
