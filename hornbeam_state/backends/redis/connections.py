"""Making connections to the servers of a store, with redis-py's connection classes.

Neither its clients nor its pools are used:

- a client retries by itself and does not tell a command that was never sent from one whose reply
  was lost, and a write may be repeated only in the first case; its cluster client does not tell
  them apart either;
- an asyncio pool awaits a lock to take a connection back, so that a cancelled task can lose one
  for good. Here a connection comes back without an await.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import redis.asyncio.connection as async_driver
import redis.connection as sync_driver
from redis import exceptions as driver

from hornbeam_state.backends.redis.topology import Address
from hornbeam_state.errors import ConfigError

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable, Sequence

    from hornbeam_state.backends.redis.batches import Command
    from hornbeam_state.config import StoreConfig

# Set by hornbeam, whatever the URL says.
_OWN_OPTIONS: Final = (
    "max_connections",
    "retry_on_error",
    "retry_on_timeout",
    "socket_connect_timeout",
    "socket_timeout",
    "timeout",
)
_SENTINEL_OPTIONS: Final = {"sentinel_username": "username", "sentinel_password": "password"}
_ROLE: Final = b"ROLE"


class SyncConnection(Protocol):
    """What is used of redis-py's connections."""

    _sock: socket.socket

    def connect(self) -> None: ...  # noqa: D102
    def disconnect(self) -> None: ...  # noqa: D102
    def can_read(self) -> bool: ...  # noqa: D102
    def pack_command(self, *words: bytes) -> list[bytes]: ...  # noqa: D102
    def pack_commands(self, commands: Sequence[Sequence[bytes]]) -> list[bytes]: ...  # noqa: D102
    def send_packed_command(self, data: list[bytes], *, check_health: bool) -> None: ...  # noqa: D102
    def read_response(self, *, push_request: bool = False) -> Any: ...  # noqa: D102
    def update_current_socket_timeout(self, relaxed_timeout: float) -> None: ...  # noqa: D102

    socket_timeout: float


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


class Connector:
    """Makes connections to any server of one store.

    Args:
        config: The store.

    Attributes:
        timeout: Seconds for connecting, and for each reply.
        address: The first server that the URL names.
        database: The number of the database.

    Raises:
        ConfigError: the URL has an option that redis-py does not know.
    """

    def __init__(self, config: StoreConfig) -> None:
        self.timeout = config.timeout
        self._must_be_primary = config.scheme.endswith("+sentinel")
        # RESP2: no greeting to wait for, never a push message between a request and its reply.
        common: dict[str, Any] = {
            "decode_responses": False,
            "driver_info": None,
            "health_check_interval": 0,
            "protocol": 2,
            "socket_connect_timeout": config.timeout,
        }
        self._kind, options = _parsed(sync_driver, config)
        self._async_kind, async_options = _parsed(async_driver, config)
        self.address = _address(options)
        self.database = int(options.get("db") or 0)
        self._sentinel = _for_sentinels(options | common)
        self._async_sentinel = _for_sentinels(async_options | common)
        self._options = options | common | {"socket_timeout": self.timeout}
        # An asyncio call has one deadline around all it does, not one for each send and read.
        self._async_options = async_options | common | {"socket_timeout": None}
        if self._must_be_primary:
            for name in _SENTINEL_OPTIONS:
                self._options.pop(name, None)
                self._async_options.pop(name, None)
        try:
            self._kind(**self._options)
            self._async_kind(**self._async_options)
        except (TypeError, ValueError, driver.RedisError) as error:
            raise ConfigError(f"store URL {config.safe_url}: {error}") from None

    def open(
        self, address: Address, seconds: float | None = None, *, protocol: int = 2
    ) -> SyncConnection:
        """Return a new connection to a data node.

        Behind Sentinel it is one to a primary: each is asked for its role, since what was known
        of the address may be old.

        Args:
            address: The node.
            seconds: Most seconds for connecting, and then for each reply; else `timeout`. Later
                replies have `timeout` either way.
            protocol: The version of RESP; 3 for a connection on which the server pushes.

        Raises:
            RedisError, OSError: it failed; `ReadOnlyError` when the server is no primary.
        """
        connection = self.visit(address, seconds or self.timeout, protocol=protocol)
        connection.connect()
        if self._must_be_primary:
            try:
                _check_role(ask(connection, [(_ROLE,)])[0])
            except BaseException:
                connection.disconnect()
                raise
        connection.socket_timeout = self.timeout
        connection.update_current_socket_timeout(self.timeout)
        return connection

    def visit(
        self, address: Address, seconds: float, *, sentinel: bool = False, protocol: int = 2
    ) -> SyncConnection:
        """Return a connection, not connected yet, with a timeout of its own."""
        options = self._sentinel if sentinel else self._options
        own = {
            "socket_connect_timeout": seconds,
            "socket_timeout": seconds,
            "protocol": protocol,
        }
        return cast("SyncConnection", self._kind(**options | _place(address) | own))

    def make_async(self, address: Address) -> AsyncConnection:
        """Return an asyncio connection to a data node, to be opened with `open_async`."""
        return cast("AsyncConnection", self._async_kind(**self._async_options | _place(address)))

    async def open_async(self, connection: AsyncConnection) -> None:
        """Awaitable twin of `open`, for a connection of `make_async`."""
        await connection.connect()
        if self._must_be_primary:
            _check_role((await aask(connection, [(_ROLE,)]))[0])

    def visit_async(self, address: Address, *, sentinel: bool) -> AsyncConnection:
        """Asyncio twin of `visit`; its caller bounds the time."""
        options = self._async_sentinel if sentinel else self._async_options
        return cast("AsyncConnection", self._async_kind(**options | _place(address)))


