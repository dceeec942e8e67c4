"""Nodes over Redis: how one listens there. Imported only where the store is on Redis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hornbeam_state.backends.redis.backend import RedisBackend
from hornbeam_state.rpc.turns import TurnsAhead
from hornbeam_state.transports.redis import RedisServer

if TYPE_CHECKING:
    from hornbeam_state.config import StoreConfig
    from hornbeam_state.rpc.answers import Answers


class RedisEntrance:
    """A stream of Redis, for processes of any machine.

    It has connections of its own: they belong to the event loop of the node, and end with it.

    Args:
        config: Where the servers are.
        name: The full name of the node.
        most_waiting: How many calls may wait in the stream; casts that run are there too. At least
            as many as run at a time, since a call is there until it begins.
    """

    transport = "redis"

    def __init__(self, config: StoreConfig, name: str, *, most_waiting: int) -> None:
        self._config = config
        self._name = name
        self._most_waiting = most_waiting
        self._backend: RedisBackend | None = None
        self._server: RedisServer | None = None

    @property
    def serves(self) -> bool:
        """Whether it takes calls."""
        return self._server is not None and self._server.error is None

    def waiting(self) -> int:
        """Return how many calls and casts wait in the stream; blocks for a round trip.

        Raises:
            StoreUnavailable: the server cannot be reached.
        """
        return 0 if self._server is None else self._server.waiting()

    async def open(self, answers: Answers) -> dict[str, Any]:
        """Begin to serve; return the address that goes into the registry.

        Raises:
            StoreUnavailable: the server cannot be reached.
            ConfigError: ``HORNBEAM_SECRET`` is too short.
        """
        backend = self._backend = RedisBackend(self._config)
        server = RedisServer(
            backend,
            self._name,
            answers,
            places=TurnsAhead(answers.turns),
            most_waiting=max(self._most_waiting, answers.turns.concurrency),
        )
        await server.start()
        self._server = server
        return {}

    async def close(self, *, grace: float, refuse: bool) -> None:
        """Take no more calls, wait so many seconds for those that run, and end."""
        server, self._server = self._server, None
        if server is not None:
            await server.close(grace=grace, refuse=refuse)
        backend, self._backend = self._backend, None
        if backend is not None:
            await backend.aclose()
