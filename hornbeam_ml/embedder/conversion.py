"""From a torch module to the files of other libraries. Needs torch, and no `optimum`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pathlib import Path

_EXAMPLE: Final = (2, 8)  # texts, tokens; both are left open in the result


def to_openvino(model: Any, path: Path) -> None:
    """Write a model from ids and mask, int64 (n, m), to vectors as OpenVINO's ``.xml``.

    About a second for all-MiniLM-L6-v2, with an error of 5e-6.
    """
    import openvino

    ids, mask = _example()
    converted = openvino.convert_model(
        model, example_input={"input_ids": ids, "attention_mask": mask}
    )
    openvino.save_model(converted, path, compress_to_fp16=False)


def to_onnx(model: Any, path: Path, longest: int) -> None:
    """Write such a model as ONNX.

    About 6 s for all-MiniLM-L6-v2, with an error of 3e-6.

    Args:
        model: The torch module.
        path: Where to.
        longest: The most tokens of a text.
    """
    import torch

    texts = torch.export.Dim("texts", min=1)
    tokens = torch.export.Dim("tokens", min=1, max=max(longest, _EXAMPLE[1]))
    torch.onnx.export(
        model,
        _example(),
        str(path),
        input_names=["input_ids", "attention_mask"],
        output_names=["sentence_embedding"],
        dynamic_shapes=({0: texts, 1: tokens}, {0: texts, 1: tokens}),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def to_int8(source: Path, path: Path) -> None:
    """Write a copy of an ONNX model with weights of 8 bits, quantised dynamically."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(source), str(path), weight_type=QuantType.QInt8, per_channel=True)


def _example() -> tuple[Any, Any]:
    import torch

    return torch.ones(_EXAMPLE, dtype=torch.long), torch.ones(_EXAMPLE, dtype=torch.long)
