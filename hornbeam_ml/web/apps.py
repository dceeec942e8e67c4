"""The pages as an ASGI and as a WSGI application."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from hornbeam_ml.web.access import token_from
from hornbeam_ml.web.pages import Pages

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hornbeam_ml.web.pages import Page


class AsgiPages:
    """The pages as an ASGI application. Those of probes are answered on the event loop itself.

    A thread pool that is busy with calls to a store that is down does not hold them up.
    """

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG002
        """Send one page."""
        if scope["type"] != "http":
            return
        path = path_in(scope)
        query = scope.get("query_string", b"").decode("latin-1")
        request = (scope["method"], path, query, _authorization(scope["headers"]))
        if self._pages.waits(path):
            page = await asyncio.to_thread(self._pages.respond, *request)
        else:
            page = self._pages.respond(*request)
        headers = [(name.encode(), value.encode()) for name, value in _headers(page)]
        await send({"type": "http.response.start", "status": page.status, "headers": headers})
        body = b"" if scope["method"] == "HEAD" else page.body
        await send({"type": "http.response.body", "body": body})


class WsgiPages:
    """The pages as a WSGI application."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Return one page."""
        method = environ["REQUEST_METHOD"]
        page = self._pages.respond(
            method,
            environ.get("PATH_INFO", ""),
            environ.get("QUERY_STRING", ""),
            environ.get("HTTP_AUTHORIZATION"),
        )
        start_response(f"{page.status} {page.reason}", list(_headers(page)))
        return [b"" if method == "HEAD" else page.body]


def asgi_app() -> AsgiPages:
    """Return the pages as an ASGI application.

    Raises:
        ConfigError: ``HORNBEAM_ADMIN_TOKEN`` makes no sense.

    Example:
        >>> app.mount("/hornbeam", asgi_app())  # doctest: +SKIP
    """
    return AsgiPages(Pages(token_from(os.environ)))


def wsgi_app() -> WsgiPages:
    """Return the pages as a WSGI application.

    Raises:
        ConfigError: ``HORNBEAM_ADMIN_TOKEN`` makes no sense.

    Example:
        >>> DispatcherMiddleware(app, {"/hornbeam": wsgi_app()})  # doctest: +SKIP
    """
    return WsgiPages(Pages(token_from(os.environ)))


def path_in(scope: Any) -> str:
    """Return the path of a request below where the app is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _authorization(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    found = (value.decode("latin-1") for name, value in headers if name == b"authorization")
    return next(found, None)


def _headers(page: Page) -> Iterable[tuple[str, str]]:
    yield from page.headers
    yield "content-length", str(len(page.body))
