"""Connections to a Redis server: deadlines, retries, what a failure leads to.

They use redis-py's connections and its parsers, but neither its clients nor its pools:

- a client retries by itself and does not tell a command that was never sent from one whose reply
  was lost, and a write may be repeated only in the first case;
- an asyncio pool awaits a lock to take a connection back, so that a cancelled task can lose one
  for good. Here a connection comes back without an await.

A connection on which anything went wrong, a cancellation included, is closed and never reused, so
that no reply can reach another caller.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, cast

import redis.asyncio.connection as async_driver
import redis.connection as sync_driver
from redis import exceptions as driver

from hornbeam_state.backends.breaker import Breaker
from hornbeam_state.backends.redis_errors import (
    FAILURES,
    REFUSALS,
    Interrupted,
    Stage,
    not_tried,
    refused,
    unreachable,
)
from hornbeam_state.errors import ConfigError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from hornbeam_state.backends.redis_steps import Batch, Steps
    from hornbeam_state.config import StoreConfig
    from hornbeam_state.errors import StoreError

T = TypeVar("T")

# A thread holds one connection while it calls, so threads bound the connections by themselves and
# none ever waits for another: a limit could only add waiting. This many are kept when idle.
_IDLE: Final = 64

# Set by hornbeam, whatever the URL says.
_OWN_OPTIONS: Final = (
    "max_connections",
    "retry_on_error",
    "retry_on_timeout",
    "socket_connect_timeout",
    "socket_timeout",
    "timeout",
)


class SyncConnection(Protocol):
    """What is used of redis-py's connections."""

    def connect(self) -> None: ...  # noqa: D102
    def disconnect(self) -> None: ...  # noqa: D102
    def can_read(self) -> bool: ...  # noqa: D102
    def pack_command(self, *words: bytes) -> list[bytes]: ...  # noqa: D102
    def pack_commands(self, commands: Sequence[Sequence[bytes]]) -> list[bytes]: ...  # noqa: D102
    def send_packed_command(self, data: list[bytes], *, check_health: bool) -> None: ...  # noqa: D102
    def read_response(self) -> Any: ...  # noqa: D102


class AsyncConnection(Protocol):
    """What is used of redis-py's asyncio connections."""

    _writer: asyncio.StreamWriter

    async def connect(self) -> None: ...  # noqa: D102
    async def disconnect(self, *, nowait: bool = False) -> None: ...  # noqa: D102
    async def can_read(self) -> bool: ...  # noqa: D102
    def pack_command(self, *words: bytes) -> list[bytes]: ...  # noqa: D102
    def pack_commands(self, commands: Sequence[Sequence[bytes]]) -> list[bytes]: ...  # noqa: D102
    async def send_packed_command(self, data: list[bytes], *, check_health: bool) -> None: ...  # noqa: D102
    async def read_response(self) -> Any: ...  # noqa: D102


class Policy:
    """Decides for both kinds of connection what a failure leads to."""

    def __init__(self, config: StoreConfig) -> None:
        self.where = config.safe_url
        self.timeout = config.timeout
        self.breaker = Breaker(config.timeout)

    def after_fork(self) -> None:
        """Begin anew: another thread may have held the breaker's lock."""
        self.breaker = Breaker(self.timeout)

    def admit(self, now: float) -> None:
        """Refuse a call while the server is known to be down."""
        pause = self.breaker.wait(now)
        if pause:
            raise not_tried(self.where, pause)

    def explain(self, stage: Stage, error: Exception) -> StoreError | Interrupted:
        """Tell a server that said no from one that could not be talked to."""
        # An asyncio connection wraps whatever a unix socket's greeting met.
        root = error.__cause__ if isinstance(error.__cause__, driver.RedisError) else error
        if isinstance(root, REFUSALS):
            return refused(cast("driver.RedisError", root), self.where)
        return Interrupted(stage, root)

    def repeats(self, failure: Interrupted, batch: Batch, started: float) -> bool:
        """Return whether the call may be made again, on a new connection."""
        if failure.timed_out or time.monotonic() - started >= self.timeout:
            return False
        return failure.stage is Stage.SENDING or (
            failure.stage is Stage.WAITING and batch.repeatable
        )

    def verdict(self, failure: Interrupted, batch: Batch, started: float) -> StoreError:
        """Return the error for the caller."""
        if failure.stage is not Stage.QUEUED:
            self.breaker.failed(started, time.monotonic())
        return unreachable(failure, self.where, self.timeout, write=not batch.repeatable)


