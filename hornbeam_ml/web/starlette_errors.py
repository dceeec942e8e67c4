"""Errors of a Starlette or FastAPI app as responses; the app's own handlers come first."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from hornbeam_ml.web.asgi_errors import Outgoing, answer
from hornbeam_ml.web.problems import problem_of


def is_starlette(app: Any) -> bool:
    """Return whether an object is a Starlette or FastAPI app; imports neither."""
    starlette = sys.modules.get("starlette.applications")
    return starlette is not None and isinstance(app, starlette.Starlette)


def install(app: Any) -> None:
    """Have the errors of an app answered, unless that is so already.

    Raises:
        RuntimeError: the app has started.
    """
    if any(layer.cls is StarletteErrors for layer in app.user_middleware):
        return
    if app.middleware_stack is not None:
        raise RuntimeError("install_error_handlers: the app has started; call it before that")
    from starlette.middleware import Middleware

    # The inner one is just around the app's own handlers, which so come first, and inside of its
    # middleware: CORS headers are added to what it sends. The outer one is for errors that
    # middleware raises.
    layer = Middleware(StarletteErrors, owner=app)
    if app.user_middleware:
        app.user_middleware.insert(0, layer)
    app.user_middleware.append(layer)


class StarletteErrors:
    """Middleware that answers errors that no handler of the app took.

    Args:
        app: What it is around.
        owner: The app that it belongs to.
    """

    def __init__(self, app: Any, owner: Any) -> None:
        self.app = app
        self.owner = owner

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Run the app inside."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        outgoing = Outgoing(send)
        try:
            await self.app(scope, receive, outgoing.send)
        except Exception as error:
            # A handler for `Exception` is the outermost thing in an app.
            if outgoing.started or Exception in self.owner.exception_handlers:
                raise
            if not await self._answer(error, scope, receive, outgoing):
                raise

    async def _answer(self, error: Exception, scope: Any, receive: Any, outgoing: Outgoing) -> bool:
        """Answer as the app does for the status, if it has a way to, else in our own."""
        problem = problem_of(error)
        handlers = self.owner.exception_handlers
        exception = _http_exception(self.owner)
        if problem is None:
            return False
        kinds = (problem.status, *exception.__mro__[: -len(Exception.__mro__)])
        handler = next((handlers[kind] for kind in kinds if kind in handlers), None)
        if handler is None or _is_default(handler):
            return await answer(error, outgoing)
        raised = exception(problem.status, problem.detail, problem.retry_headers)
        await _respond(handler, raised, scope, receive, outgoing.send)
        return True


def _http_exception(app: Any) -> Any:
    """Return the type of HTTP errors that an app's handlers know."""
    fastapi = sys.modules.get("fastapi")
    if fastapi is not None and isinstance(app, fastapi.FastAPI):
        return fastapi.HTTPException
    from starlette.exceptions import HTTPException

    return HTTPException


def _is_default(handler: Any) -> bool:
    return getattr(handler, "__module__", None) == "fastapi.exception_handlers"


async def _respond(handler: Any, error: Exception, scope: Any, receive: Any, send: Any) -> None:
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request

    request = Request(scope, receive, send)
    if inspect.iscoroutinefunction(handler):
        response = await handler(request, error)
    else:
        response = await run_in_threadpool(handler, request, error)
    await response(scope, receive, send)
