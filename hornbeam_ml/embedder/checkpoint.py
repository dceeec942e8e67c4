"""A model as sentence-transformers loads it; needs torch."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final

from hornbeam_ml.embedder.settings import TextSettings, Unsupported
from hornbeam_ml.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


_LONGEST_TEXT: Final = 1_000_000  # tokens; tokenizers without a limit say 1e30
_POSITIONS_AFTER_PAD: Final = {"roberta", "xlm-roberta", "camembert"}
_PACKING: Final = {"bert", "electra"} | _POSITIONS_AFTER_PAD
"""Kinds of models in which a token sees all others of its text, and its own position: not those
with windows, relative positions, or an order of generation. Each is checked on texts as well."""


class Checkpoint:
    """The modules of a SentenceTransformer.

    The last one, when it only normalises, is kept apart: callers choose whether they want it.

    Args:
        directory: Where it lies.
        device: ``cpu`` or ``cuda:N``.

    Raises:
        ModelError: sentence-transformers is missing, or cannot load it.
    """

    def __init__(self, directory: Path, device: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
            from sentence_transformers.sentence_transformer.modules import Normalize
        except ImportError as error:
            raise ModelError(
                f"{directory} needs sentence-transformers (pip install 'hornbeam[embeddings]'), "
                "or an export of it, which onnxruntime or openvino run: Embedder.export"
            ) from error
        self.device = device
        with _no_progress_bars():
            self.sentence_model = SentenceTransformer(str(directory), device=device).eval()
        modules = list(self.sentence_model)
        self.normalize = isinstance(modules[-1], Normalize) and len(modules) > 1
        self.modules = modules[:-1] if self.normalize else modules

    def settings(self, fingerprint: str) -> TextSettings:
        """Return what is needed to run it on token ids.

        Raises:
            Unsupported: it takes something else than token ids.
        """
        model, first = self.sentence_model, self.modules[0]
        tokenizer: Any = getattr(model, "tokenizer", None)
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise Unsupported("it has no tokenizer of the tokenizers library")
        if getattr(first, "auto_model", None) is None:
            raise Unsupported(f"its first module is a {type(first).__name__}")
        if tokenizer.truncation_side != "right":
            raise Unsupported("it keeps the end of a text that is too long")
        if model.truncate_dim is not None:
            raise Unsupported("it cuts vectors (truncate_dim)")
        dim = model.get_embedding_dimension()
        limit = model.max_seq_length or tokenizer.model_max_length
        if not dim or not limit or limit > _LONGEST_TEXT:
            raise Unsupported("its dimension or its longest text are not known")
        pad_id = tokenizer.pad_token_id or 0
        kind = getattr(first.auto_model.config, "model_type", "")
        prompt = model.prompts.get(model.default_prompt_name) if model.default_prompt_name else None
        return TextSettings(
            fingerprint=fingerprint,
            dim=dim,
            max_length=limit,
            prompt=prompt or "",
            lower_case=bool(getattr(first, "do_lower_case", False)),
            normalize=self.normalize,
            pad_id=pad_id,
            packs=kind in _PACKING,
            first_position=pad_id + 1 if kind in _POSITIONS_AFTER_PAD else 0,
        )

    def tokenizer_definition(self) -> str:
        """Return its tokenizer as the content of a ``tokenizer.json``."""
        definition: str = self.sentence_model.tokenizer.backend_tokenizer.to_str()
        return definition

    def token_model(self, *, packs: bool) -> Any:
        """Return a torch module from the arrays of `layout.pad`, or `pack`, to vectors (n, dim)."""
        return _packed_model(self.modules) if packs else _padded_model(self.modules)

    def encode(self, texts: Sequence[str]) -> Any:
        """Return the vectors of texts as sentence-transformers computes them, (n, dim) float32.

        Without the model's own normalisation.
        """
        if not self.normalize:
            return self.sentence_model.encode(list(texts), show_progress_bar=False)
        from sentence_transformers import SentenceTransformer

        model = self.sentence_model
        bare = SentenceTransformer(
            modules=self.modules,
            device=self.device,
            prompts=model.prompts,
            default_prompt_name=model.default_prompt_name,
            truncate_dim=model.truncate_dim,
        )
        self.encode = _plain_encode(bare)  # type: ignore[method-assign] # made once
        return self.encode(texts)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep them out of a server's log."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _plain_encode(model: Any) -> Any:
    return lambda texts: model.encode(list(texts), show_progress_bar=False)


def _padded_model(modules: Sequence[Any]) -> Any:
    import torch

    class PaddedModel(torch.nn.Module):  # type: ignore[misc] # torch is untyped for us
        """The modules of a SentenceTransformer, from token ids to vectors."""

        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ModuleList(modules)

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            features = {"input_ids": input_ids, "attention_mask": attention_mask}
            for part in self.parts:
                features = part(features)
            return features["sentence_embedding"]

    return PaddedModel().eval()


def _packed_model(modules: Sequence[Any]) -> Any:
    import torch

    class PackedModel(torch.nn.Module):  # type: ignore[misc] # torch is untyped for us
        """The same, with several texts in a row for the first module, one for the others."""

        def __init__(self) -> None:
            super().__init__()
            self.first = modules[0]
            self.others = torch.nn.ModuleList(modules[1:])

        def forward(
            self,
            input_ids: Any,
            position_ids: Any,
            segments: Any,
            places: Any,
            attention_mask: Any,
        ) -> Any:
            same_text = segments[:, None, :, None] == segments[:, None, None, :]
            features = self.first(
                {
                    "input_ids": input_ids,
                    "position_ids": position_ids,
                    "attention_mask": same_text,
                }
            )
            tokens = features["token_embeddings"].flatten(0, 1)[places]
            features = {"token_embeddings": tokens, "attention_mask": attention_mask}
            for part in self.others:
                features = part(features)
            return features["sentence_embedding"]

    return PackedModel().eval()
