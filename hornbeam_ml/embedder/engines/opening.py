"""Opens an engine by the names of its library and precision."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Final

from hornbeam_ml.embedder.tokens import TextTokenizer
from hornbeam_ml.embedder.workshop import FILES, Workshop
from hornbeam_ml.errors import ModelError

if TYPE_CHECKING:
    from hornbeam_ml.embedder.checkpoint import Checkpoint
    from hornbeam_ml.embedder.engines.base import Engine, Precision

_MODULES: Final = {
    "torch": ("sentence_transformers",),
    "onnx": ("onnxruntime", "tokenizers"),
    "openvino": ("openvino", "tokenizers"),
}
_EXTRAS: Final = {"torch": "embeddings", "onnx": "onnx", "openvino": "openvino"}


def is_installed(backend: str) -> bool:
    """Return whether the library of a backend is there; imports nothing."""
    return all(importlib.util.find_spec(name) is not None for name in _MODULES[backend])


def check_installed(backend: str) -> None:
    """Raise if the library of a backend is missing.

    Raises:
        ModelError: it is; the message says how to install it.
    """
    if not is_installed(backend):
        extra = _EXTRAS[backend]
        raise ModelError(f"backend={backend!r} needs: pip install 'hornbeam[{extra}]'")


def open_engine(
    workshop: Workshop, backend: str, precision: Precision, checkpoint: Checkpoint | None = None
) -> Engine:
    """Return an engine over the files in a workshop.

    Args:
        workshop: Holds the description of the model, its tokenizer, and the model converted.
        backend: ``torch``, ``onnx`` or ``openvino``.
        precision: One that the backend has.
        checkpoint: For ``torch``: the model.

    Raises:
        ModelError: something is missing.
    """
    check_installed(backend)
    settings = workshop.settings()
    if settings is None:
        raise ModelError(f"{workshop.directory} holds no exported model of this version")
    tokenizer = TextTokenizer(workshop.tokenizer_definition(), settings)
    if backend == "torch":
        from hornbeam_ml.embedder.engines.torch import TorchEngine

        if checkpoint is None:
            raise ModelError("an exported model has no weights for torch: give the model itself")
        return TorchEngine(checkpoint, precision, tokenizer, settings)
    path = workshop.path(FILES[backend, precision])
    if not path.is_file():
        raise ModelError(f"{path} is missing")
    if backend == "onnx":
        from hornbeam_ml.embedder.engines.onnx import OnnxEngine

        return OnnxEngine(path, precision, tokenizer, settings)
    from hornbeam_ml.embedder.engines.openvino import OpenVinoEngine

    return OpenVinoEngine(path, precision, tokenizer, settings)
