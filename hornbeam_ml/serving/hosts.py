"""The model host, as a process that calls it knows it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from math import inf
from typing import TYPE_CHECKING, Any, Final, TypeVar

from hornbeam_ml.errors import ModelError
from hornbeam_ml.promises import Promise
from hornbeam_ml.serving.links import LATER_S, Links
from hornbeam_ml.serving.waiting import DeferredChunks
from hornbeam_state.errors import DeadlineExceeded, NodeDown
from hornbeam_state.rpc.caller import acall_on, call_on

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from concurrent.futures import Future
    from pathlib import Path

    from hornbeam_ml.host.spec import HostSpec
    from hornbeam_ml.memory import LoadCost
    from hornbeam_ml.serving.links import Connect
    from hornbeam_state.rpc.caller import AsyncMake, Make
    from hornbeam_state.transports.base import Channel, Request

PATIENCE_S: Final = 1.0
"""How long a call waits for a host that is away to come back."""

FIRST_CONTACT_S: Final = 10.0
"""How long a host may say nothing at all before it counts as away."""

_POLL_S: Final = 0.02


_T = TypeVar("_T")


class Hosts:
    """The processes of one model host, found by their sockets in a directory.

    Safe to use from any thread and any event loop.

    Args:
        directory: Where the sockets are.
        spec: What the host runs; a host of other code refuses this process.
        connect: How to connect.

    Raises:
        ConfigError: there is no such module.
    """

    def __init__(self, directory: Path, spec: HostSpec, connect: Connect) -> None:
        self.what = f"the model host of {spec.module}"
        self._spec = spec
        self._info: dict[str, dict[str, Any]] = {}
        self._links = Links(directory, spec.hello(), self.what, connect)

    # Calls.

    def call(self, request: Request, make: Make = call_on) -> list[Any]:
        """Return what the host answers; blocks.

        Args:
            request: The call.
            make: Makes it on a connection.

        Raises:
            NodeDown: it is gone, or away for longer than `PATIENCE_S`. A call that it cannot have
                seen was made again.
        """
        deadline = time.monotonic() + request.timeout
        while True:
            channel = self._pick(request.target, deadline)
            try:
                return make(channel, request.until(deadline))
            except NodeDown as error:
                self._look_at(error)

    async def acall(self, request: Request, make: AsyncMake = acall_on) -> list[Any]:
        """Awaitable twin of `call`."""
        deadline = time.monotonic() + request.timeout
        while True:
            channel = await self._apick(request.target, deadline)
            try:
                return await make(channel, request.until(deadline))
            except NodeDown as error:
                self._look_at(error)

    def submit(self, request: Request, change: Callable[[list[Any]], Any]) -> Future[Any]:
        """Return a future of what the host answers, changed; blocks while it is away."""
        return _Changed(self._begin(lambda channel, call: channel.submit(call), request), change)

    def stream(self, request: Request) -> Iterator[Any]:
        """Return the chunks that the host answers; blocks while it is away."""
        return self._begin(lambda channel, call: channel.stream(call), request)

    def astream(self, request: Request) -> AsyncIterator[Any]:
        """Twin of `stream`: an async iterator, which waits while the host is away."""
        channel = self._best(request.target)
        if channel is not None:
            with contextlib.suppress(NodeDown):
                return channel.astream(request)

        async def begin() -> AsyncIterator[Any]:
            deadline = time.monotonic() + request.timeout
            channel = await self._apick(request.target, deadline)
            return channel.astream(request.until(deadline))

        return DeferredChunks(begin)

    def _begin(self, begin: Callable[[Channel, Request], _T], request: Request) -> _T:
        deadline = time.monotonic() + request.timeout
        while True:
            channel = self._pick(request.target, deadline)
            try:
                return begin(channel, request.until(deadline))
            except NodeDown as error:
                self._look_at(error)

    # What the host says.

    def serves(self, target: str) -> bool | None:
        """Return whether it serves that; None: it has not said so yet."""
        if not self._spec.wants(target):
            return False
        return None if self._links.served is None else target in self._links.served

    def wait_told(self, timeout: float) -> None:
        """Wait until it has said what it serves, which it does when it has imported its module.

        Raises:
            NodeDown: it said nothing at all for `timeout` seconds.
            ModelError: it refused this process, or failed.
        """
        while not self._wait(lambda: self._links.served is not None, timeout):
            if not self._links.told():
                raise self._away()

    def wait_all_loaded(self) -> None:
        """Wait until a host has loaded all that it serves.

        Raises:
            NodeDown, ModelError: as `wait_told`.
        """
        self.wait_told(FIRST_CONTACT_S)
        for target in self._links.served or ():
            self.wait_loaded(target, None)

    def wait_loaded(self, target: str, timeout: float | None) -> None:
        """Wait until a host has loaded something.

        Raises:
            ModelError: it failed to, or refused this process.
            DeadlineExceeded: it took longer than `timeout` seconds.
        """
        if not self._wait(lambda: self.is_loaded(target), inf if timeout is None else timeout):
            raise DeadlineExceeded(f"{self.what} still loads {target!r}")

    def is_loaded(self, target: str) -> bool:
        """Return whether a host that can be reached has loaded it."""
        return any(link.has(target, "loaded") for link in self._links.told())

    def is_ready(self, target: str) -> bool:
        """Return whether it is ready in a host that can be reached."""
        return any(link.has(target, "ready") for link in self._links.told())

    def info(self, target: str) -> dict[str, Any]:
        """Return what hosts say, or said last, of something beforehand.

        Raises:
            NodeDown: none ever said anything.
        """
        for link in self._links.told():
            if link.has(target, "loaded"):
                self._info[target] = link.targets[target]["info"]
        if target not in self._info:
            raise self._away()
        return self._info[target]

    def load_costs(self, target: str) -> list[LoadCost]:
        """Return what loading something took, in all processes that can be reached."""
        told = [link.targets.get(target, {}).get("loads", ()) for link in self._links.told()]
        return [cost for costs in told for cost in costs]

    def pids(self) -> list[int]:
        """Return the processes that can be reached."""
        return [link.pid for link in self._links.told()]

    @property
    def pending(self) -> int:
        """How many calls have no answer yet."""
        channels = [link.channel for link in self._links.all()]
        return sum(channel.pending for channel in channels if channel is not None)

    def problem(self) -> str | None:
        """Return why calls would fail now, or wait for long; None: they would not."""
        if not self._links.told():
            return self._refusal() or f"{self.what} is away"
        if self._links.served is None:
            return f"{self.what} is still loading"
        unready = (target for target in sorted(self._links.served) if not self.is_ready(target))
        return next((f"{target!r} is not ready in {self.what}" for target in unready), None)

    def close(self) -> None:
        """End the connections."""
        self._links.close()

    def forget_after_fork(self) -> None:
        """In a forked child: the connections are the parent's."""
        self._links.forget_after_fork()

    # Choosing.

    def _pick(self, target: str, deadline: float) -> Channel:
        until = min(deadline, time.monotonic() + PATIENCE_S)
        while (best := self._best(target)) is None and time.monotonic() < until:
            self._links.wait(_POLL_S)
        if best is None:
            raise self._away()
        return best

    async def _apick(self, target: str, deadline: float) -> Channel:
        until = min(deadline, time.monotonic() + PATIENCE_S)
        best = self._best(target)
        while best is None and time.monotonic() < until:
            await asyncio.sleep(_POLL_S)
            best = self._best(target)
        if best is None:
            raise self._away()
        return best

    def _best(self, target: str) -> Channel | None:
        """Return the connection with the fewest waiting calls of those that have it loaded."""
        channels = [
            link.channel
            for link in self._links.told()
            if link.channel is not None and link.has(target, "loaded")
        ]
        return min(channels, key=lambda channel: channel.pending, default=None)

    def _wait(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait until something holds; return whether it does.

        Raises:
            ModelError: no host is left that could make it hold.
        """
        until = time.monotonic() + timeout
        while not condition():
            failures = [link.failure for link in self._links.all()]
            if failures and all(failures):
                raise ModelError(failures[0])
            left = until - time.monotonic()
            if left <= 0 or self._links.closed:
                return condition()
            self._links.wait(min(left, LATER_S))
        return True

    def _away(self) -> NodeDown:
        error = NodeDown(self._refusal() or f"{self.what} cannot be reached; try again later")
        error.sent = False
        return error

    def _refusal(self) -> str | None:
        return next((link.refused for link in self._links.all() if link.refused), None)

    def _look_at(self, error: NodeDown) -> None:
        """Return if the call can be made again.

        Raises:
            NodeDown: the host may have seen it.
        """
        if error.sent:
            down = NodeDown(f"{self.what} ended before it answered; try again")
            down.__cause__ = error
            raise down


class _Changed(Promise):
    """What a function makes of the result of another future; to cancel it cancels that.

    Args:
        future: The other.
        change: Called where the other is finished.
    """

    def __init__(self, future: Future[list[Any]], change: Callable[[list[Any]], Any]) -> None:
        super().__init__()
        self._future = future
        self._change = change
        future.add_done_callback(self._finish)

    def cancel(self) -> bool:
        """Cancel the call, unless it is finished."""
        return self._future.cancel()

    def _finish(self, future: Future[list[Any]]) -> None:
        if future.cancelled():
            super().cancel()
            self.set_running_or_notify_cancel()
            return
        try:
            result = self._change(future.result())
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            self.set_exception(error)
        else:
            self.set_result(result)