def _parsed(module: Any, config: StoreConfig) -> tuple[Callable[..., Any], dict[str, Any]]:
    try:
        options: dict[str, Any] = module.parse_url(_driver_url(config))
    except ValueError as error:
        raise ConfigError(f"store URL {config.safe_url}: {error}") from None
    kind = options.pop("connection_class", module.Connection)
    return kind, {name: value for name, value in options.items() if name not in _OWN_OPTIONS}


def _driver_url(config: StoreConfig) -> str:
    """Return the URL as redis-py knows it: of the first host alone."""
    scheme, topology, _ = config.scheme.partition("+")
    if not topology:
        return config.url
    place, question, query = config.url.partition("://")[2].partition("?")
    netloc, _, path = place.partition("/")
    login, at, hosts = netloc.rpartition("@")
    database = path.partition("/")[2] if config.service else ""
    host = hosts.partition(",")[0]
    return f"{scheme}://{login}{at}{host}/{database}{question}{query}"


def _address(options: dict[str, Any]) -> Address:
    """Return the server that the URL names."""
    if "path" in options:
        return Address(options["path"], 0)
    return Address(options.get("host", "localhost"), options.get("port", 6379))


def _place(address: Address) -> dict[str, Any]:
    if address.port:
        return {"host": address.host, "port": address.port}
    return {"path": address.host}


def _for_sentinels(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options for sentinels: they have a login of their own, and no database."""
    login = {own: options[name] for name, own in _SENTINEL_OPTIONS.items() if name in options}
    private = ("db", "username", "password", "client_name", *_SENTINEL_OPTIONS)
    shared = {name: value for name, value in options.items() if name not in private}
    return shared | login | {"socket_timeout": None}


def ask(connection: SyncConnection, commands: Sequence[Sequence[bytes]]) -> list[Any]:
    """Send commands on a connection and return their replies, errors among them."""
    connection.send_packed_command(connection.pack_commands(commands), check_health=False)
    return [read(connection) for _ in commands]


def read(connection: SyncConnection) -> Any:
    """Return the next reply, or the error that it is."""
    try:
        return connection.read_response()
    except driver.ResponseError as error:
        # Its traceback leads to frames that will hold it, and with it connections and pools.
        return error.with_traceback(None)


async def aask(connection: AsyncConnection, commands: Sequence[Sequence[bytes]]) -> list[Any]:
    """Awaitable twin of `ask`."""
    data = connection.pack_commands(commands)
    await connection.send_packed_command(data, check_health=False)
    return [await aread(connection) for _ in commands]


async def aread(connection: AsyncConnection) -> Any:
    """Awaitable twin of `read`."""
    try:
        return await connection.read_response()
    except driver.ResponseError as error:
        return error.with_traceback(None)  # see `read`


def packed(
    connection: SyncConnection | AsyncConnection, commands: Sequence[Command]
) -> list[bytes]:
    """Return the bytes of commands."""
    if len(commands) == 1:
        return connection.pack_command(*commands[0].words)
    return connection.pack_commands([command.words for command in commands])


def _check_role(reply: Any) -> None:
    """Raise unless the server says that it is a primary, or that this user may not know."""
    if isinstance(reply, driver.NoPermissionError):
        return
    if isinstance(reply, Exception):
        raise reply
    if reply[0] != b"master":
        raise driver.ReadOnlyError("it is no primary any more")
