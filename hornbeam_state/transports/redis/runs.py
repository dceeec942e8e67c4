"""Running one call or cast on the event loop of a node, and what becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from math import inf
from typing import TYPE_CHECKING, Final

from hornbeam_state.backends.redis.batches import call
from hornbeam_state.errors import CodecError, NodeDown, RemoteError, StoreError
from hornbeam_state.transports.base import Request
from hornbeam_state.transports.failures import dump_failure
from hornbeam_state.transports.redis import scripts
from hornbeam_state.transports.redis.answers import Answers
from hornbeam_state.transports.redis.begun import Begun
from hornbeam_state.transports.redis.bodies import Body, read_body
from hornbeam_state.transports.redis.envelope import Kind, Refused, digest_of
from hornbeam_state.transports.redis.intake import MOST_DELIVERIES, burial
from hornbeam_state.transports.redis.keys import GROUP
from hornbeam_state.transports.redis.payloads import download, remove

if TYPE_CHECKING:
    from hornbeam_state.backends.redis.batches import Command
    from hornbeam_state.transports.base import Handler
    from hornbeam_state.transports.redis.intake import Work
    from hornbeam_state.transports.redis.station import Station
    from hornbeam_state.transports.redis.writer import Writer

logger = logging.getLogger("hornbeam.transport")

_PAUSE_S: Final = 0.25
_LAST_WORD_S: Final = 1.0


class Runner:
    """Runs calls and casts.

    Args:
        station: The node.
        handler: What to do with calls.
        writer: Sends what comes of them.

    Attributes:
        closing: Whether calls that are cancelled are told why.
    """

    def __init__(self, station: Station, handler: Handler, writer: Writer) -> None:
        self.closing = False
        self._backend = station.backend
        self._keys = station.keys
        self._secret = station.secret
        self._most_bytes = station.most_bytes
        self._handler = handler
        self._writer = writer
        self._begun = Begun()

    async def run(self, work: Work) -> None:
        """Run what was taken off the stream."""
        if work.envelope.kind is Kind.CAST:
            await self._cast(work)
        else:
            await self._call(work)

    # Calls.

    async def _call(self, work: Work) -> None:
        envelope = work.envelope
        if not self._begun.note(envelope.id, work.left_s):
            logger.error("a call is refused: it began before, and the server has forgotten it")
            return
        answers = Answers(self._writer, envelope.id, envelope.inbox, self._secret)
        try:
            request = await self._request(work)
            if envelope.kind is Kind.STREAM:
                await self._stream(request, answers)
            else:
                body = Body(await self._handler.call(request))
                await answers.send(Kind.RESULTS, body)
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            await self._fail(answers, error)

    async def _stream(self, request: Request, answers: Answers) -> None:
        chunks = self._handler.stream(request)
        try:
            async for chunk in chunks:
                await answers.send(Kind.CHUNK, Body([chunk]))
        finally:
            close = getattr(chunks, "aclose", None)
            if close is not None:
                await close()
        await answers.send(Kind.END)

    async def _fail(self, answers: Answers, error: BaseException) -> None:
        """Tell the caller, unless it cancelled; raise what is not the caller's alone."""
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            if self.closing:
                down = dump_failure(NodeDown("the node closed"))
                with contextlib.suppress(TimeoutError):  # the caller finds out by itself
                    async with asyncio.timeout(_LAST_WORD_S):
                        await answers.send(Kind.FAILURE, data=down)
            raise error
        if isinstance(error, Refused):
            error = CodecError(f"the call is refused: {error}")
        await answers.send(Kind.FAILURE, data=dump_failure(error))
        if not isinstance(error, Exception | asyncio.CancelledError):
            raise error

    async def refuse(self, id: bytes, inbox: bytes) -> None:
        """Tell the caller of a call that was not begun, and never will be."""
        down = NodeDown("the node is closing")
        down.sent = False
        answers = Answers(self._writer, id, inbox, self._secret)
        await answers.send(Kind.FAILURE, data=dump_failure(down))

    # Casts.

    async def _cast(self, work: Work) -> None:
        try:
            request = await self._request(work)
        except (Refused, CodecError) as error:
            await self._bury(work, f"refused: {error}", 0)
            return
        try:
            await self._handler.call(request)
        except NodeDown:
            return  # it came to a node that is closing: it is for the next one
        except Exception as error:  # noqa: BLE001 - nobody waits: it is tried again
            kind = error.remote_type if isinstance(error, RemoteError) else type(error).__name__
            logger.warning("the cast of %s.%s raised %s", request.target, request.method, kind)
            await self._bury(work, f"it raised {kind}", MOST_DELIVERIES)
            return
        life = b"%d" % work.envelope.life_ms
        names = (self._keys.calls, self._keys.once(work.envelope.id))
        await self._write(call(scripts.DONE, self._keys.bucket, names, GROUP, work.entry, life))
        if work.envelope.pieces:
            await self._backend.alink.run(remove(work.envelope, self._keys))

    async def _bury(self, work: Work, reason: str, deliveries: int) -> None:
        if await self._write(burial(self._keys, work.entry, reason, deliveries)):
            logger.error("a cast is a dead letter now: %s", reason)

    async def _write(self, command: Command) -> int:
        """Write until it is written, or the cast is cancelled."""
        while True:
            try:
                return int(await self._writer.write(command) or 0)
            except StoreError as error:
                logger.warning("what became of a cast cannot be noted for now: %s", error)
                await asyncio.sleep(_PAUSE_S)

    # Values.

    async def _request(self, work: Work) -> Request:
        """Return what is asked.

        Raises:
            Refused: the values are not what was sent.
            CodecError: one cannot be decoded here.
            StoreError: they cannot be read.
        """
        envelope, body = work.envelope, work.body
        if body is None:
            values = await asyncio.to_thread(self._fetch, work)
        else:
            self._check(envelope.digest, body)
            values = read_body(body)
        return Request(
            target=envelope.target,
            method=envelope.method,
            values=values,
            options=envelope.options,
            timeout=work.left_s if envelope.timeout < inf else inf,
            place=work.place,
        )

    def _fetch(self, work: Work) -> list[object]:
        body = self._backend.link.run(download(work.envelope, self._keys, self._most_bytes))
        self._check(work.envelope.digest, body)
        values = read_body(body)
        if work.envelope.kind is not Kind.CAST:  # which may be begun again
            self._backend.link.run(remove(work.envelope, self._keys))
        return values

    def _check(self, digest: bytes, body: bytes | memoryview) -> None:
        if self._secret is not None and not hmac.compare_digest(digest, digest_of([body])):
            raise Refused("its values are not those that were signed")
