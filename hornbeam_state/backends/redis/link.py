"""Blocking connections to the servers of a store, for any number of threads.

What is done with them is decided in `routes`. A connection on which anything went wrong is
closed and never reused, so that no reply can reach another caller.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from redis import exceptions as driver

from hornbeam_state.backends.redis.connections import ask, packed, read
from hornbeam_state.backends.redis.errors import (
    FAILURES,
    Interrupted,
    Stage,
    explained,
    unreachable,
)
from hornbeam_state.backends.redis.routes import Inquiry, Outcome, Pause, Send, Together

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hornbeam_state.backends.redis.batches import Steps
    from hornbeam_state.backends.redis.connections import Connector, SyncConnection
    from hornbeam_state.backends.redis.routes import Routes, Work
    from hornbeam_state.backends.redis.topology import Address

T = TypeVar("T")

# A thread holds one connection to a server while it calls, so threads bound the connections by
# themselves and none ever waits for another: a limit could only add waiting. This many are kept
# when idle.
_IDLE: Final = 64


class Link:
    """Blocking connections to the servers of a store.

    Args:
        routes: Which servers these are.
        connector: Makes connections to them.
    """

    def __init__(self, routes: Routes, connector: Connector) -> None:
        self._routes = routes
        self._connector = connector
        self._pools: dict[Address, Pool] = {}

    def run(self, steps: Steps[T]) -> T:
        """Carry an operation out.

        Raises:
            StoreUnavailable: a server could not be reached in time, or refused.
            StoreFull: a server is out of memory.
        """
        return self._carry_out(self._routes.operation(steps))

    def primaries(self) -> tuple[Address, ...]:
        """Return the servers that hold the store at present, for `dial_to`.

        Raises:
            StoreUnavailable: they cannot be found out.
        """
        return self._carry_out(self._routes.primaries())

    def dial(self, bucket: int = 0, *, protocol: int = 2) -> SyncConnection:
        """Return a new connection to the primary of a bucket; it is the caller's to close.

        A server that asks for a password which the URL lacks says so to the first command only.

        Args:
            bucket: The bucket.
            protocol: The version of RESP; 3 for a connection on which the server pushes.

        Raises:
            StoreUnavailable: the server could not be reached in time, or refused.
        """
        return self.dial_to(self.locate(bucket), protocol=protocol)

    def locate(self, bucket: int) -> Address:
        """Return the primary that holds a bucket at present, for `dial_to`.

        Raises:
            StoreUnavailable: it cannot be found out.
        """
        return self._carry_out(self._routes.locate(bucket))

    def lost(self, address: Address) -> None:
        """Take note that a connection of `dial_to` was lost, or led to the wrong server."""
        self._routes.lost(address)

    def dial_to(self, address: Address, *, protocol: int = 2) -> SyncConnection:
        """Return a new connection to one of `primaries`; it is the caller's to close.

        Args:
            address: The server.
            protocol: The version of RESP; 3 for a connection on which the server pushes.

        Raises:
            StoreUnavailable: the server could not be reached in time, or refused.
        """
        try:
            return self._connector.open(address, protocol=protocol)
        except FAILURES as error:
            self._routes.lost(address)
            outcome = explained(Stage.CONNECTING, error)
            where, timeout = self._routes.named(address), self._connector.timeout
            if isinstance(outcome, Interrupted):
                raise unreachable(outcome, where, timeout, write=False) from outcome
            raise self._routes.refusal(outcome) from outcome

    def close(self) -> None:
        """Close the idle connections; those in use close when their call ends."""
        pools, self._pools = self._pools, {}
        for pool in pools.values():
            pool.close()

    def after_fork(self) -> None:
        """Forget the parent's connections: the driver closes them without a word to the server."""
        self._pools = {}

    def _carry_out(self, work: Work[T]) -> T:
        try:
            request = next(work)
            while True:
                if type(request) is Send:
                    request = work.send(self._send(request))
                else:
                    request = work.send(self._answer(request))
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        finally:
            work.close()

    def _answer(self, request: Send | Together | Inquiry | Pause) -> Any:
        match request:
            case Together(sends):
                return self._send_all(sends)
            case Inquiry():
                return self._inquire(request)
            case Pause(seconds):
                return time.sleep(seconds)
            case _:
                return self._send(request)

    def _send(self, send: Send) -> Outcome:
        pool = self._pools.get(send.address) or self._open_pool(send.address)
        stage = Stage.CONNECTING
        connection: SyncConnection | None = None
        try:
            connection = pool.take(send)
            stage = Stage.SENDING if send.whole else Stage.WAITING
            connection.send_packed_command(packed(connection, send.commands), check_health=False)
            stage = Stage.WAITING
            replies = [read(connection) for _ in send.commands]
        except BaseException as error:
            if connection is not None:
                connection.disconnect()
            if isinstance(error, FAILURES):
                failure = explained(stage, error)
                if isinstance(failure, Interrupted) and failure.timed_out:
                    # What cut this one off without a word may have cut off the idle ones too, and
                    # each would cost a timeout to find out.
                    pool.drop_idle()
                return failure
            raise
        if send.deadline is not None:
            connection.update_current_socket_timeout(self._connector.timeout)
        pool.give_back(connection)
        return replies

    def _send_all(self, sends: Sequence[Send]) -> list[Outcome]:
        """Send to every server first and read after: it takes one round trip."""
        exchanges = []
        for send in sends:
            pool = self._pools.get(send.address) or self._open_pool(send.address)
            exchanges.append(Exchange(pool, send))
        try:
            for exchange in exchanges:
                exchange.begin()
            return [exchange.end() for exchange in exchanges]
        finally:
            for exchange in exchanges:
                exchange.close()

    def _inquire(self, inquiry: Inquiry) -> Outcome:
        connection = self._connector.visit(
            inquiry.address, inquiry.seconds, sentinel=inquiry.sentinel
        )
        try:
            connection.connect()
            return ask(connection, [inquiry.words])
        except FAILURES as error:
            return explained(Stage.CONNECTING, error)
        finally:
            connection.disconnect()

    def _open_pool(self, address: Address) -> Pool:
        for other in list(self._pools):
            if not self._routes.knows(other):
                self._forget(other)
        return self._pools.setdefault(address, Pool(self._connector, address))

    def _forget(self, address: Address) -> None:
        pool = self._pools.pop(address, None)
        if pool is not None:
            pool.close()


