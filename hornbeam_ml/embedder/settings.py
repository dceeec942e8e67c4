"""What an embedding model is, apart from its weights: small enough for a JSON file."""

from __future__ import annotations

from typing import Final

import msgspec

FORMAT: Final = 2
"""Of the files of an exported model; another number means that they cannot be read."""


class TextSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How texts become tokens, and what is done with the vectors of the model.

    Attributes:
        fingerprint: Which model it is: a digest of its weights and configuration.
        dim: Numbers in a vector.
        max_length: The most tokens of a text; what is beyond is cut off.
        prompt: Put before each text.
        lower_case: Whether texts are lowered before the tokenizer sees them.
        normalize: Whether the model's own last step makes vectors of length 1.
        pad_id: The token that fills up shorter texts of a batch.
        packs: Whether several texts can share a row; see `layout.pack`.
        first_position: The position of a text's first token, for models that pack.
        format: The version of this description.
    """

    fingerprint: str
    dim: int
    max_length: int
    prompt: str = ""
    lower_case: bool = False
    normalize: bool = False
    pad_id: int = 0
    packs: bool = False
    first_position: int = 0
    format: int = FORMAT


class Unsupported(Exception):
    """Why a model cannot be run on token ids alone."""
