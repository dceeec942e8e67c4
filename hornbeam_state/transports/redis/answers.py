"""Answers on their way to the inboxes of callers, on the event loop of a node."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from hornbeam_state.backends.redis.batches import call
from hornbeam_state.errors import StoreError
from hornbeam_state.transports.redis import scripts
from hornbeam_state.transports.redis.envelope import Answer, Kind, sign_answer
from hornbeam_state.transports.redis.keys import InboxKeys
from hornbeam_state.transports.redis.outgoing import INLINE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hornbeam_state.transports.redis.bodies import Body
    from hornbeam_state.transports.redis.writer import Writer

logger = logging.getLogger("hornbeam.transport")

_KEEP: Final = b"60000"
_UNREAD_BYTES: Final = 2**23
_MOST_UNREAD: Final = 1024
_FIRST_PAUSE_S: Final = 0.002
_LONGEST_PAUSE_S: Final = 0.1


class Answers:
    """The answers to one call.

    Args:
        writer: Sends them.
        id: The call.
        inbox: Whose call it is.
        secret: What they are signed with.
    """

    def __init__(self, writer: Writer, id: bytes, inbox: bytes, secret: bytes | None) -> None:
        self._writer = writer
        self._id = id
        self._inbox = inbox
        self._keys = InboxKeys(inbox)
        self._secret = secret
        self._number = 0

    async def send(self, kind: Kind, body: Body | None = None, data: bytes = b"") -> None:
        """Send an answer; return when it is in the inbox.

        It waits for as long as too much in the inbox is unread, or the server is out of reach;
        who calls it bounds the time.

        Args:
            kind: What it says.
            body: The values.
            data: Other bytes, in the place of a body.
        """
        total = len(data) if body is None else body.size
        number, self._number = self._number, self._number + 1
        # How much is unread is counted in entries: of large ones there may be fewer.
        size = max(1, min(total, INLINE_BYTES))
        bounded = kind is Kind.CHUNK or total > INLINE_BYTES
        most = min(_MOST_UNREAD, max(4, _UNREAD_BYTES // size)) if bounded else 0
        offset = 0
        for piece in _pieces(body, data):
            answer = Answer(kind, self._id, number, offset, total, piece)
            await self._write(answer.to_bytes(), most)
            offset += len(piece)

    async def _write(self, data: bytes, most: int) -> None:
        signature = sign_answer(self._secret, self._inbox, data) if self._secret else b""
        keys = self._keys
        command = call(
            scripts.ANSWER, keys.bucket, (keys.inbox,), b"%d" % most, _KEEP, data, signature
        )
        pause = _FIRST_PAUSE_S
        while True:
            try:
                if await self._writer.write(command):
                    return
            except StoreError as error:
                logger.warning("an answer cannot be sent for now: %s", error)
                pause = _LONGEST_PAUSE_S
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)


def _pieces(body: Body | None, data: bytes) -> Iterator[bytes | memoryview]:
    if body is None:
        yield data
    elif body.size <= INLINE_BYTES:
        yield body.joined()
    else:
        yield from body.pieces(INLINE_BYTES)
