"""The server: what answers the calls to a node."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import weakref
from typing import TYPE_CHECKING, Any, Final

from hornbeam_state import codec
from hornbeam_state.backends.base import Topics
from hornbeam_state.backends.redis.batches import Command, ask, ask_independently, call
from hornbeam_state.errors import ConfigError, StoreError
from hornbeam_state.transports.redis import scripts
from hornbeam_state.transports.redis.envelope import (
    Kind,
    Refused,
    fields_of,
    open_head,
    read_cancellation,
    secret_from,
)
from hornbeam_state.transports.redis.intake import Intake
from hornbeam_state.transports.redis.keys import GROUP, InboxKeys, NodeKeys, cancel_topic
from hornbeam_state.transports.redis.line import LineLost
from hornbeam_state.transports.redis.outgoing import MOST_WAITING
from hornbeam_state.transports.redis.places import CountedPlaces
from hornbeam_state.transports.redis.runs import Runner
from hornbeam_state.transports.redis.station import Station
from hornbeam_state.transports.redis.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hornbeam_state.backends.redis.backend import RedisBackend
    from hornbeam_state.backends.redis.batches import Steps
    from hornbeam_state.backends.redis.inbox import RedisInbox
    from hornbeam_state.transports.base import Handler, Places
    from hornbeam_state.transports.redis.intake import Work

logger = logging.getLogger("hornbeam.transport")

CONCURRENCY: Final = 64
MOST_BYTES: Final = 2**30
_MOST_CANCELLATIONS: Final = 4096
_LONGEST_CANCEL_S: Final = 2.0
_WATCH_EVERY_S: Final = 2.0
_REFUSE_EVERY_S: Final = 0.25


class RedisServer:
    """Answers the calls to a node. Not thread-safe.

    Calls are run at most once, casts at least once. What waits for the node is kept while the
    server is out of reach, and while the node is.

    Args:
        backend: The store through which it is called.
        node: Its name. Two servers of one name share the calls.
        handler: What to do with calls, and with casts, of which the results are dropped.
        concurrency: How many calls run at a time.
        places: The same, where this server is not the only one that counts them.
        most_waiting: How many may be in the stream: those that wait, and casts that run. More are
            refused: `Overloaded`.
        most_bytes: The largest call.
        secret: What messages are signed with; None: ``HORNBEAM_SECRET``, if that is set. Then
            those that are not are refused.

    Raises:
        ConfigError: the secret is too short.
    """

    def __init__(
        self,
        backend: RedisBackend,
        node: str,
        handler: Handler,
        *,
        concurrency: int = CONCURRENCY,
        places: Places | None = None,
        most_waiting: int = MOST_WAITING,
        most_bytes: int = MOST_BYTES,
        secret: str | bytes | None = None,
    ) -> None:
        self._backend = backend
        self._node = node
        self._keys = NodeKeys(node)
        self._secret = secret_from(secret)
        self._station = Station(
            backend=backend,
            node=node,
            keys=self._keys,
            secret=self._secret,
            most_bytes=most_bytes,
        )
        self._handler = handler
        self._most_waiting = most_waiting
        self._places = CountedPlaces(concurrency) if places is None else places
        self._writer = Writer(backend)
        self._runner = Runner(self._station, handler, self._writer)
        self._works: dict[bytes, tuple[Work, asyncio.Task[None]]] = {}  # by entry
        self._calls: dict[bytes, asyncio.Task[None]] = {}  # by id
        self._cancellations: RedisInbox | None = None
        self._refuse_from = b"-"
        self._watcher: asyncio.Task[None] | None = None
        self._intake: Intake | None = None
        self._taking: asyncio.Task[None] | None = None
        _servers.add(self)

    @property
    def running(self) -> int:
        """How many calls and casts run."""
        return len(self._works)

    def waiting(self) -> int:
        """Return how many calls and casts wait for the node; blocks for a round trip.

        Raises:
            StoreUnavailable: the server cannot be reached.
        """
        words = (b"XLEN", self._keys.calls)
        [count] = self._backend.link.run(ask(Command(words, self._keys.bucket), repeatable=True))
        return max(0, int(count) - len(self.running_casts()))

    @property
    def error(self) -> BaseException | None:
        """What keeps it from taking calls for good: a fault of ours."""
        taking = self._taking
        if taking is None or not taking.done() or taking.cancelled():
            return None
        return taking.exception()

    async def start(self) -> None:
        """Answer calls on the running event loop.

        Raises:
            StoreUnavailable: the server cannot be reached.
            ConfigError: it was started before.
        """
        if self._intake is not None or self._runner.closing:
            raise ConfigError("a server starts once: make another")
        self._loop = asyncio.get_running_loop()
        consumer = os.urandom(8).hex().encode()
        intake = self._intake = Intake(self._station, consumer, self._places, self)
        try:
            await self.announce()
            topics = Topics((cancel_topic(self._node),), ())
            self._cancellations = await self._backend.asubscribe(topics, _MOST_CANCELLATIONS)
        except BaseException:
            self._intake = None
            raise
        self._loop.add_reader(self._cancellations.fileno(), self._hear)
        self._writer.open_soon()
        self._watcher = self._loop.create_task(self._watch())
        self._watcher.add_done_callback(functools.partial(self._broke, "misses who has gone"))
        self._taking = self._loop.create_task(intake.run())
        self._taking.add_done_callback(functools.partial(self._broke, "takes no calls any more"))

    async def close(self, *, grace: float = 0.0, refuse: bool = True) -> None:
        """End, for good. Closing again does nothing.

        Calls that wait are refused, those too that come until the end: `NodeDown`, not sent. Casts
        that wait, or are not done, are kept for the node when it is back.

        Args:
            grace: Seconds to wait for the calls that run. Then they are cancelled.
            refuse: Whether to refuse calls; else they are left to another server of that name.
        """
        if self._runner.closing:
            return
        self._runner.closing = True
        if self._taking is None or self._intake is None:
            return
        deadline = self._loop.time() + grace
        self._intake.stopping = True
        if not self._intake.claiming:
            self._taking.cancel()
        await asyncio.wait([self._taking])
        await self._finish(deadline, refuse=refuse)
        undone = self.running_casts()
        await self._cancel_rest()
        try:
            async with asyncio.timeout(_LONGEST_CANCEL_S):
                await self._intake.release(undone)
        except (StoreError, LineLost, TimeoutError) as error:
            logger.warning("the casts of %s are taken over late: %s", self._node, error)
        self._stop_hearing()
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])
        await self._writer.close()

    async def _finish(self, deadline: float, *, refuse: bool) -> None:
        """Wait until nothing runs, or until the deadline."""
        while True:
            if refuse:
                await self._try_to_refuse()
            tasks, left = self._tasks(), deadline - self._loop.time()
            if not tasks or left <= 0:
                return
            await asyncio.wait(tasks, timeout=min(left, _REFUSE_EVERY_S))

    async def _try_to_refuse(self) -> None:
        try:
            async with asyncio.timeout(_LONGEST_CANCEL_S):
                await self._refuse_waiting()
        except (StoreError, TimeoutError) as error:
            logger.warning("the calls that wait for %s are not refused: %s", self._node, error)

    async def _cancel_rest(self) -> None:
        tasks = self._tasks()
        for task in tasks:
            task.cancel()
        if tasks:
            _, left = await asyncio.wait(tasks, timeout=_LONGEST_CANCEL_S)
            if left:
                logger.warning("%d calls did not end when they were cancelled", len(left))

    def _tasks(self) -> list[asyncio.Task[None]]:
        return [task for _, task in self._works.values()]

    # For the intake.

    def running_casts(self) -> list[bytes]:
        """Return the entries of the casts that run."""
        works = self._works.values()
        return [work.entry for work, _ in works if work.envelope.kind is Kind.CAST]

    def begin(self, works: Iterable[Work]) -> None:
        """Run calls."""
        for work in works:
            task = self._loop.create_task(self._runner.run(work))
            self._works[work.entry] = (work, task)
            timer = None
            if work.envelope.kind is not Kind.CAST:
                self._calls.setdefault(work.envelope.id, task)  # it may be sent again
                timer = self._loop.call_later(work.left_s, task.cancel)
            # Not in the task: one that is cancelled at once never runs.
            task.add_done_callback(functools.partial(self._ended, work, timer))

    def _broke(self, so_that: str, task: asyncio.Task[None]) -> None:
        """Tell of a task of the server that ended by a fault of ours."""
        if not task.cancelled() and task.exception() is not None:
            logger.error("%s %s", self._node, so_that, exc_info=task.exception())

    def _ended(
        self, work: Work, timer: asyncio.TimerHandle | None, task: asyncio.Task[None]
    ) -> None:
        self._works.pop(work.entry, None)
        if self._calls.get(work.envelope.id) is task:
            del self._calls[work.envelope.id]
        if timer is not None:
            timer.cancel()
        work.place.leave()
        if not task.cancelled() and task.exception() is not None:
            logger.error("a call raised what is not its caller's", exc_info=task.exception())

    # Callers who do not wait any more.

    def _hear(self) -> None:
        inbox = self._cancellations
        if inbox is None:
            return
        try:
            while (message := inbox.take()) is not None:
                self._cancel(message[1])
        except StoreError as error:
            logger.warning("%s does not hear which calls are cancelled: %s", self._node, error)

    def _cancel(self, message: bytes) -> None:
        try:
            ids = read_cancellation(self._secret, self._node, message)
        except Refused as refused:
            logger.warning("%s: a cancellation is refused: %s", self._node, refused)
            return
        for task in filter(None, map(self._calls.get, ids)):
            task.cancel()

    def _stop_hearing(self) -> None:
        inbox, self._cancellations = self._cancellations, None
        if inbox is not None:
            self._loop.remove_reader(inbox.fileno())
            inbox.close()

    async def _watch(self) -> None:
        """Say again who this is, and cancel the calls of processes that read no answers."""
        missed: set[bytes] = set()
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            inboxes = {work.envelope.inbox for work, _ in self._works.values()} - {b""}
            try:
                await self.announce()  # one that lost the name to us may have said it was here
                missing = await self._backend.alink.run(_missing(sorted(inboxes)))
            except StoreError:
                missed = set()
                continue
            gone = missed & missing  # twice: the server may have lost its data just now
            for work, task in list(self._works.values()):
                if work.envelope.inbox in gone:
                    task.cancel()
            missed = missing

    # What is written of the node.

    async def announce(self) -> None:
        """Write what the node says of itself.

        Raises:
            StoreUnavailable: the server cannot be reached.
        """
        await self._backend.alink.run(self._announcement())

    def _announcement(self) -> Steps[None]:
        peer = codec.encode(dict(self._handler.greet({})))
        fields = (b"peer", peer, b"signs", b"%d" % bool(self._secret))
        words = (b"HSET", self._keys.node, *fields, b"most", b"%d" % self._most_waiting)
        yield from ask(Command(words, self._keys.bucket), repeatable=True)

    async def _refuse_waiting(self) -> None:
        """Take those calls out of the stream that came since the last time; tell their callers."""
        limit = (b"+", b"COUNT", b"%d" % self._most_waiting)
        words = (b"XRANGE", self._keys.calls, self._refuse_from, *limit)
        [entries] = await self._backend.alink.run(
            ask(Command(words, self._keys.bucket), repeatable=True)
        )
        waiting = []
        for entry, fields in entries:
            self._refuse_from = b"(" + entry
            known = fields_of(fields)
            try:  # what nobody signed gets no answer that we sign
                envelope = open_head(
                    self._secret, known.get(b"h", b""), known.get(b"s", b""), self._node
                )
            except Refused:
                continue
            if envelope.kind is not Kind.CAST and envelope.id not in self._calls:  # sent again
                waiting.append((entry, envelope))
        commands = [
            call(scripts.CANCEL, self._keys.bucket, (self._keys.calls,), GROUP, entry)
            for entry, _ in waiting
        ]
        if not commands:
            return
        replies: list[Any] = await self._backend.alink.run(ask_independently(commands))
        for (_, envelope), reply in zip(waiting, replies, strict=True):
            if reply == 1:
                await self._runner.refuse(envelope.id, envelope.inbox)

    def forget_after_fork(self) -> None:
        """In a forked child: it serves in the parent only."""
        if self._intake is not None:
            self._intake.forget_after_fork()
        self._writer.forget_after_fork()


def _missing(inboxes: Sequence[bytes]) -> Steps[set[bytes]]:
    """Return which processes do not read their answers."""
    if not inboxes:
        return set()
    keys = [InboxKeys(inbox) for inbox in inboxes]
    commands = [Command((b"EXISTS", one.alive), one.bucket) for one in keys]
    replies = yield from ask_independently(commands)
    return {inbox for inbox, reply in zip(inboxes, replies, strict=True) if reply == 0}


_servers: weakref.WeakSet[RedisServer] = weakref.WeakSet()  # to be told of a fork


def _forget_after_fork() -> None:
    for server in list(_servers):
        server.forget_after_fork()


os.register_at_fork(after_in_child=_forget_after_fork)
