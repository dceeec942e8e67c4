"""Which entries of a full cache go: of some chosen at random, those used least (sampled LFU).

How often a key is used is estimated by a count-min sketch (Cormode and Muthukrishnan, 2005) in a
file that all processes map, so that reading a value writes nothing to the store. Two processes
that count at the same moment may lose a count, which does no harm to an estimate.
"""

from __future__ import annotations

import contextlib
import os
import random
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final
from zlib import crc32

import numpy as np

from hornbeam_state.backends.embedded.records import DamagedRecord
from hornbeam_state.backends.mapped_file import map_file

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable
    from pathlib import Path

_CELLS: Final = 1 << 20
_SECOND: Final = 0x9E3779B1  # 2**32 / golden ratio: spreads a hash over the cells another way
_MOST: Final = 255
_AGE_AFTER: Final = _CELLS * 4
_SAMPLE: Final = 16
_VICTIMS: Final = 4
_MOST_AT_ONCE: Final = 1024


class Sketch:
    """An estimate of how often each key was used lately.

    Args:
        path: Its file, of one byte for each of a million cells and eight for a count of uses.
    """

    def __init__(self, path: Path) -> None:
        self._cells: mmap.mmap | bytearray
        try:
            self._cells = _shared_cells(path)
        except OSError:  # no room: this process estimates for itself
            self._cells = bytearray(_CELLS + 8)

    def note(self, key: bytes) -> None:
        """Count one use of a key."""
        digest = crc32(key)
        cells = self._cells
        for place in (digest & (_CELLS - 1), (digest * _SECOND >> 12) & (_CELLS - 1)):
            count = cells[place]
            if count < _MOST:
                cells[place] = count + 1

    def estimate(self, key: bytes) -> int:
        """Return about how often a key was used: never less than it was, up to 255."""
        digest = crc32(key)
        cells = self._cells
        return min(cells[digest & (_CELLS - 1)], cells[(digest * _SECOND >> 12) & (_CELLS - 1)])

    def age(self, uses: int) -> None:
        """Count uses, and halve all estimates now and then, so that old fame fades."""
        total = int.from_bytes(self._cells[_CELLS:], "little") + uses
        if total >= _AGE_AFTER:
            total = 0
            cells = np.frombuffer(self._cells, dtype=np.uint8, count=_CELLS)
            cells >>= 1
            del cells  # else the map could not be closed
        self._cells[_CELLS:] = total.to_bytes(8, "little")


def _shared_cells(path: Path) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        return map_file(descriptor, _CELLS + 8)
    finally:
        os.close(descriptor)


def choose_victims(cursor: Any, sketch: Sketch) -> list[bytes]:
    """Return stored keys of entries to remove: the least used of a random sample.

    The stored keys of the cache begin with a hash, so a random place in that order is fair.
    """
    sample: dict[bytes, int] = {}
    for _ in range(_SAMPLE):
        if cursor.set_range(random.randbytes(4)) or cursor.first():  # noqa: S311 - not a secret
            stored = cursor.key()
            sample[stored] = sketch.estimate(stored[4:])
    ranked = sorted(sample.items(), key=itemgetter(1))
    return [stored for stored, _ in ranked[:_VICTIMS]]


def make_room(
    txn: Any,
    db: Any,
    sketch: Sketch,
    is_too_full: Callable[[], bool],
    remove: Callable[[Any, bytes], object],
) -> int:
    """Remove entries until there is room.

    Args:
        txn: A write transaction.
        db: The database of the entries.
        sketch: How often they are used.
        is_too_full: Whether to go on.
        remove: Removes an entry by its stored key.

    Returns:
        How many were removed; a thousand at most, so that no writer waits for long.
    """
    removed = 0
    while removed < _MOST_AT_ONCE and is_too_full():
        with txn.cursor(db) as cursor:
            victims = choose_victims(cursor, sketch)
        if not victims:
            break
        for stored in victims:
            with contextlib.suppress(DamagedRecord):  # gone as well
                remove(txn, stored)
            removed += 1
            if not is_too_full():
                break
    return removed
