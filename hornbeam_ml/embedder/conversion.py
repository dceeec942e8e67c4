"""From a torch module to the files of other libraries. Needs torch, and no `optimum`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hornbeam_ml.embedder.layout import PACKED, PADDED, pack, pad
from hornbeam_ml.telemetry import without_telemetry

if TYPE_CHECKING:
    from pathlib import Path

    from hornbeam_ml.embedder.settings import TextSettings

_EXAMPLE: Final = [[5] * 70, [6] * 60, [7] * 50]  # texts; rows and lengths are left open


def to_openvino(model: Any, path: Path, settings: TextSettings) -> None:
    """Write a model, as `Checkpoint.token_model` returns it, as OpenVINO's ``.xml``.

    About a second for all-MiniLM-L6-v2, with an error of 5e-6.
    """
    with without_telemetry():
        import openvino

    converted = openvino.convert_model(model, example_input=_example(settings))
    openvino.save_model(converted, path, compress_to_fp16=False)


def to_onnx(model: Any, path: Path, settings: TextSettings) -> None:
    """Write such a model as ONNX.

    About 6 s for all-MiniLM-L6-v2, with an error of 3e-6.
    """
    import torch

    names = PACKED if settings.packs else PADDED
    auto = torch.export.Dim.AUTO
    torch.onnx.export(
        model,
        _example(settings),
        str(path),
        input_names=list(names),
        output_names=["sentence_embedding"],
        dynamic_shapes=[{0: auto, 1: auto} for _ in names],
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def to_int8(source: Path, path: Path) -> None:
    """Write a copy of an ONNX model with weights of 8 bits, quantised dynamically."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(source), str(path), weight_type=QuantType.QInt8, per_channel=True)


def _example(settings: TextSettings) -> tuple[Any, ...]:
    import torch

    arrays = pack(_EXAMPLE, 0) if settings.packs else pad(_EXAMPLE, 0)
    return tuple(map(torch.from_numpy, arrays))
