"""Running a coroutine from blocking code, also on the thread of an event loop."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

T = TypeVar("T")


def run_blocking(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Return what a coroutine returns; blocks. It runs on an event loop of its own.

    That is in this thread, or in a new one when an event loop runs in this one. Interrupted, it
    cancels the coroutine. Context variables are those of the caller.

    Args:
        make: Makes the coroutine; called where it runs.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _run(make)
    return _run_in_a_thread(make)


def _run(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    # With a factory the runner leaves the event loop of the thread, as others may know it, alone.
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        return runner.run(make())


def _run_in_a_thread(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    outcome: Future[T] = Future()
    running: Future[Callable[[], None]] = Future()

    async def main() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        if task is not None:
            running.set_result(lambda: _cancel(loop, task))
        return await make()

    def work() -> None:
        try:
            outcome.set_result(_run(main))
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            outcome.set_exception(error)

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(work,), name="hornbeam-batch", daemon=True).start()
    try:
        return outcome.result()
    except BaseException:
        if not outcome.done():
            running.add_done_callback(lambda cancel: cancel.result()())
        raise


def _cancel(loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(task.cancel)
