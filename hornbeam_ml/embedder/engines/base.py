"""What every engine does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

Precision = Literal["fp32", "bf16", "int8"]


class Engine(Protocol):
    """The weights of a model, and the library that runs them.

    Calls come from several threads at once. How many cores each may use, the engine asks
    `hornbeam_ml.threads.current_limit`.
    """

    @property
    def backend(self) -> str:
        """``torch``, ``onnx``, ``openvino`` or ``sentence-transformers``."""
        ...

    @property
    def precision(self) -> Precision:
        """The arithmetic of its matrix products."""
        ...

    @property
    def normalizes(self) -> bool:
        """Whether the model's own last step makes vectors of length 1; it is not done by `run`."""
        ...

    @property
    def pads(self) -> bool:
        """Whether the texts of a batch are padded to the longest."""
        ...

    def prepare(self, text: str) -> Any:
        """Return what `run` takes of a text; called in the caller's thread."""
        ...

    def length(self, item: Any) -> int:
        """Return how many tokens a prepared text has, at least 1."""
        ...

    def run(self, batch: Sequence[Any]) -> Any:
        """Return the vectors of prepared texts; blocks.

        Returns:
            A float32 array of shape (n, dim), before the model's own normalisation.
        """
        ...
