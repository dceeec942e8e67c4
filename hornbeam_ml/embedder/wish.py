"""What kind of engine a user asks for, and which engines are of that kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, get_args

from hornbeam_state.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hornbeam_ml.embedder.engines.base import Precision

Backend = Literal["auto", "torch", "onnx", "openvino", "sentence-transformers"]
AskedPrecision = Literal["auto", "exact", "fp32", "bf16", "int8"]
PRECISIONS: Final[dict[str, tuple[Precision, ...]]] = {
    "torch": ("fp32", "bf16"),
    "openvino": ("fp32", "bf16"),
    "onnx": ("fp32", "int8"),
}
"""Those of each library; in this order they are tried."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What kind of engine is asked for.

    Attributes:
        backend: A library, or ``auto``.
        precision: An arithmetic; ``exact`` is fp32, ``auto`` all that are as good.
        device: ``cpu`` or ``cuda:N``.
        streams: How many threads will encode at a time.
    """

    backend: str
    precision: str
    device: str
    streams: int

    def __post_init__(self) -> None:
        if self.backend not in get_args(Backend):
            raise ConfigError(f"backend={self.backend!r}: use one of {get_args(Backend)}")
        if self.precision not in get_args(AskedPrecision):
            raise ConfigError(
                f"precision={self.precision!r}: use one of {get_args(AskedPrecision)}"
            )
        if self.backend in PRECISIONS and not self._pairs([self.backend], has_bf16=True):
            raise ConfigError(f"backend={self.backend!r} has no precision={self.precision!r}")

    def candidates(
        self, *, installed: Sequence[str], has_bf16: bool
    ) -> list[tuple[str, Precision]]:
        """Return pairs of backend and precision, the plainest first.

        Args:
            installed: The backends to think of.
            has_bf16: Whether the processor computes in bf16.
        """
        backends = list(installed) if self.backend == "auto" else [self.backend]
        if self.device != "cpu":
            backends = [name for name in backends if name == "torch"]
        return self._pairs(backends, has_bf16=has_bf16)

    def _pairs(self, backends: Sequence[str], *, has_bf16: bool) -> list[tuple[str, Precision]]:
        wanted = {"auto": ("fp32", "bf16"), "exact": ("fp32",)}.get(
            self.precision, (self.precision,)
        )
        return [
            (backend, precision)
            for backend in backends
            for precision in PRECISIONS.get(backend, ())
            if precision in wanted and (precision != "bf16" or has_bf16)
        ]
