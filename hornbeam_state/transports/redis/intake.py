"""The task that takes calls off the stream of a node: reads, claims, hands over.

It claims no more than the node has room to run, and reads one call ahead at most, so that what
waits is in the stream, where its caller can cancel it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from redis.exceptions import ResponseError

from hornbeam_state.backends.redis.batches import Command, call
from hornbeam_state.errors import StoreError
from hornbeam_state.transports.redis import scripts
from hornbeam_state.transports.redis.aline import AsyncLine
from hornbeam_state.transports.redis.envelope import (
    LONGEST_MS,
    SKEW_MS,
    Envelope,
    Kind,
    Refused,
    deadline_of,
    fields_of,
    open_head,
)
from hornbeam_state.transports.redis.keys import GROUP
from hornbeam_state.transports.redis.line import LineLost, first_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hornbeam_state.transports.base import Place, Places
    from hornbeam_state.transports.redis.keys import NodeKeys
    from hornbeam_state.transports.redis.station import Station

logger = logging.getLogger("hornbeam.transport")

MOST_DELIVERIES: Final = 5
"""How often a cast is begun before it is kept as a dead letter."""

MOST_DEAD: Final = 256
DEAD_KEEP_MS: Final = 7 * LONGEST_MS
ABANDONED_MS: Final = 5_000
"""A cast is taken over from whoever has it after so long without a word."""

_TEND_EVERY_S: Final = 1.0
_BLOCK_S: Final = 1.0
_MOST_AT_ONCE: Final = 64
_HEAD_START: Final = 3  # rounds of the loop in which calls may end before more is asked for
_FORGET_MS: Final = 3_600_000  # after so long without a word from who reads nothing any more
_LONGEST_TIME: Final = 15  # digits


@dataclass(frozen=True, slots=True)
class Work:
    """A call that is this node's to run.

    Attributes:
        entry: Where it was in the stream; a cast still is.
        envelope: What is asked.
        body: The values; None: they lie beside the stream.
        left_s: Seconds until nobody wants it any more.
        place: Its right to run.
    """

    entry: bytes
    envelope: Envelope
    body: bytes | None
    left_s: float
    place: Place


class Opened(NamedTuple):
    """A call that was read, and is not this node's yet.

    Attributes:
        entry: Where it is in the stream.
        envelope: What is asked.
        body: The values; None: they lie beside the stream.
        deadline: Until when it may run.
    """

    entry: bytes
    envelope: Envelope
    body: bytes | None
    deadline: int


class Owner(Protocol):
    """Whom the intake tells what it took."""

    def begin(self, works: Sequence[Work]) -> None:
        """Run calls, and end the place of each with it."""
        ...

    def running_casts(self) -> list[bytes]:
        """Return the entries of the casts that run."""
        ...

    async def announce(self) -> None:
        """Write what the node says of itself, which the server may have lost."""
        ...


class Intake:
    """Takes calls off the stream of a node, as a task.

    Args:
        station: The node.
        consumer: What this process is called in the group: another name than any other.
        places: How many calls may begin.
        owner: Whom to tell.

    Attributes:
        stopping: Set it to have no more calls taken.
        claiming: Whether calls are just being claimed: cancelled then, nobody would run them.
    """

    def __init__(self, station: Station, consumer: bytes, places: Places, owner: Owner) -> None:
        backend = station.backend
        self._node = station.node
        self._keys = station.keys
        self._secret = station.secret
        self._consumer = consumer
        self._places = places
        self._owner = owner
        self._line = AsyncLine(backend.link, station.keys.bucket, backend.config.timeout)
        self.stopping = False
        self.claiming = False
        self._held: deque[Opened] = deque()  # what waits for a place
        self._tend_at = 0.0
        self._is_away = False  # which is said once

    async def run(self) -> None:
        """Take calls until it is to stop or cancelled, whatever happens to the server."""
        try:
            while not self.stopping:
                try:
                    await self._serve()
                except (StoreError, LineLost) as error:
                    self._places.give_up()
                    if not self._is_away:
                        logger.warning("%s takes no calls for now: %s", self._node, error)
                    self._is_away = True
                    await self._line.pause()
        finally:
            self._places.give_up()
            self._line.close()

    async def release(self, entries: Sequence[bytes]) -> None:
        """Have others take over casts at once that this process began, and what it only read.

        Raises:
            LineLost, StoreError: they do so later.
        """
        names = [*entries, *(each.entry for each in self._held)]
        if names:
            await self._line.open()
            words = (b"XCLAIM", self._keys.calls, GROUP, self._consumer, b"0", *names)
            how = (b"IDLE", b"%d" % ABANDONED_MS, b"JUSTID")
            await self._line.ask(Command((*words, *how), self._keys.bucket))
            self._line.close()

    def forget_after_fork(self) -> None:
        """In a forked child: let go of the parent's connection."""
        self._line.forget_after_fork()

    async def _serve(self) -> None:
        """Take calls until the connection is lost."""
        await self._line.open()
        await self._join_group()
        self._is_away = False
        while not self.stopping:
            await self._tend()
            if not self._held:
                await self._open(await self._read(min(self._places.left or 1, _MOST_AT_ONCE)))
            if self._held:
                await self._take()

    async def _join_group(self) -> None:
        words = (b"XGROUP", b"CREATE", self._keys.calls, GROUP, b"0", b"MKSTREAM")
        (reply,) = await self._line.ask(Command(words, self._keys.bucket))
        if isinstance(reply, Exception) and "BUSYGROUP" not in str(reply):
            raise LineLost(str(reply)) from reply
        await self._owner.announce()
        await self._forget_consumers()

    async def _forget_consumers(self) -> None:
        """Remove what is left of processes that ended long ago."""
        words = (b"XINFO", b"CONSUMERS", self._keys.calls, GROUP)
        (reply,) = await self._line.ask(Command(words, self._keys.bucket))
        if isinstance(reply, Exception):
            return
        for fields in reply:
            known = fields_of(fields)
            if not known[b"pending"] and known[b"idle"] > _FORGET_MS:
                forget = (b"XGROUP", b"DELCONSUMER", self._keys.calls, GROUP, known[b"name"])
                await self._line.ask(Command(forget, self._keys.bucket))

    async def _read(self, count: int) -> list[Any]:
        words = (b"XREADGROUP", b"GROUP", GROUP, self._consumer, b"COUNT", b"%d" % count)
        block = (b"BLOCK", b"%d" % (_BLOCK_S * 1000), b"STREAMS", self._keys.calls, b">")
        (reply,) = await self._line.ask(Command((*words, *block), self._keys.bucket), wait=_BLOCK_S)
        if isinstance(reply, ResponseError) and "NOGROUP" in str(reply):
            await self._join_group()  # the server lost its data
            return []
        if isinstance(reply, Exception):
            raise LineLost(str(reply)) from reply
        return reply[0][1] if reply else []

    async def _tend(self) -> None:
        """Keep the casts that run, and take over what others left."""
        now = time.monotonic()
        if now < self._tend_at:
            return
        self._tend_at = now + _TEND_EVERY_S
        keys = self._keys
        (reply,) = await self._line.ask(
            call(
                scripts.TEND,
                keys.bucket,
                (keys.calls, keys.dead),
                *(GROUP, self._consumer, b"%d" % ABANDONED_MS, b"%d" % MOST_DELIVERIES),
                *(b"%d" % MOST_DEAD, b"%d" % DEAD_KEEP_MS, b"%d" % self._places.left),
                *self._owner.running_casts(),
                *(each.entry for each in self._held),
            )
        )
        if isinstance(reply, ResponseError) and "NOGROUP" in str(reply):
            await self._join_group()
            return
        if isinstance(reply, Exception):
            raise LineLost(str(reply)) from reply
        entries, buried = reply
        if buried:
            logger.error("%s: %d casts never ended, and are dead letters now", self._node, buried)
        await self._open(entries)

    async def _open(self, entries: Sequence[Any]) -> None:
        """Have what was read wait for places."""
        for entry, fields in entries:
            try:
                opened = self._opened(entry, fields_of(fields))
                self._held.append(opened)
            except Refused as refused:
                await self._bury(entry, f"refused: {refused}")

    async def _take(self) -> None:
        """Claim what there are places for, and hand over what is ours to run."""
        places = [*await self._places.take(len(self._held), _TEND_EVERY_S)]
        found = [self._held.popleft() for _ in places]
        works, rest = [], []
        try:
            for opened, left in zip(found, await self._claim(found), strict=True):
                if left >= 0:
                    works.append(Work(*opened[:3], left / 1000, places.pop()))
                else:
                    rest.append((opened, left))
        finally:
            for place in places:
                place.leave()
        if works:
            self._owner.begin(works)
        for opened, left in rest:
            await self._set_aside(opened, left)
        if works:
            for _ in range(_HEAD_START):
                await asyncio.sleep(0)

    async def _set_aside(self, opened: Opened, why: int) -> None:
        """Keep what must not run as a dead letter, unless it is out of the stream by now."""
        if why == scripts.REPEATED and opened.envelope.kind is not Kind.CAST:
            logger.error("%s refuses a call that was here before", self._node)
        elif why == scripts.REPEATED:
            await self._bury(opened.entry, "refused: it was here before")
        elif why == scripts.LATE and opened.envelope.kind is Kind.CAST:
            await self._bury(opened.entry, "it waited for too long")

    def _opened(self, entry: bytes, fields: dict[bytes, bytes]) -> Opened:
        head, body = fields.get(b"h", b""), fields.get(b"b", b"")
        written = fields.get(b"d", fields.get(b"c", b""))
        if not (written.isdigit() and len(written) <= _LONGEST_TIME):
            raise Refused("it has no deadline")
        envelope = open_head(self._secret, head, fields.get(b"s", b""), self._node)
        inline = None if envelope.pieces else body
        if inline is not None and len(inline) != envelope.size:
            raise Refused("its values are damaged")
        return Opened(entry, envelope, inline, deadline_of(envelope, int(written)))

    async def _claim(self, found: Sequence[Opened]) -> list[int]:
        """Return for each how many milliseconds it has, or why it must not run."""
        if not found:
            return []
        names, words = [self._keys.calls], [GROUP]
        for entry, envelope, _, deadline in found:
            is_cast = envelope.kind is Kind.CAST
            remembered = is_cast or self._secret is not None
            life = envelope.life_ms + 2 * SKEW_MS if remembered else 0
            names.append(self._keys.once(envelope.id))
            words += (entry, b"%d" % is_cast, b"%d" % deadline, b"%d" % life)
        self.claiming = True
        try:
            (reply,) = await self._line.ask(call(scripts.CLAIM, self._keys.bucket, names, *words))
        finally:
            self.claiming = False
        if isinstance(reply, Exception):
            raise LineLost(str(reply)) from reply
        return list(reply)

    async def _bury(self, entry: bytes, reason: str) -> None:
        """Make a dead letter of an entry."""
        logger.error("%s: a message is a dead letter now: %s", self._node, reason)
        error = first_error(await self._line.ask(burial(self._keys, entry, reason, 0)))
        if error is not None:
            raise LineLost(str(error)) from error


def burial(keys: NodeKeys, entry: bytes, reason: str, deliveries: int) -> Command:
    """Return what makes a dead letter of an entry that was delivered so often; 0: in any case."""
    return call(
        scripts.BURY,
        keys.bucket,
        (keys.calls, keys.dead),
        *(GROUP, reason.encode("utf-8", "replace")[:1024], b"%d" % MOST_DEAD),
        *(b"%d" % DEAD_KEEP_MS, b"%d" % deliveries, entry),
    )
