"""Values that are too large for an entry, in keys beside the stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from hornbeam_state.backends.redis.batches import Command, ask
from hornbeam_state.transports.redis.envelope import Refused
from hornbeam_state.transports.redis.outgoing import PIECE_BYTES

if TYPE_CHECKING:
    from hornbeam_state.backends.redis.batches import Steps
    from hornbeam_state.transports.redis.envelope import Envelope
    from hornbeam_state.transports.redis.keys import NodeKeys

_AT_ONCE: Final = 8


def download(envelope: Envelope, keys: NodeKeys, most_bytes: int) -> Steps[memoryview]:
    """Return the values of a message.

    Raises:
        Refused: they are too large, are gone, or have another length.
    """
    if envelope.size > most_bytes:
        raise Refused(f"{envelope.size} bytes: {most_bytes} are the most here")
    if envelope.pieces != -(-envelope.size // PIECE_BYTES):
        raise Refused("its values are in another number of pieces")
    names = keys.parts(envelope.place, envelope.pieces)
    body = np.empty(envelope.size, np.uint8).data
    filled = 0
    for start in range(0, len(names), _AT_ONCE):
        commands = [
            Command((b"GET", name), keys.bucket) for name in names[start : start + _AT_ONCE]
        ]
        for piece in (yield from ask(*commands, repeatable=True)):
            if piece is None or filled + len(piece) > len(body):
                raise Refused("its values are gone")
            body[filled : filled + len(piece)] = piece
            filled += len(piece)
    if filled != len(body):
        raise Refused("its values are damaged")
    return body


def remove(envelope: Envelope, keys: NodeKeys) -> Steps[None]:
    """Remove the values of a message."""
    names = keys.parts(envelope.place, envelope.pieces)
    yield from ask(Command((b"UNLINK", *names), keys.bucket), repeatable=True)
