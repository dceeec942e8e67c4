"""Values that show whether they are whole."""

from __future__ import annotations

import hashlib
import random


def sealed(dice: random.Random, size: int) -> bytes:
    """Return random bytes that begin with their own checksum."""
    content = dice.randbytes(size)
    return hashlib.blake2b(content, digest_size=16).digest() + content


def is_whole(value: bytes) -> bool:
    return hashlib.blake2b(value[16:], digest_size=16).digest() == value[:16]
