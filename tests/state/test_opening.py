"""Connecting in a thread, for tasks that may be cancelled."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest

from hornbeam_state.transports.opening import open_in_thread


async def cancelled(open_, close):
    """Await what opens until it has begun, and cancel that."""
    began, go = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def slowly():
        loop.call_soon_threadsafe(began.set)
        go.wait(10)
        return open_()

    task = asyncio.create_task(open_in_thread(slowly, close))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return go


async def test_what_comes_too_late_is_closed():
    closed = asyncio.Queue()
    go = await cancelled(lambda: "connection", closed.put_nowait)
    assert closed.empty()
    go.set()
    assert await asyncio.wait_for(closed.get(), 10) == "connection"


async def test_a_failure_that_comes_too_late_is_nobodys(caplog):
    def fail():
        raise ConnectionError

    go = await cancelled(fail, lambda _: pytest.fail("there is nothing to close"))
    go.set()
    await asyncio.get_running_loop().shutdown_default_executor()
    await asyncio.sleep(0)
    gc.collect()
    assert not caplog.records
