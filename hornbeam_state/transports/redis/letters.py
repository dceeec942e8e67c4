"""Dead letters: what a node was sent and never ran to its end. Looked at, and repeated."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from hornbeam_state.backends.redis.batches import Command, ask, call
from hornbeam_state.transports.redis import scripts
from hornbeam_state.transports.redis.envelope import (
    Envelope,
    Kind,
    Refused,
    fields_of,
    open_head,
    sign_head,
)
from hornbeam_state.transports.redis.keys import NodeKeys
from hornbeam_state.transports.redis.outgoing import KEEP_MS

if TYPE_CHECKING:
    from collections.abc import Collection

    from hornbeam_state.backends.redis.batches import Steps


class Letter(NamedTuple):
    """A dead letter.

    Attributes:
        id: What names it.
        reason: Why it is one.
        envelope: What was asked; None: that cannot be read, or is not signed as it has to be.
        body: The values, unless they lie beside the stream.
    """

    id: bytes
    reason: bytes
    envelope: Envelope | None
    body: bytes

    @property
    def function(self) -> str | None:
        """What was called: ``"target.method"``; None: that cannot be read."""
        envelope = self.envelope
        return None if envelope is None else f"{envelope.target}.{envelope.method}"

    @property
    def is_cast(self) -> bool:
        """Whether it is a cast, which can be repeated: nobody waits for a call any more."""
        return self.envelope is not None and self.envelope.kind is Kind.CAST


class DeadLetters:
    """The dead letters of a node.

    Args:
        node: Its name.
        secret: What messages are signed with.
    """

    def __init__(self, node: str, secret: bytes | None) -> None:
        self._node = node
        self._keys = NodeKeys(node)
        self._secret = secret

    def all(self) -> Steps[list[Letter]]:
        """Return them, the oldest first."""
        words = (b"XRANGE", self._keys.dead, b"-", b"+")
        [entries] = yield from ask(Command(words, self._keys.bucket), repeatable=True)
        return [self._letter(entry, fields) for entry, fields in entries]

    def drop(self, ids: Collection[bytes]) -> Steps[int]:
        """Drop some; return how many there were."""
        if not ids:
            return 0
        words = (b"XDEL", self._keys.dead, *ids)
        [count] = yield from ask(Command(words, self._keys.bucket), repeatable=True)
        return int(count)

    def repeat(self, ids: Collection[bytes] | None) -> Steps[int]:
        """Have casts wait for their node again; return how many do.

        Args:
            ids: Which letters; None: all. Those that are no casts stay.
        """
        count = 0
        for letter in (yield from self.all()):
            if letter.envelope is not None and letter.is_cast and (ids is None or letter.id in ids):
                count += yield from self._repeat(letter, letter.envelope)
        return count

    def _repeat(self, letter: Letter, envelope: Envelope) -> Steps[int]:
        keys = self._keys
        head, signature = envelope.head(), b""
        if self._secret is not None:
            [(seconds, microseconds)] = yield from ask(
                Command((b"TIME",), keys.bucket), repeatable=True
            )
            now = int(seconds) * 1000 + int(microseconds) // 1000
            head = replace(envelope, sent=now).head()
            signature = sign_head(self._secret, head)
        # A second time it finds the letter gone: one whose answer was lost is not counted.
        script = call(
            scripts.REPEAT,
            keys.bucket,
            (keys.calls, keys.dead, keys.once(envelope.id)),
            *(letter.id, b"%d" % envelope.life_ms, b"%d" % KEEP_MS),
            *(b"h", head, b"b", letter.body, b"s", signature),
        )
        [repeated] = yield from ask(script, repeatable=True)
        return int(repeated)

    def _letter(self, entry: bytes, words: list[Any]) -> Letter:
        fields = fields_of(words)
        return Letter(
            entry, fields.get(b"reason", b""), self._envelope(fields), fields.get(b"b", b"")
        )

    def _envelope(self, fields: dict[bytes, bytes]) -> Envelope | None:
        head = fields.get(b"h", b"")
        try:
            return open_head(self._secret, head, fields.get(b"s", b""), self._node)
        except Refused:
            return None
