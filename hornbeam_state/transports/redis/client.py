"""What all channels of a process to one store share: an inbox, and two threads."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import threading
from typing import TYPE_CHECKING, Any, Final

from hornbeam_state.backends.redis.batches import Command, ask
from hornbeam_state.errors import CodecError, NodeDown, StoreError
from hornbeam_state.transports.redis.adding import AGAIN
from hornbeam_state.transports.redis.envelope import Refused, check_answer, read_answer
from hornbeam_state.transports.redis.inbox import InboxReader
from hornbeam_state.transports.redis.keys import InboxKeys
from hornbeam_state.transports.redis.pending import Clock, Pending, Table
from hornbeam_state.transports.redis.sender import Sender
from hornbeam_state.transports.waiting import ThreadWaker
from hornbeam_state.waking import wake

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hornbeam_state.backends.redis.backend import RedisBackend
    from hornbeam_state.backends.redis.batches import Steps
    from hornbeam_state.transports.redis.outgoing import Outgoing
    from hornbeam_state.transports.redis.pending import Route
    from hornbeam_state.transports.waiting import Waker

logger = logging.getLogger("hornbeam.transport")

_HALF: Final = 8


class Client:
    """This process, as nodes see it.

    Args:
        backend: The store.
    """

    def __init__(self, backend: RedisBackend) -> None:
        self.backend = backend
        self.id = os.urandom(2 * _HALF)
        self.table = Table()
        self.clock = Clock()
        self.lost = False
        self._keys = InboxKeys(self.id)
        self._numbers = itertools.count(1)
        # The inbox and the calls of a Cluster are on several servers.
        self._is_one_server = not backend.config.scheme.endswith("+cluster")
        timeout = backend.config.timeout
        self.sender = Sender(backend, self.table, self.clock, self._lose)
        self.reader = InboxReader(
            backend.link,
            self._keys,
            timeout,
            waiting=self.table.calls,
            take=self._receive,
            lose=self._lose,
        )

    def start(self) -> None:
        """Start the threads."""
        self.sender.start()
        self.reader.start()

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller runs on one of the threads, and must not wait for it."""
        return self.sender.is_own_thread or self.reader.is_own_thread

    def new_call(self, deadline: float, waker: Waker, route: Route) -> Pending:
        """Return a call that is in no table yet."""
        number = next(self._numbers)
        id_ = self.id[:_HALF] + number.to_bytes(_HALF)
        return Pending(number, id_, deadline, waker, route)

    def close(self) -> None:
        """End the threads; nobody waits any more."""
        self.lost = True
        self.sender.close()
        self.reader.close()
        self._fail_all(NodeDown("the channel was closed"))
        words = (b"UNLINK", self._keys.inbox, self._keys.alive)
        with contextlib.suppress(StoreError):  # both expire
            self.backend.link.run(_quietly(Command(words, self._keys.bucket)))

    def forget_after_fork(self) -> None:
        """In a forked child: fail whoever waits; the inbox is the parent's."""
        self.lost = True
        self.sender.forget_after_fork()
        self.reader.forget_after_fork()
        for call in list(self.table.calls.values()):
            error = NodeDown("the call was made by the parent of this process")
            call.fail(error)
            call.waker.fail_after_fork(error)
        self.table.calls.clear()

    def _lose(self, error: BaseException) -> None:
        """After a fault of ours: fail whoever waits."""
        self.lost = True
        self._fail_all(NodeDown(f"calls ended by an internal error: {type(error).__name__}"))

    def _fail_all(self, error: NodeDown) -> None:
        failed = [call for call in list(self.table.calls.values()) if self.table.take(call)]
        for call in failed:
            call.fail(error)
        wake(failed)

    def carry(self, call: Pending, waker: ThreadWaker) -> None:
        """Send a call on the thread of its caller, and read there until it is done.

        Returns before that when another thread reads: then wait to be woken.

        Raises:
            NodeDown: the server cannot be reached; `sent` says whether it may have the call.
            Overloaded: too many calls wait for the node.
        """
        message: Outgoing | None = call.message
        # Large values are uploaded where it is certain that the call follows: not twice.
        if self._is_one_server and message is not None and message.is_inline:
            add = self.sender.adder.prepare(call)
            added = functools.partial(self._added, call)
            if add is None or self.reader.add_and_read(call, waker, add, added):
                return
        self.sender.add(call)
        self.reader.read_for(call, waker)

    # On the thread that reads the inbox.

    def _added(self, call: Pending, reply: Any) -> None:
        error = self.sender.adder.added(call, reply)
        if error is AGAIN:
            self.sender.add_soon(call)
        elif error is not None and self.table.take(call):
            call.fail(error)
            wake([call])

    def _receive(self, entries: Iterable[dict[bytes, bytes]], reading: Pending | None) -> bool:
        """Give answers to their calls; return whether callers were told who cannot read.

        Args:
            entries: What is in them.
            reading: The call whose caller runs this, and needs no waking.
        """
        woken: list[Pending] = []
        try:
            for fields in entries:
                call = self._take(fields)
                if (
                    call is not None
                    and call is not reading
                    and (not woken or woken[-1] is not call)
                ):
                    woken.append(call)
        finally:
            if reading is not None:
                # Callbacks may take long, and may wait for other calls.
                self.sender.wake_soon([call for call in woken if call.waker.calls_back])
                woken = [call for call in woken if not call.waker.calls_back]
            wake(woken)
        return any(not isinstance(call.waker, ThreadWaker) for call in woken)

    def _take(self, fields: dict[bytes, bytes]) -> Pending | None:
        """Give an answer to its call; return the call if its waiter has something to see."""
        data = fields.get(b"m", b"")
        try:
            answer = read_answer(data)
            call = self._call_of(answer.id)
            if call is None:
                return None  # nobody waits any more
            if call.route.secret is not None:
                check_answer(call.route.secret, self.id, data, fields.get(b"s", b""))
        except Refused as refused:
            logger.warning("an answer is refused: %s", refused)
            return None
        try:
            seen = call.take(answer)
        except BaseException as error:  # noqa: BLE001 - it is the caller's: nobody else ends it
            if self.table.take(call):
                call.fail(CodecError(str(error)) if isinstance(error, Refused) else error)
                self.sender.end_soon(call)
            return call
        if call.done:
            self.table.take(call)
        return call if seen else None

    def _call_of(self, id: bytes) -> Pending | None:
        if id[:_HALF] != self.id[:_HALF]:
            return None
        return self.table.get(int.from_bytes(id[_HALF:]))


def _quietly(command: Command) -> Steps[Any]:
    return (yield from ask(command, repeatable=True))


class Clients:
    """The clients of this process, one for each store that it calls nodes through."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clients: dict[int, tuple[Client, set[int]]] = {}

    def join(self, backend: RedisBackend, channel: object) -> Client:
        """Return the client of a store, for a channel."""
        with self._lock:
            client, channels = self._clients.get(id(backend), (None, set()))
            if client is None or client.lost:
                client, channels = Client(backend), set()
                client.start()
                self._clients[id(backend)] = (client, channels)
            channels.add(id(channel))
            return client

    def leave(self, client: Client, channel: object) -> None:
        """Close the client of a store with its last channel. Doing it again does nothing."""
        with self._lock:
            known, channels = self._clients.get(id(client.backend), (None, set()))
            if known is not client:
                return
            channels.discard(id(channel))
            if channels:
                return
            del self._clients[id(client.backend)]
        client.close()

    def after_fork(self) -> None:
        """In a forked child: begin anew."""
        clients, self._clients, self._lock = self._clients, {}, threading.Lock()
        for client, _ in clients.values():
            client.forget_after_fork()


CLIENTS: Final = Clients()
os.register_at_fork(after_in_child=CLIENTS.after_fork)
