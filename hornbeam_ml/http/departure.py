"""How an ASGI server ends: what was begun is finished, and nothing that was accepted is lost."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from hornbeam_ml.http.entry import GRACE_IS_OVER

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from hornbeam_ml.http.connections import Connections

LINGER_S: Final = 2.0  # as gunicorn's threads do it
_POLL_S: Final = 0.02
_HOOKS_SHARE: Final = 0.2  # of the time is left to the app's shutdown
_ROUNDS: Final = 3  # of the event loop, from accepting a socket to having a transport

logger = logging.getLogger("uvicorn.error")


async def stop_accepting(servers: Sequence[asyncio.Server]) -> None:
    """Close the listening sockets, and keep every connection that was accepted.

    asyncio makes the transport of an accepted socket in a task of its own, which fails when the
    server was closed meanwhile. So it first only stops to accept.
    """
    loop = asyncio.get_running_loop()
    for server in servers:
        for socket in server.sockets:
            loop.remove_reader(socket.fileno())
    for _ in range(_ROUNDS):
        await asyncio.sleep(0)
    for server in servers:
        server.close()


async def finish(
    state: Connections,
    seconds: float,
    hurried: Callable[[], bool],
    unfinished: Callable[[], int],
) -> None:
    """Wait until requests, background tasks and all other calls have finished.

    Requests that still run near the end of the time are cancelled, and have a moment to clean up.

    Args:
        state: The connections, which were told that the server leaves.
        seconds: How long all of it may take, the app's shutdown included.
        hurried: Says, asked all the time, whether not to wait any more.
        unfinished: Says how many calls of servings and of other nodes wait or run.
    """
    loop = asyncio.get_running_loop()
    spare = min(1.0, seconds * _HOOKS_SHARE)
    end = loop.time() + seconds - spare
    lingering = loop.time() + (state.linger or 0.0)

    def busy() -> bool:
        expected = state.expected and loop.time() < lingering
        return bool(state.connections or state.tasks or expected or unfinished())

    if busy():
        counts = len(state.connections), len(state.tasks), unfinished()
        logger.info("Waiting for %d connections, %d requests, %d other calls", *counts)
    while busy() and not hurried() and loop.time() < end:  # noqa: ASYNC110 - three kinds of things
        await asyncio.sleep(_POLL_S)
    if state.tasks and not hurried():
        logger.error("Cancelling %d requests: %s", len(state.tasks), GRACE_IS_OVER)
        for task in state.tasks:
            task.cancel(GRACE_IS_OVER)
        await asyncio.wait(state.tasks, timeout=spare / 2)


async def end_app(shutdown: Awaitable[None], seconds: float) -> None:
    """Run the app's shutdown; one that takes longer is cancelled when the process ends.

    Args:
        shutdown: It.
        seconds: How long it may take.
    """
    try:
        await asyncio.wait_for(shutdown, seconds)
    except TimeoutError:
        logger.error("The app's shutdown has not ended in time")  # noqa: TRY400 - ours tells nothing
