"""OpenVINO, on the CPU."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any, Final

from hornbeam_ml import threads
from hornbeam_ml.embedder.engines.tokens import TokenEngine
from hornbeam_ml.errors import ModelError
from hornbeam_ml.telemetry import without_telemetry

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from hornbeam_ml.embedder.engines.base import Precision
    from hornbeam_ml.embedder.settings import TextSettings
    from hornbeam_ml.embedder.tokens import TextTokenizer

_HINTS: Final = {"fp32": "f32", "bf16": "bf16"}
_compiled_by: set[int] = set()  # process ids: this one, and those of which it is a fork


def check_process() -> None:
    """Raise if OpenVINO would wait for threads that only a parent of this process has.

    Raises:
        ModelError: it compiled a model before the fork.
    """
    if _compiled_by - {os.getpid()}:
        raise ModelError(
            "OpenVINO was used before this process was forked, after which it hangs: encode no "
            "text before the fork (gunicorn --preload), or choose another backend"
        )


class OpenVinoEngine(TokenEngine):
    """A model that OpenVINO compiled once for each number of threads that is asked for.

    Args:
        path: Of the model, as `conversion` wrote it.
        precision: ``fp32`` or ``bf16``; the weights in the file are fp32.
        tokenizer: Makes token ids.
        settings: Of the model.
    """

    backend = "openvino"

    def __init__(
        self,
        path: Path,
        precision: Precision,
        tokenizer: TextTokenizer,
        settings: TextSettings,
    ) -> None:
        with without_telemetry():
            import openvino

        super().__init__(tokenizer, settings)
        self.precision: Precision = precision
        self._core = openvino.Core()
        self._model = self._core.read_model(path)
        self._compiled: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._requests = threading.local()

    def _vectors(self, arrays: Sequence[Any]) -> Any:
        request = self._request(threads.current_limit())
        request.infer(dict(enumerate(arrays)), share_inputs=True)
        return request.get_output_tensor(0).data.copy()

    def _request(self, share: int) -> Any:
        """Return what infers in this thread with so many threads."""
        requests = self._requests.__dict__
        request = requests.get(str(share))
        if request is None:
            request = requests[str(share)] = self._compile(share).create_infer_request()
        return request

    def _compile(self, share: int) -> Any:
        with self._lock:
            _compiled_by.add(os.getpid())
            compiled = self._compiled.get(share)
            if compiled is None:
                cores = threads.process_share(1)
                compiled = self._compiled[share] = self._core.compile_model(
                    self._model,
                    "CPU",
                    {
                        "INFERENCE_PRECISION_HINT": _HINTS[self.precision],
                        "INFERENCE_NUM_THREADS": max(cores, share),
                        "NUM_STREAMS": max(1, cores // share),
                    },
                )
            return compiled
