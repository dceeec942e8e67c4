"""How a model is run on token ids, found out by doing it; needs torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from hornbeam_ml.embedder.engines.torch import TorchEngine
from hornbeam_ml.embedder.probe import check_same
from hornbeam_ml.embedder.tokens import TextTokenizer

if TYPE_CHECKING:
    from hornbeam_ml.embedder.checkpoint import Checkpoint
    from hornbeam_ml.embedder.settings import TextSettings


def describe(checkpoint: Checkpoint, fingerprint: str, reference: Any) -> TextSettings:
    """Return settings with which a model gives the vectors that it should.

    Args:
        checkpoint: The model.
        fingerprint: What it is.
        reference: The vectors of the probe texts.

    Raises:
        Unsupported: there are none; on some texts the vectors differ.
    """
    settings = checkpoint.settings(fingerprint)
    if settings.packs:
        try:
            _check(checkpoint, settings, reference)
        except Exception:  # noqa: BLE001 - a model of a known kind, with code of its own
            settings = msgspec.structs.replace(settings, packs=False)
        else:
            return settings
    _check(checkpoint, settings, reference)
    return settings


def _check(checkpoint: Checkpoint, settings: TextSettings, reference: Any) -> None:
    tokenizer = TextTokenizer(checkpoint.tokenizer_definition(), settings)
    check_same(TorchEngine(checkpoint, "fp32", tokenizer, settings), reference)
