"""What a node writes: answers to inboxes, and what became of casts, on its event loop.

A write goes out in the very step in which it is asked for, on a connection that is kept for that.
What that connection cannot do goes the usual way, which takes longer and knows every failure.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import TYPE_CHECKING, Any, Final

from hornbeam_state.backends.redis.batches import ask_independently
from hornbeam_state.errors import StoreError
from hornbeam_state.transports.redis.aline import AsyncLine
from hornbeam_state.transports.redis.line import LineLost, first_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hornbeam_state.backends.redis.backend import RedisBackend
    from hornbeam_state.backends.redis.batches import Command

logger = logging.getLogger("hornbeam.transport")

_AT_ONCE: Final = 64
_Waiting = tuple["Command", "asyncio.Future[Any]"]


class Writer:
    """Sends commands; those that come while others are under way go together, after them.

    Args:
        backend: The store.
    """

    def __init__(self, backend: RedisBackend) -> None:
        self._backend = backend
        # The inboxes of a Cluster are on several servers.
        self._has_line = not backend.config.scheme.endswith("+cluster")
        self._line: AsyncLine | None = None
        self._opening: asyncio.Task[None] | None = None
        self._waiting: list[_Waiting] = []
        self._busy = False
        self._task: asyncio.Task[None] | None = None  # of what goes the usual way

    async def write(self, command: Command) -> Any:
        """Send a command that may be repeated; return the reply.

        Raises:
            StoreError: it may or may not have been done.
            RedisError: the server refused.
        """
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((command, future))
        self._send_next()
        return await future

    def open_soon(self) -> None:
        """Connect, without waiting for it."""
        if self._has_line and self._opening is None:
            self._opening = asyncio.create_task(self._open())

    async def close(self) -> None:
        """Close the connection. What is written after goes the usual way."""
        self._has_line = False
        opening, self._opening = self._opening, None
        if opening is not None:
            opening.cancel()
            await asyncio.wait([opening])
        if self._line is not None:
            self._line.close()

    def forget_after_fork(self) -> None:
        """In a forked child: let go of the parent's connection."""
        if self._line is not None:
            self._line.forget_after_fork()

    async def _open(self) -> None:
        line = self._line = self._line or AsyncLine(
            self._backend.link, 0, self._backend.config.timeout
        )
        try:
            await line.open()
        except StoreError as error:
            logger.info("answers go the usual way for now: %s", error)
            await line.pause()
        finally:
            self._opening = None

    def _send_next(self) -> None:
        """Send what waits, unless something is under way."""
        if self._busy or not self._waiting:
            return
        self._busy = True
        batch, self._waiting = self._waiting[:_AT_ONCE], self._waiting[_AT_ONCE:]
        line = self._line
        if line is None or not line.is_open:
            self._send_usually(batch)
            self.open_soon()
            return
        asked = line.post(*(command for command, _ in batch))
        asked.add_done_callback(functools.partial(self._replied, batch))

    def _replied(self, batch: Sequence[_Waiting], asked: asyncio.Future[list[Any]]) -> None:
        try:
            replies = asked.result()
        except (LineLost, asyncio.CancelledError):
            replies = None
        if replies is None or first_error(replies) is not None:
            self._send_usually(batch)  # which repeats what may have been done
        else:
            self._finish(batch, replies)

    def _send_usually(self, batch: Sequence[_Waiting]) -> None:
        # A task of its own: a call that is cancelled must not take the answers of others along.
        self._task = asyncio.get_running_loop().create_task(self._send(batch))

    async def _send(self, batch: Sequence[_Waiting]) -> None:
        replies: list[Any]
        commands = [command for command, _ in batch]
        try:
            replies = await self._backend.alink.run(ask_independently(commands))
        except StoreError as error:
            replies = [error] * len(batch)
        except BaseException:
            for _, future in (*batch, *self._waiting):
                future.cancel()
            self._waiting, self._busy = [], False
            raise
        self._finish(batch, replies)

    def _finish(self, batch: Sequence[_Waiting], replies: Sequence[Any]) -> None:
        for (_, future), reply in zip(batch, replies, strict=True):
            if future.done():
                continue
            if isinstance(reply, Exception):
                future.set_exception(reply)
            else:
                future.set_result(reply)
        self._busy = False
        self._send_next()
