"""The server's side of one client: its greeting, its calls as tasks, and their answers."""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import TYPE_CHECKING, Final, Protocol

from hornbeam_state.errors import CodecError, NodeDown, Overloaded
from hornbeam_state.transports.local import messages
from hornbeam_state.transports.local.frames import Frame, FrameReader
from hornbeam_state.transports.local.messages import Kind
from hornbeam_state.transports.local.pipe import Pipe

if TYPE_CHECKING:
    import socket

    from hornbeam_state.transports.base import Handler, Request
    from hornbeam_state.transports.local.frames import Received

logger = logging.getLogger("hornbeam.transport")

_GREETING_WAIT_S: Final = 5.0


class Host(Protocol):
    """The server, as its connections know it."""

    handler: Handler
    most_calls: int
    most_bytes: int
    closing: bool

    def welcome(self, connection: Connection) -> None:
        """Take note of a client that was greeted."""

    def forget(self, connection: Connection) -> None:
        """Take note that a connection ended."""


class Connection:
    """A client and its calls. All of it runs on one event loop.

    Args:
        sock: Connected; it does not block.
        host: The server.
    """

    def __init__(self, sock: socket.socket, host: Host) -> None:
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._held = 0  # bytes of the calls that run
        self._greeted = False
        self._client_most = messages.MOST_GREETING_BYTES
        self._timer = self._loop.call_later(_GREETING_WAIT_S, self.close)
        self._reader = FrameReader(messages.MOST_GREETING_BYTES)
        self.pipe = Pipe(sock, self._reader, self)

    @property
    def calls(self) -> list[asyncio.Task[None]]:
        """The calls that run."""
        return list(self._calls.values())

    def leave(self) -> None:
        """Say that nothing more begins, if that is so, and close the connection."""
        if self._greeted and not self._calls:
            self.pipe.send(Frame(Kind.GOODBYE, 0))
        self.pipe.flush()
        self.close()

    def close(self) -> None:
        """Close the connection and cancel its calls."""
        self.pipe.close()

    # What the pipe tells.

    def take(self, frame: Received) -> None:
        """Take a frame."""
        if not self._greeted:
            self._greet(frame)
        elif frame.kind == Kind.CANCEL:
            task = self._calls.get(frame.call)
            if task is not None:
                task.cancel()
        elif frame.kind in (Kind.CALL, Kind.STREAM):
            self._begin(frame)
        else:
            raise CodecError(f"damaged frame: a client sends none of kind {frame.kind}")

    def refuse(self, error: Exception) -> None:
        """Tell the client why, as far as it listens, and close."""
        logger.warning("the connection of a client is closed: %s", error)
        self.pipe.send(messages.failure(Kind.REFUSAL, 0, error), at_once=True)
        self.close()

    def lose(self) -> None:
        """Cancel the calls: nobody waits for them."""
        self._timer.cancel()
        for task in self.calls:
            task.cancel()
        self._host.forget(self)

    def _greet(self, frame: Received) -> None:
        if frame.kind != Kind.HELLO:
            raise CodecError("damaged frame: a client begins with a greeting")
        self._client_most, hello = messages.read_greeting(frame)
        try:
            words = self._host.handler.greet(hello)
            greeting = messages.greeting(Kind.WELCOME, self._host.most_bytes, words)
        except Exception as error:  # noqa: BLE001 - the client is told
            self.refuse(error)
            return
        self._greeted = True
        self._timer.cancel()
        self._reader.most_bytes = self._host.most_bytes
        self.pipe.send(greeting)
        self._host.welcome(self)

    # Calls.

    def _begin(self, frame: Received) -> None:
        number = frame.call
        if number in self._calls:
            raise CodecError("damaged frame: a call has the number of another")
        try:
            self._admit(frame)
            request = messages.read_call(frame)
        except Exception as error:  # noqa: BLE001 - it is the caller's
            self._answer(messages.failure(Kind.FAILURE, number, error))
            return
        run = self._stream if frame.kind == Kind.STREAM else self._call
        task = self._loop.create_task(run(number, request))
        self._calls[number] = task
        self._held += frame.size
        # Not in the task: one that is cancelled at once never runs.
        task.add_done_callback(functools.partial(self._ended, number, frame.size))

    def _admit(self, frame: Received) -> None:
        if self._host.closing:
            error = NodeDown("the server is closing")
            error.sent = False
            raise error
        if len(self._calls) >= self._host.most_calls:
            raise Overloaded.refusal(f"{self._host.most_calls} calls of this client run already")
        if self._calls and self._held + frame.size > self._host.most_bytes:
            raise Overloaded.refusal(f"the calls of this client hold {self._held} bytes already")

    async def _call(self, number: int, request: Request) -> None:
        try:
            results = await self._host.handler.call(request)
            self._answer(self._checked(messages.results(number, results)))
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            self._fail(number, error)

    async def _stream(self, number: int, request: Request) -> None:
        try:
            chunks = self._host.handler.stream(request)
            try:
                async for chunk in chunks:
                    self.pipe.send(self._checked(messages.value(Kind.CHUNK, number, chunk)))
                    await self.pipe.drain()
            finally:
                close = getattr(chunks, "aclose", None)
                if close is not None:
                    await close()
            self._answer(messages.end(number))
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            self._fail(number, error)

    def _checked(self, frame: Frame) -> Frame:
        if frame.size > self._client_most:
            raise CodecError(
                f"an answer of {frame.size} bytes: the client takes {self._client_most} at most"
            )
        return frame

    def _fail(self, number: int, error: BaseException) -> None:
        """Tell the caller, unless it cancelled; raise what is not the caller's alone."""
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise error
        self._answer(messages.failure(Kind.FAILURE, number, error))
        if not isinstance(error, Exception | asyncio.CancelledError):
            raise error

    def _answer(self, frame: Frame) -> None:
        # The answers of several calls leave together, that of a single one at once.
        self.pipe.send(frame, at_once=len(self._calls) <= 1)

    def _ended(self, number: int, size: int, task: asyncio.Task[None]) -> None:
        del self._calls[number]
        self._held -= size
        if not task.cancelled() and task.exception() is not None:
            logger.error("a call ended the loop of the server", exc_info=task.exception())
