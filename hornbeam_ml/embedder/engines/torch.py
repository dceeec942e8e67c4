"""torch: on a CPU or a GPU, in the precision of the weights or in bf16."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import msgspec

from hornbeam_ml.embedder.engines.tokens import TokenEngine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hornbeam_ml.embedder.checkpoint import Checkpoint
    from hornbeam_ml.embedder.engines.base import Precision
    from hornbeam_ml.embedder.settings import TextSettings
    from hornbeam_ml.embedder.tokens import TextTokenizer


class TorchEngine(TokenEngine):
    """The modules of the model under ``torch.inference_mode``.

    Args:
        checkpoint: The loaded model. Its weights are shared in fp32, copied in bf16.
        precision: ``fp32`` or ``bf16``.
        tokenizer: Makes token ids.
        settings: Of the model.
    """

    backend = "torch"

    def __init__(
        self,
        checkpoint: Checkpoint,
        precision: Precision,
        tokenizer: TextTokenizer,
        settings: TextSettings,
    ) -> None:
        import torch

        if checkpoint.device != "cpu":  # there padding costs little, and a mask for each row much
            settings = msgspec.structs.replace(settings, packs=False)
        super().__init__(tokenizer, settings)
        self.precision: Precision = precision
        self._torch = torch
        self._device = torch.device(checkpoint.device)
        model = checkpoint.token_model(packs=settings.packs)
        if precision == "bf16":
            model = copy.deepcopy(model).to(torch.bfloat16)
        self._model = model

    def _vectors(self, arrays: Sequence[Any]) -> Any:
        torch = self._torch
        with torch.inference_mode():
            tensors = [torch.from_numpy(array).to(self._device) for array in arrays]
            return self._model(*tensors).float().cpu().numpy()
