"""Asyncio connections to the servers of a store: pools for each event loop that calls.

See `link` for what both kinds of connection keep to.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from redis import exceptions as driver

from hornbeam_state.backends.redis.connections import aask, aread, packed
from hornbeam_state.backends.redis.errors import FAILURES, Interrupted, Stage, explained
from hornbeam_state.backends.redis.routes import Inquiry, Outcome, Pause, Send, Together

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import AsyncGenerator, Sequence

    from hornbeam_state.backends.redis.batches import Steps
    from hornbeam_state.backends.redis.connections import AsyncConnection, Connector
    from hornbeam_state.backends.redis.routes import Routes
    from hornbeam_state.backends.redis.topology import Address

T = TypeVar("T")

# Ten thousand tasks at once would be ten thousand connections: they share these, for each server,
# and wait for one no longer than for the server itself.
CONNECTIONS: Final = 64


class AsyncLink:
    """Asyncio connections to the servers of a store: pools for each event loop that calls.

    Args:
        routes: Which servers these are.
        connector: Makes connections to them.
    """

    def __init__(self, routes: Routes, connector: Connector) -> None:
        self._routes = routes
        self._connector = connector
        # A connection refers to its loop, so weak keys would keep every loop alive. Instead an
        # entry goes when its loop shuts down: that is what the generators are for. Nothing else
        # may refer to them, and no frame of a call: an error's traceback may keep it for long.
        self._pools: dict[AbstractEventLoop, LoopPools] = {}
        self._lifetimes: dict[AbstractEventLoop, AsyncGenerator[None, None]] = {}
        self._inherited: list[object] = []

    async def run(self, steps: Steps[T]) -> T:
        """Awaitable twin of `Link.run`; cancelling it leaves the outcome of a write unknown."""
        pools = self._pools.get(asyncio.get_running_loop()) or await self._open_pools()
        work = self._routes.operation(steps)
        try:
            request = next(work)
            while True:
                if type(request) is Send:
                    request = work.send(await self._send(pools, request))
                else:
                    request = work.send(await self._answer(pools, request))
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        finally:
            work.close()

    async def _answer(self, pools: LoopPools, request: Send | Together | Inquiry | Pause) -> Any:
        match request:
            case Together(sends):
                return await self._send_all(pools, sends)
            case Inquiry():
                return await self._inquire(request)
            case Pause(seconds):
                return await asyncio.sleep(seconds)
            case _:
                return await self._send(pools, request)

    async def _send(self, pools: LoopPools, send: Send) -> Outcome:
        pool = pools.by_address.get(send.address) or await pools.open(send.address)
        stage = Stage.QUEUED
        left = self._connector.timeout
        if send.deadline is not None:
            left = send.deadline - time.monotonic()
        try:
            async with asyncio.timeout(left), pool.slots:
                stage = Stage.CONNECTING
                connection = await pool.take(fresh=send.fresh, idle=send.idle)
                # The transport may have sent everything even when sending seems to fail.
                stage = Stage.WAITING
                try:
                    data = packed(connection, send.commands)
                    await connection.send_packed_command(data, check_health=False)
                    replies = [await aread(connection) for _ in send.commands]
                except BaseException:
                    await pool.drop(connection)
                    raise
                await pool.give_back(connection)
        except FAILURES as error:
            failure = explained(stage, error)
            if isinstance(failure, Interrupted) and failure.timed_out and stage is Stage.WAITING:
                await pool.drop_idle()  # see `Link`: they may be as dead
            return failure
        return replies

    async def _send_all(self, pools: LoopPools, sends: Sequence[Send]) -> list[Outcome]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._send(pools, send)) for send in sends]
        return [task.result() for task in tasks]

    async def _inquire(self, inquiry: Inquiry) -> Outcome:
        connection = self._connector.visit_async(inquiry.address, sentinel=inquiry.sentinel)
        try:
            async with asyncio.timeout(inquiry.seconds):
                await connection.connect()
                return await aask(connection, [inquiry.words])
        except FAILURES as error:
            return explained(Stage.CONNECTING, error)
        finally:
            with contextlib.suppress(*FAILURES):
                await connection.disconnect(nowait=True)

    async def _open_pools(self) -> LoopPools:
        loop = asyncio.get_running_loop()
        for other in list(self._pools):
            if other.is_closed():  # without a proper shutdown
                self._pools.pop(other, None)
                self._lifetimes.pop(other, None)
        pools = LoopPools(self._routes, self._connector)
        self._pools[loop] = pools
        self._lifetimes[loop] = self._lifetime(loop, pools)
        await anext(self._lifetimes[loop])
        return pools

    async def _lifetime(
        self, loop: AbstractEventLoop, pools: LoopPools
    ) -> AsyncGenerator[None, None]:
        """Close the pools when the loop shuts its generators down, or this one is dropped."""
        try:
            yield
        finally:
            if self._pools.get(loop) is pools:
                del self._pools[loop], self._lifetimes[loop]
            await pools.close()

    def close(self) -> None:
        """Let every loop close its connections."""
        # A generator that is dropped has its loop finish it, from whatever thread.
        self._pools, self._lifetimes = {}, {}

    async def aclose(self) -> None:
        """Close the running loop's connections, and let other loops close theirs."""
        lifetime = self._lifetimes.get(asyncio.get_running_loop())
        if lifetime is not None:
            await lifetime.aclose()
        self.close()

    def after_fork(self) -> None:
        """Forget the parent's connections."""
        for pools in self._pools.values():
            pools.let_go_after_fork()
        # Closing a transport here would speak to the parent's epoll: these are never touched.
        self._inherited.append((self._pools, self._lifetimes))
        self._pools, self._lifetimes = {}, {}


