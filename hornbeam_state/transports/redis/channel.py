"""The client: a channel to a node, for all threads and event loops."""

from __future__ import annotations

import asyncio
import hashlib
import time
from math import inf
from typing import TYPE_CHECKING, Any, Final, cast

from hornbeam_state import codec
from hornbeam_state.backends.redis.batches import Command, ask
from hornbeam_state.errors import ConfigError, DeadlineExceeded, NodeDown, Overloaded
from hornbeam_state.transports.calling import Calling
from hornbeam_state.transports.opening import open_in_thread
from hornbeam_state.transports.redis.client import CLIENTS
from hornbeam_state.transports.redis.envelope import ID_BYTES, Kind, secret_from
from hornbeam_state.transports.redis.keys import NodeKeys
from hornbeam_state.transports.redis.outgoing import Outgoing
from hornbeam_state.transports.waiting import ThreadWaker

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hornbeam_state.backends.redis.backend import RedisBackend
    from hornbeam_state.backends.redis.batches import Steps
    from hornbeam_state.transports.base import Request
    from hornbeam_state.transports.redis.client import Client
    from hornbeam_state.transports.redis.pending import Pending
    from hornbeam_state.transports.waiting import Call, Waker

MOST_BYTES: Final = 2**30
MOST_PENDING: Final = 4096
_MOST_QUEUED: Final = 2**26
_END_WAIT_S: Final = 2.0


def connect(
    backend: RedisBackend,
    node: str,
    *,
    secret: str | bytes | None = None,
    most_pending: int = MOST_PENDING,
    most_bytes: int = MOST_BYTES,
) -> RedisChannel:
    """Return a channel to a node; blocks for a round trip.

    It does not ask whether the node is there: calls to one that is not wait until their deadline.

    Args:
        backend: The store that the node serves through.
        node: Its name.
        secret: What messages are signed with; None: ``HORNBEAM_SECRET``, if that is set.
        most_pending: How many calls may wait for their answers.
        most_bytes: The largest call, and the largest answer.

    Raises:
        StoreUnavailable: the server cannot be reached.
        ConfigError: the node signs and this process does not, or the other way round.
    """
    own_secret = secret_from(secret)
    keys = NodeKeys(node)
    seconds, microseconds, peer, signs = backend.link.run(_greeting(keys))
    if signs is not None and bool(int(signs)) is not (own_secret is not None):
        who, other = ("the node", "this process") if int(signs) else ("this process", "the node")
        raise ConfigError(
            f"{who} signs its messages, and {other} does not: set the same HORNBEAM_SECRET on both"
        )
    return RedisChannel(
        backend,
        node,
        keys,
        peer={} if peer is None else codec.decode(peer),
        now_ms=seconds * 1000 + microseconds // 1000,
        secret=own_secret,
        most_pending=most_pending,
        most_bytes=most_bytes,
    )


async def aconnect(backend: RedisBackend, node: str, **options: Any) -> RedisChannel:
    """Awaitable twin of `connect`, with the same options."""
    return await open_in_thread(lambda: connect(backend, node, **options), RedisChannel.close)


def _greeting(keys: NodeKeys) -> Steps[tuple[int, int, bytes | None, bytes | None]]:
    """Return the server's time, and what the node says of itself."""
    time_, (peer, signs) = yield from ask(
        Command((b"TIME",), keys.bucket),
        Command((b"HMGET", keys.node, b"peer", b"signs"), keys.bucket),
        repeatable=True,
    )
    return int(time_[0]), int(time_[1]), peer, signs


