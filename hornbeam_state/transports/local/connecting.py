"""How a client gets its channel: finding the server, checking whose it is, greeting."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Any, Final

from hornbeam_state.errors import CodecError, ConfigError, HornbeamError, NodeDown
from hornbeam_state.transports.local import messages, sockets
from hornbeam_state.transports.local.channel import LocalChannel
from hornbeam_state.transports.local.frames import MOST_BYTES, FrameReader
from hornbeam_state.transports.local.messages import Kind
from hornbeam_state.transports.opening import open_in_thread

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping
    from pathlib import Path

MOST_PENDING: Final = 4096


def connect(
    path: Path,
    hello: Mapping[str, Any],
    *,
    timeout: float = 5.0,
    on_note: Callable[[Any], None] | None = None,
    on_lost: Callable[[BaseException | None], None] | None = None,
    most_pending: int = MOST_PENDING,
    most_bytes: int = MOST_BYTES,
) -> LocalChannel:
    """Return a channel to the server at a path; blocks.

    Args:
        path: Where the server listens.
        hello: What it is told of this client: a small value of the codec.
        timeout: Seconds until the server has to have greeted.
        on_note: Called with each note of the server, on the thread of the channel; the first
            may come before this function returns.
        on_lost: Called once when the connection has ended, on the thread of the channel: with
            the reason, or with None when it was closed on this side.
        most_pending: How many calls may wait for their answers.
        most_bytes: The largest answer.

    Raises:
        NodeDown: nobody is there, or nobody greets in time; `sent` is False.
        ConfigError: the server is not ours, speaks another version, or the path is too long.
        HornbeamError: the server refused, for this reason.
    """
    try:
        sock = sockets.connect(path, timeout)
    except OSError as error:
        raise _not_there(f"nobody listens at {path}: {error.strerror or error}") from None
    try:
        _check_owner(sock, path)
        reader = FrameReader(messages.MOST_GREETING_BYTES)
        try:
            server_most, peer = _greet(sock, reader, most_bytes, hello, timeout)
        except OSError as error:
            raise _not_there(f"the server at {path} did not greet: {error}") from None
        except CodecError as error:
            raise ConfigError(f"what listens at {path} is no server of hornbeam") from error
        reader.most_bytes = most_bytes
        sock.settimeout(None)
        return LocalChannel(
            sock,
            reader,
            peer=peer,
            most_bytes=server_most,
            on_note=on_note,
            on_lost=on_lost,
            most_pending=most_pending,
        )
    except BaseException:
        sock.close()
        raise


async def aconnect(path: Path, hello: Mapping[str, Any], **options: Any) -> LocalChannel:
    """Awaitable twin of `connect`, with the same options."""
    return await open_in_thread(lambda: connect(path, hello, **options), LocalChannel.close)


def _check_owner(sock: socket.socket, path: Path) -> None:
    uid = sockets.peer_uid(sock)
    if uid != os.geteuid():
        raise ConfigError(
            f"the server at {path} runs as user id {uid}, and this process as {os.geteuid()}"
        )


def _greet(
    sock: socket.socket,
    reader: FrameReader,
    most_bytes: int,
    hello: Mapping[str, Any],
    timeout: float,
) -> tuple[int, dict[str, Any]]:
    """Exchange greetings; return the largest frame that the server takes, and what it said."""
    deadline = time.monotonic() + timeout
    with contextlib.suppress(BrokenPipeError):  # it may have said why before it left
        for buffer in messages.greeting(Kind.HELLO, most_bytes, hello).buffers:
            sock.sendall(buffer)
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        sock.settimeout(left)
        count = sock.recv_into(reader.buffer())
        if not count:
            raise ConnectionResetError("it closed the connection")
        for frame in reader.feed(count):
            if frame.kind == Kind.WELCOME:
                return messages.read_greeting(frame)
            raise _refusal(messages.read_failure(frame))


def _refusal(error: Exception) -> HornbeamError:
    return error if isinstance(error, HornbeamError) else ConfigError(f"refused: {error}")


def _not_there(message: str) -> NodeDown:
    error = NodeDown(message)
    error.sent = False
    return error