class LoopPools:
    """The connections of one event loop, by server. Touched by that loop alone.

    Args:
        routes: Which servers are in use.
        connector: Makes connections to them.
    """

    def __init__(self, routes: Routes, connector: Connector) -> None:
        self._routes = routes
        self._connector = connector
        self.by_address: dict[Address, LoopPool] = {}
        self._retired: list[LoopPool] = []  # of servers that are in use no more
        self._closed = False

    async def open(self, address: Address) -> LoopPool:
        """Return what will hold connections to another server. Does not yield to the loop."""
        for other in [known for known in self.by_address if not self._routes.knows(known)]:
            retired = self.by_address.pop(other)
            self._retired.append(retired)
            await retired.retire()
        self._retired = [pool for pool in self._retired if pool.is_open]
        pool = self.by_address[address] = LoopPool(self._connector, address)
        if self._closed:
            await pool.retire()
        return pool

    async def close(self) -> None:
        """Close the idle connections now, and each other when its call ends. Does not yield.

        A loop that is about to end would not wait for more than one step.
        """
        self._closed = True
        for pool in self.by_address.values():
            await pool.retire()

    def let_go_after_fork(self) -> None:
        """Point the child's copies of the sockets nowhere, so that only the parent holds them."""
        nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for pool in (*self.by_address.values(), *self._retired):
            pool.let_go_after_fork(nowhere)
        os.close(nowhere)


class LoopPool:
    """The connections of one event loop to one server. Touched by that loop alone."""

    def __init__(self, connector: Connector, address: Address) -> None:
        self.slots = asyncio.Semaphore(CONNECTIONS)
        self._connector = connector
        self._address = address
        self._idle: list[AsyncConnection] = []
        # What asks the kernel whether there is anything to read on a connection.
        self._open: dict[AsyncConnection, select.poll] = {}
        self._closed = False

    @property
    def is_open(self) -> bool:
        """Whether any connection is open."""
        return bool(self._open)

    async def take(self, *, fresh: bool, idle: bool) -> AsyncConnection:
        """Return a connection on which nothing is on its way; see `Send` for the arguments."""
        if not fresh and self._idle:
            connection = self._idle.pop()
            if not await self._is_stale(connection):
                return connection
            await self.drop(connection)
        if idle:
            raise driver.ConnectionError("no connection is open")
        connection = self._connector.make_async(self._address)
        self._open[connection] = poller = select.poll()
        try:
            await self._connector.open_async(connection)
            poller.register(_descriptor(connection), select.POLLIN)
        except BaseException:
            await self.drop(connection)
            raise
        return connection

    async def _is_stale(self, connection: AsyncConnection) -> bool:
        try:
            if await connection.can_read():
                return True
        except FAILURES:
            return True
        # The loop may not have come round to noticing that the server is gone: ask the kernel.
        return bool(self._open[connection].poll(0))

    async def give_back(self, connection: AsyncConnection) -> None:
        """Keep a connection for the next caller. Does not yield to the event loop."""
        if self._closed:
            await self.drop(connection)
        else:
            self._idle.append(connection)

    async def drop(self, connection: AsyncConnection) -> None:
        """Close a connection for good. Does not yield to the event loop."""
        self._open.pop(connection, None)
        with contextlib.suppress(*FAILURES):
            await connection.disconnect(nowait=True)

    async def retire(self) -> None:
        """Drop the idle connections, and each other when its call ends. Does not yield."""
        self._closed = True
        await self.drop_idle()

    async def drop_idle(self) -> None:
        """Close the idle connections for good. Does not yield to the event loop."""
        while self._idle:
            await self.drop(self._idle.pop())

    def let_go_after_fork(self, nowhere: int) -> None:
        """Put a descriptor of nowhere in the place of each socket."""
        for connection in self._open:
            descriptor = _descriptor(connection)
            if descriptor >= 0:
                os.dup2(nowhere, descriptor, inheritable=False)


def _descriptor(connection: AsyncConnection) -> int:
    writer: asyncio.StreamWriter | None = connection._writer  # noqa: SLF001 - there is no other way
    return -1 if writer is None else cast("int", writer.get_extra_info("socket").fileno())