class RedisChannel(Calling):
    """A `Channel` to a node over Redis; `connect` makes one.

    A call that the node has not begun can be cancelled for certain: `NodeDown.sent` and
    `DeadlineExceeded.sent` are False for it, and it never runs. What the server may have got, and
    did not say, is reported as sent.

    Futures and callbacks are finished on a thread of the channel: what they call must not block.

    Attributes:
        waiting: The calls that have no answer yet.
        node: The name of the node.
        keys: Where its things lie.
        secret: What messages are signed with.
        most_bytes: The largest call, and the largest answer.
    """

    def __init__(
        self,
        backend: RedisBackend,
        node: str,
        keys: NodeKeys,
        *,
        peer: Mapping[str, Any],
        now_ms: int,
        secret: bytes | None,
        most_pending: int,
        most_bytes: int,
    ) -> None:
        self.peer = peer
        self.waiting: dict[int, Pending] = {}
        self.node = node
        self.keys = keys
        self.secret = secret
        self.most_bytes = most_bytes
        self._most_pending = most_pending
        self._why_lost: str | None = None
        self._client: Client = CLIENTS.join(backend, self)
        self._client.clock.set(now_ms)
        self._calls = self._client.table

    @property
    def connected(self) -> bool:
        """Whether calls can be made: it was not closed, and the node not given up."""
        return self._why_lost is None and not self._client.lost

    @property
    def pending(self) -> int:
        """How many calls have no answer yet."""
        return len(self.waiting)

    def cast(self, request: Request, *, key: str | None = None) -> None:
        """Have the node do something, at least once; return when the server has taken it down.

        It is done even if the node is away for a while, within a day or `timeout`. What fails is
        tried again some times, and then kept as a dead letter.

        Args:
            request: What is asked. What comes of it is dropped.
            key: Of several casts to a node with one key, within a day, one is done.

        Raises:
            NodeDown: the server cannot be reached; `sent` says whether it may be done.
            Overloaded: too much waits for the node.
            CodecError: an argument cannot be sent.
        """
        call = self._new(Kind.CAST, request, ThreadWaker(), key=key)
        self._client.sender.add(call)

    async def acast(self, request: Request, *, key: str | None = None) -> None:
        """Awaitable twin of `cast`, in a thread."""
        await asyncio.to_thread(self.cast, request, key=key)

    def fail(self, reason: str) -> None:
        """Give the node up: whoever waits gets `NodeDown`, and so does every later call.

        Blocks until it is known which calls the node had not begun, for two seconds at most.
        """
        self._why_lost = self._why_lost or reason
        self._end_all(list(self.waiting.values()))

    def close(self) -> None:
        """Close the channel; whoever waits gets `NodeDown`. Closing again does nothing."""
        self.fail("the channel was closed")
        CLIENTS.leave(self._client, self)

    # Ends of calls.

    def begin(
        self, request: Request, waker: Waker, *, streams: bool = False, blocks: bool = False
    ) -> Call:
        """Send a call; see `Calling`. One that is waited for in `call` is sent there."""
        client = self._client
        if blocks and client.is_own_thread:
            raise RuntimeError("a callback of the channel may not wait for the channel")
        call = self._new(Kind.STREAM if streams else Kind.CALL, request, waker)
        if self.pending >= self._most_pending:
            raise Overloaded.refusal(f"{self._most_pending} calls wait for their answers")
        if not blocks and client.sender.queued > _MOST_QUEUED:
            raise Overloaded.refusal(f"{client.sender.queued} bytes wait to be sent")
        client.table.add(call)
        if client.lost:  # nobody may look at the table any more
            client.table.take(call)
            raise self._node_down(sent=False)
        if streams or not blocks:
            client.reader.need()
        if not blocks:
            client.sender.add_soon(call)
        elif streams:
            try:
                client.sender.add(call)
            except BaseException:
                self.abandon(call)
                raise
        return call

    def wait(self, call: Call, waker: ThreadWaker) -> bool:
        """Block until woken, or until the deadline; the caller may read its answer itself."""
        pending = cast("Pending", call)
        if pending.message is not None and not pending.tried:
            self._client.carry(pending, waker)
        else:
            self._client.reader.read_for(pending, waker)
        return call.done or super().wait(call, waker)

    def expire(self, call: Call) -> None:
        """End a call whose deadline passed: soon, when it is known whether it was begun."""
        call.deadline = inf
        self._client.sender.expire(cast("Pending", call))

    def abandon(self, call: Call) -> None:
        """Cancel a call, unless it is done."""
        pending = cast("Pending", call)
        if self._calls.take(pending):
            call.finish([])
            self._client.sender.end_soon(pending)

    def forget(self, call: Call) -> None:
        """Cancel a call soon. Takes no lock: a finalizer may call it."""
        if not call.done:
            self._client.sender.end_soon(cast("Pending", call), _dropped)

    def note_deadline(self, call: Call) -> None:
        """See to it that the call ends in time, whoever waits for it."""
        if call.deadline != inf:
            self._client.sender.note_deadline(cast("Pending", call))

    def _new(
        self, kind: Kind, request: Request, waker: Waker, *, key: str | None = None
    ) -> Pending:
        if not self.connected:
            raise self._node_down(sent=False)
        if request.timeout <= 0:
            late = DeadlineExceeded("the deadline passed before the call was made")
            late.sent = False
            raise late
        call = self._client.new_call(time.monotonic() + request.timeout, waker, self)
        id_ = call.id
        if key is not None:
            id_ = hashlib.blake2b(key.encode(), digest_size=ID_BYTES).digest()
        inbox = b"" if kind is Kind.CAST else self._client.id
        call.message = Outgoing(kind, id_, inbox, request, self, place=call.id)
        return call

    def _node_down(self, *, sent: bool) -> NodeDown:
        error = NodeDown(self._why_lost or "calls were made by the parent of this process")
        error.sent = sent
        return error

    def _end_all(self, calls: list[Pending]) -> None:
        if not calls:
            return
        self._client.sender.end_all_soon(calls, lambda sent: self._node_down(sent=sent))
        deadline = time.monotonic() + _END_WAIT_S
        while not self._client.is_own_thread and time.monotonic() < deadline:
            if all(call.done for call in calls):
                return
            time.sleep(0.001)


def _dropped(sent: bool) -> NodeDown:  # noqa: FBT001 - the one argument of every such function
    error = NodeDown("nobody listens any more")
    error.sent = sent
    return error
