"""The node's side of calls: what is exposed, run within limits, and answered."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections import OrderedDict
from math import inf
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hornbeam_state.errors import DeadlineExceeded, HornbeamError, RemoteError, RpcError
from hornbeam_state.rpc.exposed import Exposed, find_exposed
from hornbeam_state.rpc.outcomes import remote, unsent
from hornbeam_state.rpc.requests import Context, read_arguments, read_context
from hornbeam_state.rpc.servings import Served, is_for_serving
from hornbeam_state.rpc.threads import Raised, Steps, Threads
from hornbeam_state.rpc.tracing import traceparent
from hornbeam_state.rpc.turns import Turn, Turns, current_turn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence

    from hornbeam_state.rpc.servings import Servings
    from hornbeam_state.transports.base import Place, Request

logger = logging.getLogger("hornbeam.rpc")

_MOST_NESTED: Final = 64  # threads for calls that share the turn of another
_MOST_CASTS_KNOWN: Final = 2**16
_FROM_FUNCTIONS: Final = (Exception, SystemExit, KeyboardInterrupt)


class Work(NamedTuple):
    """A call that was found good."""

    exposed: Exposed
    context: Context
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    deadline: float
    place: Place | None

    def start(self) -> Any:
        """Call the function."""
        return self.exposed.fn(*self.args, **self.kwargs)


class Answers:
    """A `Handler` that runs what this process exposes. All of it runs on one event loop.

    A function that runs in a thread keeps its turn until it has ended, whoever still waits.

    Args:
        node: The full name of the node.
        token: Which process this is; see `Entry`.
        concurrency: How many calls run at a time.
        most_waiting: How many more may wait for their turn.
        with_tracebacks: Whether callers are told where a function raised.
        servings: The models that it runs.
    """

    def __init__(
        self,
        node: str,
        token: str,
        *,
        concurrency: int,
        most_waiting: int,
        with_tracebacks: bool,
        servings: Servings,
    ) -> None:
        self.turns = Turns(node, concurrency=concurrency, most_waiting=most_waiting)
        self.served = Served(node, servings)
        self.draining = False
        self._node = node
        self._token = token
        self._with_tracebacks = with_tracebacks
        self._threads = Threads(concurrency + _MOST_NESTED, f"hornbeam-{node}")
        self._known_casts: OrderedDict[str, None] = OrderedDict()
        self._casts: set[asyncio.Task[None]] = set()

    def greet(self, hello: Mapping[str, Any]) -> Mapping[str, Any]:  # noqa: ARG002 - a Handler
        """Say who this is."""
        return {"node": self._node, "token": self._token}

    async def call(self, request: Request) -> Sequence[Any]:
        """Return the result of a call; of a cast nothing, as soon as it waits for its turn."""
        self._refuse_if_not_ours(request)
        if is_for_serving(request):
            _leave_place(request)
            return await self.served.call(request)
        work = self._admit(request, streams=False)
        if work.context.cast is not None:
            self._cast(work, work.context.cast)
            return []
        return [await _in_time(work.deadline, self._run(work, self._take_turn(work)))]

    async def stream(self, request: Request) -> AsyncIterator[Any]:
        """Yield what the generator yields."""
        self._refuse_if_not_ours(request)
        if is_for_serving(request):
            _leave_place(request)
            async with contextlib.aclosing(self.served.stream(request)) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        work = self._admit(request, streams=True)
        turn = self._take_turn(work)
        steps: Any = None
        try:
            await _in_time(work.deadline, turn.wait())
            steps = self._steps(work, turn)
            while True:
                try:
                    chunk = await _in_time(work.deadline, anext(steps))
                except StopAsyncIteration:
                    return
                yield chunk
        except _FROM_FUNCTIONS as error:
            raise self._told(error) from None
        finally:
            try:
                if steps is not None:
                    await steps.aclose()
            finally:
                if steps is None or work.exposed.is_async:
                    turn.leave()  # else `steps` gives it up when its thread is done

    async def drain(self, seconds: float) -> None:
        """Refuse new calls, and wait so long for the casts that were taken."""
        self.draining = True
        if self._casts:
            await asyncio.wait(self._casts, timeout=seconds)

    async def close(self) -> None:
        """Let nothing more begin."""
        self.draining = True
        if self._casts:
            logger.warning("the node %s ends with %d casts undone", self._node, len(self._casts))
        for task in self._casts:
            task.cancel()
        await asyncio.sleep(0)  # so that they end
        self._threads.close()

    # Before it runs.

    def _refuse_if_not_ours(self, request: Request) -> None:
        if self.draining:
            raise unsent(f"the node {self._node} is closing")
        if request.options.get("to") not in (None, self._token):
            raise unsent(f"the node {self._node} is another process now")

    def _admit(self, request: Request, *, streams: bool) -> Work:
        if request.timeout <= 0:
            raise DeadlineExceeded("the deadline of the call passed on its way")
        context = read_context(request)
        exposed = find_exposed(request.target, request.method)
        if exposed.is_stream is not streams:
            way = "it yields: use rpc_stream" if exposed.is_stream else "it does not yield"
            raise RpcError(f"{exposed.full_name}: {way}")
        args, kwargs = read_arguments(request, context.names)
        loop_time = asyncio.get_running_loop().time()
        deadline = loop_time + request.timeout
        return Work(exposed, context, args, kwargs, deadline, request.place)

    def _take_turn(self, work: Work) -> Turn:
        shared = self.turns.share(work.context.turn)
        if shared is not None:
            return shared
        if isinstance(work.place, Turn):
            return self.turns.adopt(work.place)  # it may last longer than the call
        return self.turns.ask()

    def _cast(self, work: Work, id: str) -> None:
        if id in self._known_casts:
            return
        turn = self._take_turn(work)
        task = asyncio.get_running_loop().create_task(self._run_unheard(work, turn))
        self._casts.add(task)
        task.add_done_callback(self._casts.discard)
        self._known_casts[id] = None
        if len(self._known_casts) > _MOST_CASTS_KNOWN:
            self._known_casts.popitem(last=False)

    async def _run_unheard(self, work: Work, turn: Turn) -> None:
        """Run a cast. Its error is logged, without the message, which may show values."""
        try:
            await self._run(work, turn)
        except HornbeamError as error:
            kind = error.remote_type if isinstance(error, RemoteError) else type(error).__name__
            logger.error("the cast of %s raised %s", work.exposed.full_name, kind)  # noqa: TRY400 - as said

    # Running.

    async def _run(self, work: Work, turn: Turn) -> Any:
        try:
            try:
                await turn.wait()
            except BaseException:
                turn.leave()
                raise
            if not work.exposed.is_async:
                return await self._threads.run(_context(work, turn), work.start, turn.leave)
            try:
                _enter(work, turn)
                return await work.start()
            finally:
                turn.leave()
        except _FROM_FUNCTIONS as error:
            raise self._told(error) from None

    def _steps(self, work: Work, turn: Turn) -> Any:
        if not work.exposed.is_async:
            return Steps(self._threads, _context(work, turn), work.start, turn.leave)
        _enter(work, turn)
        return work.start()

    def _told(self, error: BaseException) -> HornbeamError:
        if isinstance(error, Raised):
            error = error.error
        return remote(error, with_traceback=self._with_tracebacks)


def _leave_place(request: Request) -> None:
    """Give up a turn that a call of a serving came with: it takes none while it runs."""
    if request.place is not None:
        request.place.leave()


def _enter(work: Work, turn: Turn) -> None:
    """Let the function, and what it calls, see which call it is."""
    current_turn.set(turn)
    traceparent.set(work.context.traceparent)


def _context(work: Work, turn: Turn) -> contextvars.Context:
    context = contextvars.copy_context()
    context.run(_enter, work, turn)
    return context


async def _in_time(deadline: float, running: Awaitable[Any]) -> Any:
    if deadline == inf:
        return await running
    late = asyncio.timeout_at(deadline)
    try:
        async with late:
            return await running
    except TimeoutError:
        if not late.expired():
            raise
        raise DeadlineExceeded("the deadline of the call passed on the node") from None