class Pool:
    """Connections to one server.

    Args:
        connector: Makes them.
        address: The server.
    """

    def __init__(self, connector: Connector, address: Address) -> None:
        self._connector = connector
        self._address = address
        self._idle: list[SyncConnection] = []
        self._closed = False

    def take(self, send: Send) -> SyncConnection:
        """Return a connection of the kind asked for, on which nothing is on its way.

        Raises:
            RedisError, OSError: none can be had.
        """
        connection = None if send.fresh else self._from_idle()
        if connection is not None:
            if send.deadline is not None:
                _limit(connection, send.deadline)
            return connection
        if send.idle:
            raise driver.ConnectionError("no connection is open")
        if send.deadline is None:
            return self._connector.open(self._address)
        connection = self._connector.open(self._address, _left(send.deadline))
        _limit(connection, send.deadline)
        return connection

    def _from_idle(self) -> SyncConnection | None:
        """Return an idle connection, unless the server closed it or left something to read."""
        try:
            connection = self._idle.pop()
        except IndexError:
            return None
        try:
            if not connection.can_read():
                return connection
        except FAILURES:
            pass
        connection.disconnect()
        return None

    def give_back(self, connection: SyncConnection) -> None:
        """Keep a connection for the next caller."""
        if self._closed or len(self._idle) >= _IDLE:
            connection.disconnect()
        else:
            self._idle.append(connection)

    def close(self) -> None:
        """Close the idle connections, and from now on all that are given back."""
        self._closed = True
        self.drop_idle()

    def drop_idle(self) -> None:
        """Close the idle connections."""
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.disconnect()


class Exchange:
    """One of several that are under way at a time: `begin` all, `end` all, `close` all.

    Args:
        pool: Connections to the server.
        send: What to send.
    """

    def __init__(self, pool: Pool, send: Send) -> None:
        self._pool = pool
        self._send = send
        self._stage = Stage.CONNECTING
        self._connection: SyncConnection | None = None
        self._failure: Interrupted | driver.RedisError | None = None

    def begin(self) -> None:
        """Send the commands."""
        commands = self._send.commands
        try:
            self._connection = connection = self._pool.take(self._send)
            self._stage = Stage.SENDING if self._send.whole else Stage.WAITING
            connection.send_packed_command(packed(connection, commands), check_health=False)
            self._stage = Stage.WAITING
        except FAILURES as error:
            self._failure = explained(self._stage, error)

    def end(self) -> Outcome:
        """Read the replies; return these, or what went wrong."""
        connection = self._connection
        if connection is None or self._failure is not None:
            return cast("Outcome", self._failure)
        try:
            replies = []
            for _ in self._send.commands:
                if self._send.deadline is not None:
                    _limit(connection, self._send.deadline)
                replies.append(read(connection))
        except FAILURES as error:
            return explained(self._stage, error)
        connection.update_current_socket_timeout(connection.socket_timeout)
        self._connection = None
        self._pool.give_back(connection)
        return replies

    def close(self) -> None:
        """Close the connection, unless all of its replies were read."""
        if self._connection is not None:
            self._connection.disconnect()


def _limit(connection: SyncConnection, deadline: float) -> None:
    """Have the next send or read end by the deadline."""
    connection.update_current_socket_timeout(_left(deadline))


def _left(deadline: float) -> float:
    """Return the seconds until a deadline, one thousandth at least: 0 would mean not to wait."""
    return max(deadline - time.monotonic(), 0.001)
