"""Opening a connection in a thread, for who awaits it and may be cancelled meanwhile."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


async def open_in_thread(open_: Callable[[], T], close: Callable[[T], object]) -> T:
    """Return what a function opens, which blocks.

    Args:
        open_: Opens it; called in a thread.
        close: Closes it: called on the event loop when it comes after who awaited it was cancelled.
    """

    def close_late(opening: asyncio.Future[T]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            close(opening.result())

    opening = asyncio.get_running_loop().run_in_executor(None, open_)
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(close_late)
        raise
