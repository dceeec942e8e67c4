"""What one connection was asked to subscribe to, and what its replies mean. No sockets here.

The server answers in order and delivers messages between its answers. So an answer tells exactly
which messages were published before it took effect, and which after.
"""

from __future__ import annotations

import contextlib
from collections import deque
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from redis.exceptions import InvalidResponse, ResponseError

from hornbeam_state.backends.redis.replies import Replies, command

if TYPE_CHECKING:
    from collections.abc import Callable

    from hornbeam_state.backends.base import Topics
    from hornbeam_state.backends.redis.channels import Channels, Naming
    from hornbeam_state.backends.redis.inbox import RedisInbox

_BEGINS: Final = {b"subscribe": b"message", b"psubscribe": b"pmessage"}
_ENDS: Final = {b"unsubscribe": b"message", b"punsubscribe": b"pmessage"}


def _nobody() -> None:
    return None


@dataclass(eq=False, slots=True)
class Member:
    """A subscription, as those see it who bring its messages.

    Attributes:
        topics: What it asks for.
        channels: The same, as the server knows it.
        inbox: Returns where the messages go, or None when that was dropped.
        begun: Done when the server has acknowledged it for the first time.
        unanswered: How many commands of it the present connection has not acknowledged.
    """

    topics: Topics
    channels: Channels
    inbox: Callable[[], RedisInbox | None] = _nobody
    begun: Future[None] = field(default_factory=Future)
    unanswered: int = 0

    @property
    def has_begun(self) -> bool:
        """Whether it was acknowledged once, so that from then on nothing should be missing."""
        return self.begun.done() and not self.begun.cancelled() and self.begun.exception() is None


@dataclass(slots=True)
class _Asked:
    """A command that was sent.

    Attributes:
        kind: What its answers are called.
        left: How many of them are still to come.
        at: When it was sent.
        member: Who subscribes or unsubscribes; None for a PING.
        done: Done with the last answer.
    """

    kind: bytes
    left: int
    at: float
    member: Member | None = None
    done: Future[None] | None = None


class Session:
    """The subscriptions of one connection, from its opening to its loss.

    Args:
        naming: How channels are named.
        now: The time, by the monotonic clock here as in all methods.

    Attributes:
        output: What is to be sent.
        heard: When the server was last heard of.
    """

    def __init__(self, naming: Naming, now: float) -> None:
        self._naming = naming
        self._replies = Replies()
        self._asked: deque[_Asked] = deque()
        self._routes: dict[tuple[bytes, bytes], Member] = {}
        self._fresh: list[RedisInbox] = []  # inboxes that were empty
        self.heard = now
        self.output = bytearray()

    @property
    def silent_since(self) -> float | None:
        """Since when the server has not been heard though it has something to answer, or None."""
        return max(self.heard, self._asked[0].at) if self._asked else None

    def subscribe(self, member: Member, now: float) -> None:
        """Ask for the messages of a member."""
        names, patterns = member.channels
        member.unanswered = bool(names) + bool(patterns)
        self._ask(_Asked(b"subscribe", len(names), now, member), names)
        self._ask(_Asked(b"psubscribe", len(patterns), now, member), patterns)

    def unsubscribe(self, member: Member, now: float, done: Future[None] | None) -> None:
        """Ask for them no more; `done` is done when none can come any more."""
        names, patterns = member.channels
        last = done if not patterns else None
        self._ask(_Asked(b"unsubscribe", len(names), now, member, last), names)
        self._ask(_Asked(b"punsubscribe", len(patterns), now, member, done), patterns)

    def ping(self, now: float) -> None:
        """Ask for a sign of life."""
        self.output += command(b"PING")
        self._asked.append(_Asked(b"pong", 1, now))

    def received(self, data: bytes, now: float) -> list[tuple[Member, ResponseError]]:
        """Deliver what arrived; return whom the server refuses to subscribe, and why.

        Raises:
            InvalidResponse: this is no answer to what was asked.
        """
        if not data:
            return []
        self.heard = now
        try:
            return self._read(self._replies.feed(data))
        finally:
            for inbox in self._fresh:
                inbox.announce()
            self._fresh.clear()

    def end(self) -> None:
        """Let nobody wait for an answer that cannot come any more."""
        for asked in self._asked:
            settle(asked.done)

    def _read(self, replies: list[Any]) -> list[tuple[Member, ResponseError]]:
        refusals = []
        for reply in replies:
            match reply:
                case [b"message", bytes(channel), bytes(payload)]:
                    self._deliver((b"message", channel), channel, payload)
                case [b"pmessage", bytes(pattern), bytes(channel), bytes(payload)]:
                    self._deliver((b"pmessage", pattern), channel, payload)
                case [bytes(kind), bytes(channel), int()]:
                    self._took_effect(kind, channel)
                case b"PONG" | [b"pong", b""]:  # the second one while there are subscriptions
                    self._answered(b"pong")
                case ResponseError():
                    refusals += self._refused(reply)
                case _:
                    raise InvalidResponse("Protocol Error: not a reply of Pub/Sub")
        return refusals

    def _ask(self, asked: _Asked, channels: tuple[bytes, ...]) -> None:
        if channels:
            self.output += command(asked.kind.upper(), *channels)
            self._asked.append(asked)

    def _deliver(self, route: tuple[bytes, bytes], channel: bytes, payload: bytes) -> None:
        member = self._routes.get(route)
        inbox = None if member is None else member.inbox()
        if inbox is not None and inbox.put(self._naming.topic(channel), payload):
            self._fresh.append(inbox)

    def _took_effect(self, kind: bytes, channel: bytes) -> None:
        """Take note of a change to one channel, from which on its messages go elsewhere."""
        member = self._answered(kind)
        if kind in _ENDS:
            self._routes.pop((_ENDS[kind], channel), None)
        elif member is not None:
            self._routes[_BEGINS[kind], channel] = member

    def _answered(self, kind: bytes) -> Member | None:
        """Cross one answer off; there is one for each channel. Return whom it is about."""
        if not self._asked or self._asked[0].kind != kind:
            raise InvalidResponse("Protocol Error: a reply to nothing that was asked")
        asked = self._asked[0]
        asked.left -= 1
        if not asked.left:
            self._asked.popleft()
            settle(asked.done)
            if asked.member is not None and kind in _BEGINS:
                asked.member.unanswered -= 1
                if not asked.member.unanswered:
                    settle(asked.member.begun)
        return asked.member

    def _refused(self, error: ResponseError) -> list[tuple[Member, ResponseError]]:
        if not self._asked:
            raise InvalidResponse(f"Protocol Error: an error out of turn: {error}")
        asked = self._asked.popleft()
        settle(asked.done)
        return [(asked.member, error)] if asked.member and asked.kind in _BEGINS else []


def settle(future: Future[None] | None, error: Exception | None = None) -> None:
    """Have whoever waits for it go on, if anybody still does."""
    if future is not None:
        with contextlib.suppress(InvalidStateError):  # cancelled, or done already
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)
