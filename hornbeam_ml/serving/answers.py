"""What a serving answers to the calls of other processes, in a model host or a node."""

from __future__ import annotations

import asyncio
from math import inf
from typing import TYPE_CHECKING, Any

from hornbeam_ml.serving import processing

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from hornbeam_ml.serving.client import HostedCalls
    from hornbeam_ml.serving.local import LocalCalls
    from hornbeam_state.transports.base import Request


async def answer(calls: LocalCalls | HostedCalls, request: Request) -> Sequence[Any]:
    """Make the call that a client asks for, in a task of its own.

    Raises:
        ValueError: there is no such method.
    """
    processing.use_threads()
    key = request.options.get("key")
    if request.method == "run":
        return await calls.arun_batch(request.values, key=key, timeout_ms=timeout_ms_of(request))
    if request.method == "inline":
        return await asyncio.to_thread(calls.run_inline, request.values, key=key)
    if request.method == "stats":
        return [calls.stats()]
    raise ValueError(f"a serving has no method {request.method!r}")


async def answer_stream(
    calls: LocalCalls | HostedCalls, request: Request
) -> AsyncGenerator[Any, None]:
    """Yield the chunks that a client asks for."""
    processing.use_threads()
    (item,) = request.values
    key = request.options.get("key")
    async with calls.astream(item, key=key, timeout_ms=timeout_ms_of(request)) as chunks:
        async for chunk in chunks:
            yield chunk


def timeout_ms_of(request: Request) -> float | None:
    """Return how long the caller waits, in milliseconds; None: as long as it takes."""
    return None if request.timeout == inf else max(1e-3, 1000 * request.timeout)
