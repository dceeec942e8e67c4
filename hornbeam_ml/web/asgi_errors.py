"""Errors of an ASGI app as responses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from hornbeam_ml.web.problems import note, problem_of

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from hornbeam_ml.web.problems import Problem


class Outgoing:
    """What an app sends: its `send` notes whether the response has started.

    Attributes:
        started: Whether it has: then it is too late for another.
    """

    __slots__ = ("_send", "started")

    def __init__(self, send: Any) -> None:
        self._send = send
        self.started = False

    # Neither a coroutine function nor `__call__`: this runs for every message of every request.
    def send(self, message: Any) -> Awaitable[None]:
        """Pass a message on."""
        if message["type"] == "http.response.start":
            self.started = True
        sent: Awaitable[None] = self._send(message)
        return sent


class AsgiErrors:
    """An ASGI app whose errors become responses, unless its response has started."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Run the app."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        outgoing = Outgoing(send)
        try:
            await self.app(scope, receive, outgoing.send)
        except Exception as error:
            if not await answer(error, outgoing):
                raise


class Response(Protocol):
    """What is known of a response."""

    started: bool

    def send(self, message: Any) -> Awaitable[None]:
        """Pass a message on."""
        ...


async def answer(error: Exception, response: Response) -> bool:
    """Send the response that an error means; return False when there is none, or too late."""
    problem = problem_of(error)
    if problem is None or response.started:
        return False
    note(error)
    await send_problem(problem, response.send)
    return True


async def send_problem(problem: Problem, send: Any) -> None:
    """Send the response about a problem."""
    headers = [(name.lower().encode(), value.encode()) for name, value in problem.headers]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": problem.body})
