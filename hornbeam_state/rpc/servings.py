"""Models that a node runs beside the functions it exposes: they bound their calls themselves."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Protocol

from hornbeam_state.errors import (
    DeadlineExceeded,
    HornbeamError,
    NotExposed,
    RemoteError,
    RpcError,
)
from hornbeam_state.rpc.outcomes import remote
from hornbeam_state.rpc.tracing import traceparent

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

    from hornbeam_state.transports.base import Request

_PREFIX: Final = "serving:"
# What a caller would take for news of its call, and what would end the node's event loop.
_NOT_AS_THEY_ARE: Final = (RpcError, SystemExit, KeyboardInterrupt)


class Serving(Protocol):
    """A model. All of it runs on the event loop of the node."""

    async def answer(self, request: Request) -> Sequence[Any]:
        """Return the results of a call. What it raises reaches the caller as it is."""
        ...

    def answer_stream(self, request: Request) -> AsyncGenerator[Any, None]:
        """Yield the chunks that answer a call."""
        ...


class Servings(Protocol):
    """The models of a process."""

    def names(self) -> Mapping[str, bool]:
        """Return those that others may call, and whether each is idempotent. On any thread."""
        ...

    def find(self, name: str) -> Serving | None:
        """Return one of them; None: there is none of that name."""
        ...


class Nothing:
    """The `Servings` of a process that has none."""

    def names(self) -> Mapping[str, bool]:
        """Return no names."""
        return {}

    def find(self, name: str) -> None:
        """Return None."""


class Served:
    """The calls of the servings of a node. They take no turn of its functions.

    A serving makes batches of the calls that wait, and refuses those beyond its own limit: to let
    in as many as functions run at a time would keep its batches small.

    Args:
        node: The full name of the node.
        servings: What answers.

    Attributes:
        running: How many calls were begun and have not ended.
    """

    def __init__(self, node: str, servings: Servings) -> None:
        self.running = 0
        self._node = node
        self._servings = servings

    async def call(self, request: Request) -> Sequence[Any]:
        """Return the results of a call."""
        serving = self._admit(request)
        self.running += 1
        try:
            return await serving.answer(_own(request))
        except _NOT_AS_THEY_ARE as error:
            raise _told(error) from None
        finally:
            self.running -= 1

    async def stream(self, request: Request) -> AsyncGenerator[Any, None]:
        """Yield the chunks that answer a call."""
        serving = self._admit(request)
        self.running += 1
        try:
            async with aclosing(serving.answer_stream(_own(request))) as chunks:
                async for chunk in chunks:
                    yield chunk
        except _NOT_AS_THEY_ARE as error:
            raise _told(error) from None
        finally:
            self.running -= 1

    def _admit(self, request: Request) -> Serving:
        name = _name(request)
        serving = self._servings.find(name)
        if serving is None:
            raise NotExposed(f"the node {self._node} has no serving {name!r}")
        if "names" in request.options or "cast" in request.options:
            raise RpcError(f"the serving {name!r} takes calls of items, nothing else")
        if request.timeout <= 0:
            raise DeadlineExceeded("the deadline of the call passed on its way")
        trace = request.options.get("traceparent")
        traceparent.set(trace if isinstance(trace, str) else None)
        return serving


def serving_target(name: str) -> str:
    """Return the target of calls to a serving."""
    return _PREFIX + name


def is_for_serving(request: Request) -> bool:
    """Return whether a call is for a serving, and not for a function."""
    return request.target.startswith(_PREFIX)


def _name(request: Request) -> str:
    return request.target.removeprefix(_PREFIX)


def _own(request: Request) -> Request:
    """Return the call as the serving knows it."""
    return replace(request, target=_name(request))


def _told(error: BaseException) -> HornbeamError:
    return error if isinstance(error, RemoteError) else remote(error)
