"""Texts to token ids, with the `tokenizers` library alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hornbeam_ml.embedder.settings import TextSettings


class TextTokenizer:
    """Makes lists of token ids. Safe to use from any thread.

    The library raises "Already borrowed" when one thread sets how a tokenizer cuts and pads
    while another uses it. This one is set up here and never again, so that threads share it: a
    copy for each of 32 request threads would take 35 ms and some megabytes each.

    Args:
        definition: The content of a ``tokenizer.json``.
        settings: How texts are cut.
    """

    def __init__(self, definition: str, settings: TextSettings) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(definition)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(settings.max_length)
        self._prompt = settings.prompt
        self._lower_case = settings.lower_case

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, special tokens included, at most `max_length`."""
        text = self._prompt + text
        ids: list[int] = self._tokenizer.encode(text.lower() if self._lower_case else text).ids
        return ids


def pad(batch: Sequence[Sequence[int]], pad_id: int) -> tuple[Any, Any]:
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
