"""Errors of a WSGI app as responses."""

from __future__ import annotations

import itertools
import sys
from types import GeneratorType
from typing import TYPE_CHECKING, Any, Self

from hornbeam_ml.web.problems import note, problem_of

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from hornbeam_ml.web.problems import Problem


class WsgiErrors:
    """A WSGI app whose errors become responses, unless its response has started.

    An app that is a generator has started with its first chunk. What other iterables raise, such
    as those of a framework, comes after the start.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Run the app."""
        called = False

        def start(*args: Any) -> Any:
            nonlocal called
            called = True
            return start_response(*args)

        try:
            body: Iterable[bytes] = self.app(environ, start)
            return _Begun(body) if isinstance(body, GeneratorType) else body
        except Exception as error:
            problem = problem_of(error)
            if problem is None:
                raise
            note(error)
            again = (sys.exc_info(),) if called else ()
            return send_problem(problem, start_response, *again)


def send_problem(problem: Problem, start_response: Any, *again: Any) -> Iterable[bytes]:
    """Start the response about a problem, and return its body.

    Args:
        problem: The problem.
        start_response: The server's.
        again: When it was called before: what `sys.exc_info` says. The server raises that when
            headers are sent already.
    """
    start_response(f"{problem.status} {problem.reason}", problem.headers, *again)
    return [problem.body]


class _Begun:
    """The chunks of a generator, the first of which was made when this was."""

    def __init__(self, chunks: Generator[bytes]) -> None:
        self._chunks = chunks
        self._first = list(itertools.islice(chunks, 1))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        return self._first.pop() if self._first else next(self._chunks)

    def close(self) -> None:
        """Close the generator, as servers do in the end."""
        self._chunks.close()
