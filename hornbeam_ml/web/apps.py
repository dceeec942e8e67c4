"""The pages as an ASGI and as a WSGI application."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from hornbeam_ml.web.pages import respond

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable


def asgi_app() -> Callable[..., Awaitable[None]]:
    """Return the pages as an ASGI application.

    Example:
        >>> app.mount("/hornbeam", asgi_app())  # doctest: +SKIP
    """
    return _serve_asgi


def wsgi_app() -> Callable[..., Iterable[bytes]]:
    """Return the pages as a WSGI application.

    Example:
        >>> DispatcherMiddleware(app, {"/hornbeam": wsgi_app()})  # doctest: +SKIP
    """
    return _serve_wsgi


async def _serve_asgi(scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG001
    if scope["type"] != "http":
        return
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    query = scope.get("query_string", b"").decode("latin-1")
    page = await asyncio.to_thread(respond, scope["method"], path, query)
    headers = [(name.encode(), value.encode()) for name, value in _headers(page)]
    await send({"type": "http.response.start", "status": page.status, "headers": headers})
    body = b"" if scope["method"] == "HEAD" else page.body
    await send({"type": "http.response.body", "body": body})


def _serve_wsgi(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    method = environ["REQUEST_METHOD"]
    page = respond(method, environ.get("PATH_INFO", ""), environ.get("QUERY_STRING", ""))
    start_response(f"{page.status} {page.reason}", list(_headers(page)))
    return [b"" if method == "HEAD" else page.body]


def _headers(page: Any) -> Iterable[tuple[str, str]]:
    yield from page.headers
    yield "content-length", str(len(page.body))
