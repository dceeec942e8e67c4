"""Texts to token ids, with the `tokenizers` library alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
