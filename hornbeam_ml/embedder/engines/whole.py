"""`SentenceTransformer.encode` itself, for models that cannot be run on token ids."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hornbeam_ml.embedder.checkpoint import Checkpoint
    from hornbeam_ml.embedder.engines.base import Precision

_CHARACTERS_PER_TOKEN: Final = 4


class WholeEngine:
    """Texts in, vectors out; items are the texts.

    Args:
        checkpoint: The loaded model.
    """

    backend = "sentence-transformers"
    precision: Precision = "fp32"

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.normalizes = checkpoint.normalize
        self.pads = True
        self._lock = threading.Lock()  # its tokenizer is not for several threads at a time

    def prepare(self, text: str) -> str:
        """Return the text."""
        return text

    def length(self, item: str) -> int:
        """Return about how many tokens it has."""
        return len(item) // _CHARACTERS_PER_TOKEN + 1

    def run(self, batch: Sequence[str]) -> Any:
        """Return the vectors of some texts, float32 (n, dim)."""
        with self._lock:
            return np.asarray(self._checkpoint.encode(batch), np.float32)
