"""What the engines that run on token ids have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hornbeam_ml.embedder.layout import PACKED, PADDED, pack, pad

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hornbeam_ml.embedder.settings import TextSettings
    from hornbeam_ml.embedder.tokens import TextTokenizer


class TokenEngine:
    """An engine whose items are lists of token ids; the library's part is `_vectors`.

    Args:
        tokenizer: Makes them.
        settings: Of the model.
    """

    def __init__(self, tokenizer: TextTokenizer, settings: TextSettings) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._names = PACKED if settings.packs else PADDED
        self.pads = not settings.packs
        self.normalizes = settings.normalize

    def prepare(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self._tokenizer.encode(text)

    def length(self, item: Sequence[int]) -> int:
        """Return how many there are."""
        return len(item) or 1

    def run(self, batch: Sequence[Sequence[int]]) -> Any:
        """Return the vectors of some texts, float32 (n, dim)."""
        pad_id = self._settings.pad_id
        if self._settings.packs:
            return self._vectors(pack(batch, pad_id, self._settings.first_position))
        return self._vectors(pad(batch, pad_id))

    def _vectors(self, arrays: Sequence[Any]) -> Any:
        """Return what the model makes of the arrays that `_names` names."""
        raise NotImplementedError
