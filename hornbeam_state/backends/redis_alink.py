"""Asyncio connections to a Redis server: a pool for each event loop that calls.

See `redis_link` for what both kinds of connection keep to.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from redis import exceptions as driver

from hornbeam_state.backends.redis_errors import FAILURES, Interrupted, Stage, refused
from hornbeam_state.backends.redis_link import packed

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import AsyncGenerator, Callable

    from hornbeam_state.backends.redis_link import AsyncConnection, Policy
    from hornbeam_state.backends.redis_steps import Batch, Steps

T = TypeVar("T")

# Ten thousand tasks at once would be ten thousand connections: they share these, and wait for one
# no longer than for the server itself.
CONNECTIONS: Final = 64


class AsyncLink:
    """Asyncio connections to one server: a pool for each event loop that calls."""

    def __init__(self, policy: Policy, make: Callable[[], AsyncConnection]) -> None:
        self._policy = policy
        self._make = make
        # A connection refers to its loop, so weak keys would keep every loop alive. Instead an
        # entry goes when its loop shuts down: that is what the generator is for.
        self._pools: dict[AbstractEventLoop, tuple[LoopPool, AsyncGenerator[None, None]]] = {}
        self._inherited: list[object] = []

    async def run(self, steps: Steps[T]) -> T:
        """Awaitable twin of `Link.run`; cancelling it leaves the outcome of a write unknown."""
        try:
            batch = next(steps)
            while True:
                batch = steps.send(await self._call(batch))
        except StopIteration as stop:
            return cast("T", stop.value)
        except driver.RedisError as error:
            raise refused(error, self._policy.where) from error

    async def _call(self, batch: Batch) -> list[Any]:
        started = time.monotonic()
        self._policy.admit(started)
        entry = self._pools.get(asyncio.get_running_loop())
        pool = entry[0] if entry is not None else await self._open_pool()
        deadline = asyncio.get_running_loop().time() + self._policy.timeout
        try:
            return await self._attempt(pool, batch, deadline, fresh=False)
        except Interrupted as failure:
            if not self._policy.repeats(failure, batch, started):
                raise self._policy.verdict(failure, batch, started) from failure
        try:
            return await self._attempt(pool, batch, deadline, fresh=True)
        except Interrupted as failure:
            raise self._policy.verdict(failure, batch, started) from failure

    async def _attempt(
        self, pool: LoopPool, batch: Batch, deadline: float, *, fresh: bool
    ) -> list[Any]:
        stage = Stage.QUEUED
        try:
            async with asyncio.timeout_at(deadline), pool.slots:
                stage = Stage.CONNECTING
                connection = await pool.take(fresh=fresh)
                # The transport may have sent everything even when sending seems to fail.
                stage = Stage.WAITING
                try:
                    data = packed(connection, batch)
                    await connection.send_packed_command(data, check_health=False)
                    replies = [await _reply(connection) for _ in batch.commands]
                except BaseException:
                    await pool.drop(connection)
                    raise
                await pool.give_back(connection)
        except FAILURES as error:
            failure = self._policy.explain(stage, error)
            if isinstance(failure, Interrupted) and failure.timed_out and stage is Stage.WAITING:
                await pool.drop_idle()  # see `Link`: they may be as dead
            raise failure from error
        self._policy.breaker.succeeded()
        return replies

    async def _open_pool(self) -> LoopPool:
        loop = asyncio.get_running_loop()
        for other in list(self._pools):
            if other.is_closed():  # without a proper shutdown
                self._pools.pop(other, None)
        pool = LoopPool(self._make)
        lifetime = self._lifetime(loop, pool)
        self._pools[loop] = pool, lifetime
        await anext(lifetime)
        return pool

    async def _lifetime(
        self, loop: AbstractEventLoop, pool: LoopPool
    ) -> AsyncGenerator[None, None]:
        """Close the pool when the loop shuts its generators down, or when this one is dropped."""
        try:
            yield
        finally:
            entry = self._pools.get(loop)
            if entry is not None and entry[0] is pool:
                del self._pools[loop]
            await pool.close()

    def close(self) -> None:
        """Let every loop close its connections."""
        # A generator that is dropped has its loop finish it, from whatever thread.
        self._pools = {}

    async def aclose(self) -> None:
        """Close the running loop's connections, and let other loops close theirs."""
        entry = self._pools.pop(asyncio.get_running_loop(), None)
        self.close()
        if entry is not None:
            await entry[1].aclose()

    def after_fork(self) -> None:
        """Forget the parent's connections."""
        for pool, _ in self._pools.values():
            pool.let_go_after_fork()
        # Closing a transport here would speak to the parent's epoll: these are never touched.
        self._inherited.append(self._pools)
        self._pools = {}


class LoopPool:
    """The connections of one event loop. Touched by that loop alone."""

    def __init__(self, make: Callable[[], AsyncConnection]) -> None:
        self.slots = asyncio.Semaphore(CONNECTIONS)
        self._make = make
        self._idle: list[AsyncConnection] = []
        self._open: set[AsyncConnection] = set()
        self._closed = False

    async def take(self, *, fresh: bool) -> AsyncConnection:
        """Return a connection on which nothing is on its way."""
        if not fresh and self._idle:
            connection = self._idle.pop()
            if not await _is_stale(connection):
                return connection
            await self.drop(connection)
        connection = self._make()
        self._open.add(connection)
        try:
            await connection.connect()
        except BaseException:
            await self.drop(connection)
            raise
        return connection

    async def give_back(self, connection: AsyncConnection) -> None:
        """Keep a connection for the next caller. Does not yield to the event loop."""
        if self._closed:
            await self.drop(connection)
        else:
            self._idle.append(connection)

    async def drop(self, connection: AsyncConnection) -> None:
        """Close a connection for good. Does not yield to the event loop."""
        self._open.discard(connection)
        with contextlib.suppress(*FAILURES):
            await connection.disconnect(nowait=True)

    async def drop_idle(self) -> None:
        """Close the idle connections for good. Does not yield to the event loop."""
        while self._idle:
            await self.drop(self._idle.pop())

    async def close(self) -> None:
        """Close the idle connections now, and each other when its call ends."""
        self._closed = True
        while self._idle:
            connection = self._idle.pop()
            self._open.discard(connection)
            with contextlib.suppress(*FAILURES):
                await connection.disconnect()

    def let_go_after_fork(self) -> None:
        """Point the child's copies of the sockets nowhere, so that only the parent holds them."""
        nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for connection in self._open:
            descriptor = _descriptor(connection)
            if descriptor >= 0:
                os.dup2(nowhere, descriptor, inheritable=False)
        os.close(nowhere)


async def _reply(connection: AsyncConnection) -> Any:
    try:
        return await connection.read_response()
    except driver.ResponseError as error:
        return error


async def _is_stale(connection: AsyncConnection) -> bool:
    try:
        if await connection.can_read():
            return True
    except FAILURES:
        return True
    # The loop may not have come round to noticing that the server is gone: ask the kernel.
    poller = select.poll()
    poller.register(_descriptor(connection), select.POLLIN)
    return bool(poller.poll(0))


def _descriptor(connection: AsyncConnection) -> int:
    writer: asyncio.StreamWriter | None = connection._writer  # noqa: SLF001 - there is no other way
    return -1 if writer is None else cast("int", writer.get_extra_info("socket").fileno())
