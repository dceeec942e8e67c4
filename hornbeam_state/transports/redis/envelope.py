"""What is in an entry of a stream: a call on its way to a node, an answer on its way back. Pure.

A call is a head, which says what is asked and describes the values, and the values. With a secret
the head is signed, and holds a digest of the values. An answer is signed whole, together with the
inbox that it is for: it answers one call of one process.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from dataclasses import dataclass
from enum import IntEnum
from math import inf
from typing import TYPE_CHECKING, Any, Final

from hornbeam_state import codec
from hornbeam_state.errors import CodecError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

PROTOCOL: Final = 1
LONGEST_MS: Final = 86_400_000
"""A message that nobody took for so long is not run any more: a day."""

SKEW_MS: Final = 5_000
"""How far a caller may be wrong about the server's clock, which it learns from its answers."""

ID_BYTES: Final = 16
_SHORTEST_SECRET: Final = 16
_CALL: Final = b"hornbeam call\0"
_ANSWER: Final = b"hornbeam answer\0"
_CANCEL: Final = b"hornbeam cancel\0"
_PREFIX: Final = b"hb" + bytes((PROTOCOL, codec.VERSION))
_HEADER: Final = struct.Struct(f"<4sB3xI{ID_BYTES}sQQ")


class Kind(IntEnum):
    """What an entry says."""

    CALL = 1
    STREAM = 2
    CAST = 3
    RESULTS = 16  # of a CALL
    CHUNK = 17  # of a STREAM
    END = 18  # of a STREAM
    FAILURE = 19  # an error: the end of a CALL or STREAM


class Refused(Exception):
    """A message is not what it claims to be, or makes no sense; the reason holds none of it."""


