"""Where requests enter the app in a worker: deadlines, clients that leave, errors as responses."""

from __future__ import annotations

import time
from asyncio import CancelledError
from math import inf
from typing import TYPE_CHECKING, Any, Final

from hornbeam_ml.errors import ClientDisconnected
from hornbeam_ml.request import TIMEOUT_HEADER, Request, deadline_from, set_current_request
from hornbeam_ml.web import asgi_errors, wsgi_errors
from hornbeam_ml.web.problems import LEAVING, bad_request

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

_ASGI_NAME: Final = TIMEOUT_HEADER.lower().encode()
_WSGI_NAME: Final = "HTTP_" + TIMEOUT_HEADER.upper().replace("-", "_")
_MOST_CAUSES: Final = 20

GRACE_IS_OVER: Final = "--graceful-timeout is over"
"""With what a server that ends cancels the task of a request: nobody else waits for that."""


class AsgiEntry:
    """Runs the ASGI app for the requests of one connection, which come one after the other."""

    __slots__ = ("_app", "_request")

    def __init__(self, app: Any) -> None:
        self._app = app
        self._request: Request | None = None

    @property
    def client_left(self) -> bool:
        """Whether the client of the latest request went away before its response was complete."""
        return self._request is not None and self._request.client_left

    def leave(self) -> None:
        """Note that the connection is lost."""
        if self._request is not None:
            self._request.leave()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Run the app for one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        timeout = None
        for name, value in scope["headers"]:
            if name == _ASGI_NAME:
                timeout = value if timeout is None else b"%b,%b" % (timeout, value)
        try:
            request = _Exchange(inf if timeout is None else _deadline(timeout))
        except ValueError as error:
            await asgi_errors.send_problem(bad_request(str(error)), send)
            return
        request.upstream, request.started = send, False
        self._request = request
        set_current_request(request)  # of this task alone
        try:
            await self._app(scope, receive, request.send)
        except (Exception, CancelledError) as error:
            if not await _is_settled(error, request):
                raise
        finally:
            request.end()


class _Exchange(Request):
    """A request whose response is watched: with the last message it is over.

    Also when its client has left: the background tasks that follow are for nobody in particular.

    Attributes:
        upstream: The server's `send`.
        started: Whether the response has started.
    """

    __slots__ = ("started", "upstream")
    started: bool
    upstream: Callable[[Any], Awaitable[None]]

    # Neither a coroutine function nor `__call__`: this runs for every message of every request.
    def send(self, message: Any) -> Awaitable[None]:
        """Pass a message on."""
        if message["type"] == "http.response.start":
            self.started = True
        elif not message.get("more_body"):
            self.end()
        return self.upstream(message)


def _deadline(header: bytes) -> float:
    return deadline_from(header.decode("latin-1"), time.monotonic())


async def _is_settled(error: BaseException, request: _Exchange) -> bool:
    """Answer an error that means an answer; return whether nobody else needs to know of it."""
    if isinstance(error, CancelledError):
        if GRACE_IS_OVER not in error.args:
            return False
        if not request.started:
            await asgi_errors.send_problem(LEAVING, request.send)
        return True
    if request.client_left and _is_about_leaving(error):
        return True
    return isinstance(error, Exception) and await asgi_errors.answer(error, request)


def _is_about_leaving(error: BaseException) -> bool:
    """Return whether an error is, or was raised from, that the client left."""
    cause: BaseException | None = error
    for _ in range(_MOST_CAUSES):
        if isinstance(cause, BaseExceptionGroup):
            return all(map(_is_about_leaving, cause.exceptions))
        if cause is None or isinstance(cause, ClientDisconnected):
            break
        cause = cause.__cause__  # an error in the handling of one is another matter
    return isinstance(cause, ClientDisconnected)


class WsgiEntry:
    """Runs the WSGI app. The server has no way to tell when a client leaves."""

    def __init__(self, app: Any) -> None:
        self._app = wsgi_errors.WsgiErrors(app)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Run the app for one request, on the thread that also sends the response."""
        header = environ.get(_WSGI_NAME)
        request = None
        if header is not None:
            try:
                request = Request(deadline_from(header, time.monotonic()))
            except ValueError as error:
                return wsgi_errors.send_problem(bad_request(str(error)), start_response)
        # Not reset in the end: a body may be made after this returns, and the thread does nothing
        # else before its next request.
        set_current_request(request)
        return self._app(environ, start_response)
