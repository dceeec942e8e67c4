"""Where a node listens: over one transport each."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol

from hornbeam_state.transports import local

if TYPE_CHECKING:
    from pathlib import Path

    from hornbeam_state.rpc.answers import Answers


class Entrance(Protocol):
    """Where a node listens, over one transport. Its coroutines run on one event loop.

    Attributes:
        transport: What the registry calls the transport.
    """

    transport: str

    @property
    def serves(self) -> bool:
        """Whether it takes calls."""
        ...

    def waiting(self) -> int:
        """Return how many calls wait there, beside those that the node has; may block, on a thread.

        Raises:
            StoreUnavailable: that cannot be known for now.
        """
        ...

    async def open(self, answers: Answers) -> dict[str, Any]:
        """Begin to serve; return the address that goes into the registry."""
        ...

    async def close(self, *, grace: float, refuse: bool) -> None:
        """Take no more calls, wait so many seconds for those that run, and end.

        Args:
            grace: Seconds to wait.
            refuse: Whether to refuse the calls that wait; else another process has the name.
        """
        ...


class LocalEntrance:
    """A unix socket, for processes of this machine and user.

    Args:
        path: Where it lies.
    """

    transport = "local"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._server: local.Server | None = None

    @property
    def serves(self) -> bool:
        """Whether it takes calls."""
        return self._server is not None and not self._server.closing

    def waiting(self) -> int:
        """Return 0: calls wait in the node."""
        return 0

    async def open(self, answers: Answers) -> dict[str, Any]:
        """Begin to serve; return the address that goes into the registry."""
        server = local.Server(self._path, answers)
        await server.start()
        self._server = server
        return {"path": str(self._path), "uid": os.geteuid()}

    async def close(self, *, grace: float, refuse: bool) -> None:  # noqa: ARG002 - an Entrance
        """Refuse new calls, wait so many seconds for those that run, and end."""
        if self._server is not None:
            await self._server.close(grace=grace)