def secret_from(given: str | bytes | None) -> bytes | None:
    """Return the secret that is given, else that of ``HORNBEAM_SECRET``, else None.

    Raises:
        ConfigError: it is too short to be one.
    """
    value = os.environ.get("HORNBEAM_SECRET", "") if given is None else given
    secret = value.encode() if isinstance(value, str) else value
    if not secret:
        return None
    if len(secret) < _SHORTEST_SECRET:
        raise ConfigError(
            f"HORNBEAM_SECRET has {len(secret)} bytes: give {_SHORTEST_SECRET} at least, best "
            f"random ones, the same on every machine"
        )
    return secret


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What the head of a call says.

    Attributes:
        kind: A call, a stream or a cast.
        id: What no other message has.
        node: Whom it is for.
        inbox: The process that waits for the answer; empty for a cast.
        target: What is called.
        method: What it is asked to do.
        options: Small further arguments.
        timeout: Seconds that the caller waits.
        sent: When it was sent, in milliseconds of the server's clock; 0: unsigned.
        size: Bytes of the values.
        pieces: How many keys hold them; 0: they are in the entry.
        place: What names those keys.
        digest: Of the values; empty: unsigned.
    """

    kind: Kind
    id: bytes
    node: str
    inbox: bytes = b""
    target: str
    method: str
    options: Mapping[str, Any]
    timeout: float
    sent: int = 0
    size: int
    pieces: int = 0
    place: bytes = b""
    digest: bytes = b""

    @property
    def life_ms(self) -> int:
        """How long it may wait before nobody wants it any more."""
        return life_ms(self.timeout)

    def head(self) -> bytes:
        """Return its bytes.

        Raises:
            CodecError: an option cannot be encoded.
        """
        return _PREFIX + codec.encode(
            [
                *(int(self.kind), self.id, self.node, self.inbox, self.target, self.method),
                *(dict(self.options), None if self.timeout == inf else float(self.timeout)),
                *(self.sent, self.size, self.pieces, self.place, self.digest),
            ]
        )


def life_ms(timeout: float) -> int:
    """Return how long a message with this timeout may wait: a day at most."""
    return min(LONGEST_MS, max(1, int(timeout * 1000))) if timeout < inf else LONGEST_MS


def read_head(head: bytes) -> Envelope:
    """Return what a head says.

    Raises:
        Refused: it makes no sense.
    """
    if head[: len(_PREFIX)] != _PREFIX:
        raise Refused("it is of another version of hornbeam, or none of its messages")
    try:
        match codec.decode(memoryview(head)[len(_PREFIX) :]):
            case [
                (1 | 2 | 3) as kind,
                bytes(id),
                str(node),
                bytes(inbox),
                str(target),
                str(method),
                dict(options),
                (float() | None) as timeout,
                int(sent),
                int(size),
                int(pieces),
                bytes(place),
                bytes(digest),
            ] if len(id) == ID_BYTES and size >= 0 and pieces >= 0 and _is_timeout(timeout):
                return Envelope(
                    kind=Kind(kind),
                    id=id,
                    node=node,
                    inbox=inbox,
                    target=target,
                    method=method,
                    options=options,
                    timeout=inf if timeout is None else timeout,
                    sent=sent,
                    size=size,
                    pieces=pieces,
                    place=place,
                    digest=digest,
                )
    except CodecError as error:
        raise Refused(f"its head cannot be read: {error}") from None
    raise Refused("its head makes no sense")


def _is_timeout(seconds: float | None) -> bool:
    return seconds is None or 0 < seconds < inf


def fields_of(words: Sequence[Any]) -> dict[bytes, Any]:
    """Return the fields of an entry, which the server says as names and values in turn."""
    return dict(zip(words[::2], words[1::2], strict=True))


def digest_of(buffers: Iterable[bytes | memoryview]) -> bytes:
    """Return the digest of values."""
    digest = hashlib.sha256()
    for buffer in buffers:
        digest.update(buffer)
    return digest.digest()


def sign_head(secret: bytes, head: bytes) -> bytes:
    """Return the signature of a head."""
    return hmac.digest(secret, _CALL + head, "sha256")


def check_head(secret: bytes, head: bytes, signature: bytes, node: str) -> Envelope:
    """Return what a signed head says. Nothing of one that is not signed is looked at.

    Raises:
        Refused: it is not signed with the secret, or is for another node.
    """
    if not signature:
        raise Refused("it is not signed")
    if not hmac.compare_digest(signature, sign_head(secret, head)):
        raise Refused("its signature is wrong")
    envelope = read_head(head)
    if envelope.node != node:
        raise Refused("it is for another node")
    if not (envelope.sent and envelope.digest):
        raise Refused("it is signed without its time and its values")
    return envelope


def open_head(secret: bytes | None, head: bytes, signature: bytes, node: str) -> Envelope:
    """Return what a head says to a node that signs, or does not.

    Raises:
        Refused: it makes no sense, or is not signed as it has to be.
    """
    if secret is None:
        return read_head(head)
    return check_head(secret, head, signature, node)


def deadline_of(envelope: Envelope, written: int) -> int:
    """Return until when a message may run: what was signed counts, not what was written beside."""
    if not envelope.sent:
        return written
    return min(written, envelope.sent + envelope.life_ms + SKEW_MS)


@dataclass(frozen=True, slots=True)
class Answer:
    """A part of an answer: all of it, unless it is a large one.

    Attributes:
        kind: What it says.
        id: The call.
        number: Which of several answers: of chunks, or 0.
        offset: Where this part begins.
        total: How many bytes the answer has.
        part: The bytes.
    """

    kind: Kind
    id: bytes
    number: int
    offset: int
    total: int
    part: bytes | memoryview

    def to_bytes(self) -> bytes:
        """Return its bytes."""
        header = _HEADER.pack(_PREFIX, self.kind, self.number, self.id, self.offset, self.total)
        return b"".join((header, self.part))


def read_answer(data: bytes) -> Answer:
    """Return what `Answer.to_bytes` was called on; the part is not copied.

    Raises:
        Refused: it makes no sense.
    """
    if len(data) < _HEADER.size:
        raise Refused("it is too short")
    prefix, kind, number, call, offset, total = _HEADER.unpack_from(data)
    part = memoryview(data)[_HEADER.size :]
    if prefix != _PREFIX or kind < Kind.RESULTS or kind > Kind.FAILURE:
        raise Refused("it is of another version of hornbeam, or none of its answers")
    if offset + len(part) > total:
        raise Refused("its length is wrong")
    return Answer(Kind(kind), call, number, offset, total, part)


def sign_answer(secret: bytes, inbox: bytes, data: bytes) -> bytes:
    """Return the signature of an answer to the owner of an inbox."""
    return hmac.digest(secret, _ANSWER + inbox + data, "sha256")


def check_answer(secret: bytes, inbox: bytes, data: bytes, signature: bytes) -> None:
    """Raise `Refused` unless an answer is signed with the secret, for this inbox."""
    if not hmac.compare_digest(signature, sign_answer(secret, inbox, data)):
        raise Refused("its signature is wrong")


def cancellation(secret: bytes | None, node: str, ids: Iterable[bytes]) -> bytes:
    """Return a message to a node that the caller of some calls does not wait any more."""
    joined = b"".join(ids)
    signature = _sign_cancellation(secret, node, joined) if secret else b""
    return codec.encode([signature, joined])


def read_cancellation(secret: bytes | None, node: str, data: bytes) -> list[bytes]:
    """Return which calls are cancelled.

    Raises:
        Refused: it makes no sense, or is not signed with the secret.
    """
    try:
        value = codec.decode(data)
    except CodecError:
        value = None
    match value:
        case [bytes(signature), bytes(joined)]:
            if secret and not hmac.compare_digest(
                signature, _sign_cancellation(secret, node, joined)
            ):
                raise Refused("its signature is wrong")
            return [joined[at : at + ID_BYTES] for at in range(0, len(joined), ID_BYTES)]
    raise Refused("it makes no sense")


def _sign_cancellation(secret: bytes, node: str, joined: bytes) -> bytes:
    return hmac.digest(secret, _CANCEL + node.encode() + b"\0" + joined, "sha256")
