"""A call on its way to a node: what is sent for it, and what the replies mean. No sockets here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hornbeam_state.backends.redis.batches import Command, ask, call
from hornbeam_state.errors import CodecError, Overloaded
from hornbeam_state.transports.redis import scripts
from hornbeam_state.transports.redis.bodies import Body
from hornbeam_state.transports.redis.envelope import (
    LONGEST_MS,
    SKEW_MS,
    Envelope,
    Kind,
    digest_of,
    life_ms,
    sign_head,
)
from hornbeam_state.transports.redis.keys import GROUP

if TYPE_CHECKING:
    from collections.abc import Callable

    from hornbeam_state.backends.redis.batches import Steps
    from hornbeam_state.transports.base import Request
    from hornbeam_state.transports.redis.pending import Route

MOST_WAITING: Final = 1024
"""How many calls may wait for a node that says nothing else."""

INLINE_BYTES: Final = 2**18
"""Values up to this size travel in the entry."""

PIECE_BYTES: Final = 2**20
_PIECES_AT_ONCE: Final = 8
_GRACE_MS: Final = 60_000
KEEP_MS: Final = 7 * LONGEST_MS
"""How long a stream of calls is kept after the last of them."""


class Outgoing:
    """A call, encoded.

    Args:
        kind: A call, a stream or a cast.
        id: What no other message has; several casts may, of which one is done.
        inbox: Which process waits for the answer.
        request: What is asked.
        route: Which node it is for.
        place: What no other message has at all.

    Raises:
        CodecError: an argument cannot be encoded, or all of them are too large.

    Attributes:
        size: Bytes of the values.
    """

    def __init__(
        self, kind: Kind, id: bytes, inbox: bytes, request: Request, route: Route, *, place: bytes
    ) -> None:
        self._body = Body(request.values)
        self.size = self._body.size
        if self.size > route.most_bytes:
            raise CodecError(
                f"a call of {self.size} bytes: {route.most_bytes} are the most here (most_bytes)"
            )
        self._keys = route.keys
        self._secret = route.secret
        self._digest = digest_of(self._body.buffers) if route.secret else b""
        self._pieces = 0 if self.size <= INLINE_BYTES else -(-self.size // PIECE_BYTES)
        self._inline = b"" if self._pieces else self._body.joined()
        self._place = place if self._pieces else b""
        self._kind, self._id, self._node, self._inbox = kind, id, route.node, inbox
        self._request = request
        self._life = b"%d" % life_ms(request.timeout)
        self._head = self._make_head(0)
        if len(self._head) > INLINE_BYTES:
            raise CodecError(
                f"options of {len(self._head)} bytes: {INLINE_BYTES} are the most, values may be "
                f"larger"
            )

    @property
    def is_inline(self) -> bool:
        """Whether its values travel in the entry: nothing has to be uploaded."""
        return not self._pieces

    def upload(self) -> Steps[None]:
        """Put large values where the node will look for them."""
        if not self._pieces:
            return
        expiry = b"%d" % (int(self._life) + _GRACE_MS)
        commands = []
        names = self._keys.parts(self._place, self._pieces)
        for name, piece in zip(names, self._body.pieces(PIECE_BYTES), strict=True):
            words: Any = (b"SET", name, piece, b"PX", expiry)
            commands.append(Command(words, self._keys.bucket))
            if len(commands) == _PIECES_AT_ONCE:
                yield from ask(*commands, repeatable=True)
                commands = []
        if commands:
            yield from ask(*commands, repeatable=True)

    def take_back(self) -> Command | None:
        """Return what removes large values again."""
        if not self._pieces:
            return None
        names = self._keys.parts(self._place, self._pieces)
        return Command((b"UNLINK", *names), self._keys.bucket)

    def add(self, now: Callable[[], int]) -> Command:
        """Return what adds it to the calls that wait.

        Args:
            now: Returns the time in milliseconds, by the server's clock, as far as is known.
        """
        keys, sent, signature = self._keys, b"", b""
        names = [keys.calls, keys.node]
        if self._kind is Kind.CAST:
            names.append(keys.once(self._id))
        head = self._head
        if self._secret:
            time = now()
            head, sent = self._make_head(time), b"%d" % time
            signature = sign_head(self._secret, head)
        return call(
            scripts.ADD,
            keys.bucket,
            names,
            *(GROUP, self._life, sent, b"%d" % SKEW_MS, b"%d" % MOST_WAITING, b"%d" % KEEP_MS),
            *(b"h", head, b"b", self._inline, b"s", signature),
        )

    def _make_head(self, sent: int) -> bytes:
        request = self._request
        return Envelope(
            kind=self._kind,
            id=self._id,
            node=self._node,
            inbox=self._inbox,
            target=request.target,
            method=request.method,
            options=request.options,
            timeout=request.timeout,
            sent=sent,
            size=self.size,
            pieces=self._pieces,
            place=self._place,
            digest=self._digest,
        ).head()


def full(node: str, waiting: int) -> Overloaded:
    """Return what a caller gets when too many calls wait."""
    return Overloaded.refusal(f"{waiting} calls wait for {node} already")