class Link:
    """Blocking connections to one server, for any number of threads."""

    def __init__(self, policy: Policy, make: Callable[[], SyncConnection]) -> None:
        self._policy = policy
        self._make = make
        self._idle: list[SyncConnection] = []

    def run(self, steps: Steps[T]) -> T:
        """Carry an operation out.

        Raises:
            StoreUnavailable: the server could not be reached in time, or refused.
            StoreFull: the server is out of memory.
        """
        try:
            batch = next(steps)
            while True:
                batch = steps.send(self._call(batch))
        except StopIteration as stop:
            return cast("T", stop.value)
        except driver.RedisError as error:
            raise refused(error, self._policy.where) from error

    def _call(self, batch: Batch) -> list[Any]:
        started = time.monotonic()
        self._policy.admit(started)
        try:
            return self._attempt(batch, fresh=False)
        except Interrupted as failure:
            if not self._policy.repeats(failure, batch, started):
                raise self._policy.verdict(failure, batch, started) from failure
        try:
            return self._attempt(batch, fresh=True)
        except Interrupted as failure:
            raise self._policy.verdict(failure, batch, started) from failure

    def _attempt(self, batch: Batch, *, fresh: bool) -> list[Any]:
        stage = Stage.CONNECTING
        connection: SyncConnection | None = None
        idle = self._idle
        try:
            connection = self._connection(idle, fresh=fresh)
            stage = Stage.SENDING if batch.whole else Stage.WAITING
            connection.send_packed_command(packed(connection, batch), check_health=False)
            stage = Stage.WAITING
            replies = [_reply(connection) for _ in batch.commands]
        except BaseException as error:
            if connection is not None:
                connection.disconnect()
            if isinstance(error, FAILURES):
                failure = self._policy.explain(stage, error)
                if isinstance(failure, Interrupted) and failure.timed_out:
                    # What cut this one off without a word may have cut off the idle ones too, and
                    # each would cost a timeout to find out.
                    self.close()
                raise failure from error
            raise
        if idle is self._idle and len(idle) < _IDLE:
            idle.append(connection)
        else:
            connection.disconnect()
        self._policy.breaker.succeeded()
        return replies

    def _connection(self, idle: list[SyncConnection], *, fresh: bool) -> SyncConnection:
        if not fresh and idle:
            with contextlib.suppress(IndexError):  # another thread may have taken the last one
                connection = idle.pop()
                if not _is_stale(connection):
                    return connection
                connection.disconnect()
        connection = self._make()
        connection.connect()
        return connection

    def close(self) -> None:
        """Close the idle connections; those in use close when their call ends."""
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.disconnect()

    def after_fork(self) -> None:
        """Forget the parent's connections: the driver closes them without a word to the server."""
        self._idle = []


def connectors(
    config: StoreConfig,
) -> tuple[Callable[[], SyncConnection], Callable[[], AsyncConnection]]:
    """Return what makes a connection to the server of `config`, sync and asyncio.

    Raises:
        ConfigError: the URL has an option that redis-py does not know.
    """
    # RESP2: no greeting to wait for, and never a push message between a request and its reply.
    common: dict[str, Any] = {
        "decode_responses": False,
        "driver_info": None,
        "health_check_interval": 0,
        "protocol": 2,
        "socket_connect_timeout": config.timeout,
    }
    sync_kind, sync_options = _parsed(sync_driver, config)
    async_kind, async_options = _parsed(async_driver, config)
    sync_options |= {**common, "socket_timeout": config.timeout}
    # An asyncio call has one deadline around all it does, in place of one for each send and read.
    async_options |= {**common, "socket_timeout": None}

    def make() -> SyncConnection:
        return cast("SyncConnection", sync_kind(**sync_options))

    def amake() -> AsyncConnection:
        return cast("AsyncConnection", async_kind(**async_options))

    try:
        make()
        amake()
    except (TypeError, ValueError, driver.RedisError) as error:
        raise ConfigError(f"store URL {config.safe_url}: {error}") from None
    return make, amake


def _parsed(module: Any, config: StoreConfig) -> tuple[Callable[..., Any], dict[str, Any]]:
    try:
        options: dict[str, Any] = module.parse_url(config.url)
    except ValueError as error:
        raise ConfigError(f"store URL {config.safe_url}: {error}") from None
    kind = options.pop("connection_class", module.Connection)
    return kind, {name: value for name, value in options.items() if name not in _OWN_OPTIONS}


def packed(connection: SyncConnection | AsyncConnection, batch: Batch) -> list[bytes]:
    """Return the bytes of all commands of a batch."""
    if len(batch.commands) == 1:
        return connection.pack_command(*batch.commands[0].words)
    return connection.pack_commands([command.words for command in batch.commands])


def _reply(connection: SyncConnection) -> Any:
    try:
        return connection.read_response()
    except driver.ResponseError as error:
        return error


def _is_stale(connection: SyncConnection) -> bool:
    """Return whether the server closed an idle connection, or left something to read on it."""
    try:
        return connection.can_read()
    except FAILURES:
        return True
