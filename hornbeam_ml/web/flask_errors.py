"""Errors of a Flask app as responses; the app's own handlers come first."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from hornbeam_ml.web.problems import ERRORS, note, problem_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hornbeam_ml.web.problems import Problem


def is_flask(app: Any) -> bool:
    """Return whether an object is a Flask app; does not import Flask."""
    flask = sys.modules.get("flask")
    return flask is not None and isinstance(app, flask.Flask)


def install(app: Any) -> None:
    """Have the errors of an app answered, but for those for which it has a handler.

    Raises:
        RuntimeError: the app has started.
    """
    handlers = app.error_handler_spec[None][None]
    for kind in ERRORS:
        if kind not in handlers:
            try:
                app.register_error_handler(kind, _handle)
            except AssertionError as error:  # how Flask says it
                raise RuntimeError(
                    "install_error_handlers: the app has started; call it before that"
                ) from error


def _handle(error: Exception) -> Any:
    """Answer an error as the app would, if it has a way to, else in our own."""
    from flask import current_app

    problem = problem_of(error)
    # Flask prefers ours, which is for just this error, to a handler for a base class.
    own = _find(type(error), codes=(None,))
    if own is not None:
        return current_app.ensure_sync(own)(error)
    if problem is None:
        raise error
    raised = _http_exception(problem)
    own = _find(type(raised), codes=(problem.status, None))
    if own is not None:
        return current_app.ensure_sync(own)(raised)
    note(error)
    return problem.body, problem.status, problem.headers


def _http_exception(problem: Problem) -> Any:
    from werkzeug.exceptions import GatewayTimeout, ServiceUnavailable

    if problem.retry_after is not None:
        return ServiceUnavailable(problem.detail, retry_after=problem.retry_after)
    return GatewayTimeout(problem.detail)


def _find(kind: type[BaseException], *, codes: Iterable[int | None]) -> Any:
    """Return the app's own handler for a type of error, as Flask looks for it, or None."""
    from flask import current_app, request

    specification = current_app.error_handler_spec
    for code in codes:
        for name in (*request.blueprints, None):
            handlers = specification[name][code]
            for base in kind.__mro__:
                handler = handlers.get(base)
                if handler is not None and handler is not _handle:
                    return handler
    return None
