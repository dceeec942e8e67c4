"""Texts of a batch as arrays: padded to one length, or packed into rows. Pure."""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

PADDED: Final = ("input_ids", "attention_mask")
"""The names of the arrays that `pad` makes."""

PACKED: Final = ("input_ids", "position_ids", "segments", "places", "attention_mask")
"""The names of the arrays that `pack` makes."""

_ROW: Final = 96
"""About so many tokens. Attention costs the square of a row's length, and in short rows more room
is lost: of 64 to 256, rows of 64 to 96 were the fastest for all-MiniLM-L6-v2."""


def pad(batch: Sequence[Sequence[int]], pad_id: int) -> tuple[Any, ...]:
    """Return the token ids of a batch as one array, and its mask.

    Args:
        batch: Token ids of n texts, the longest of which has m.
        pad_id: Fills up the others.

    Returns:
        Two int64 arrays of shape (n, m): the ids, and 1 where a token stands, 0 where padding.
    """
    longest = max(map(len, batch))
    ids = np.full((len(batch), longest), pad_id, np.int64)
    mask = np.zeros((len(batch), longest), np.int64)
    for row, tokens in enumerate(batch):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return ids, mask


def pack(batch: Sequence[Sequence[int]], pad_id: int, first_position: int = 0) -> tuple[Any, ...]:
    """Return the token ids of a batch, several texts in one row, and what tells them apart.

    A model then computes little more than what the texts hold: at 5 to 60 words, rows are filled
    to 93 %, while padding the texts to one length fills them to 60 %. ("Packing", without
    cross-contamination: Krell et al. 2021, arXiv:2107.02027.)

    Args:
        batch: Token ids of n texts, the longest of which has m.
        pad_id: Fills up rows.
        first_position: The position of a text's first token.

    Returns:
        int64 arrays: of shape (rows, width) the ids, their positions in their own texts, and the
        numbers of these texts (-1: padding); of shape (n, m) the places of each text's tokens in
        the rows laid end to end, and 1 where a token stands, 0 where none does.
    """
    starts, rows, width = _arrange([len(tokens) for tokens in batch])
    longest = max(1, *map(len, batch))
    ids = np.full(rows * width, pad_id, np.int64)
    positions = np.full(rows * width, first_position, np.int64)
    segments = np.full(rows * width, -1, np.int64)
    places = np.zeros((len(batch), longest), np.int64)
    mask = np.zeros((len(batch), longest), np.int64)
    for number, tokens in enumerate(batch):
        row, offset = starts[number]
        count, start = len(tokens), row * width + offset
        ids[start : start + count] = tokens
        positions[start : start + count] = np.arange(first_position, first_position + count)
        segments[start : start + count] = number
        places[number, :count] = np.arange(start, start + count)
        mask[number, :count] = 1
    shape = rows, width
    return ids.reshape(shape), positions.reshape(shape), segments.reshape(shape), places, mask


def _arrange(lengths: Sequence[int]) -> tuple[list[tuple[int, int]], int, int]:
    """Return the row and offset of each text, how many rows there are, and how wide they are.

    Longest first, each into the row that holds the least: rows end at nearly the same length
    (the rule "longest processing time" for machines: Graham 1969, doi:10.1137/0117039).
    """
    rows = math.ceil(sum(lengths) / max(_ROW, *lengths)) or 1
    filled = [(0, row) for row in range(rows)]  # a heap
    starts = [(0, 0)] * len(lengths)
    for number in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        used, row = filled[0]
        starts[number] = row, used
        heapq.heapreplace(filled, (used + lengths[number], row))
    return starts, rows, max(1, *(used for used, _ in filled))
