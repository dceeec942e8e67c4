"""ONNX Runtime, on the CPU."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from hornbeam_ml import threads
from hornbeam_ml.embedder.engines.tokens import TokenEngine

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from hornbeam_ml.embedder.engines.base import Precision
    from hornbeam_ml.embedder.settings import TextSettings
    from hornbeam_ml.embedder.tokens import TextTokenizer


class OnnxEngine(TokenEngine):
    """A session of ONNX Runtime for each number of threads that is asked for.

    Args:
        path: Of the model, as `conversion` wrote it.
        precision: What it holds: ``fp32``, or ``int8`` where it was quantised.
        tokenizer: Makes token ids.
        settings: Of the model.
    """

    backend = "onnx"

    def __init__(
        self,
        path: Path,
        precision: Precision,
        tokenizer: TextTokenizer,
        settings: TextSettings,
    ) -> None:
        super().__init__(tokenizer, settings)
        self.precision: Precision = precision
        self._path = path
        self._sessions: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._session(threads.current_limit())  # a damaged file shows now

    def _vectors(self, arrays: Sequence[Any]) -> Any:
        session = self._session(threads.current_limit())
        return session.run(None, dict(zip(self._names, arrays, strict=True)))[0]

    def _session(self, share: int) -> Any:
        session = self._sessions.get(share)
        if session is None:
            with self._lock:
                session = self._sessions.get(share)
                if session is None:
                    session = self._sessions[share] = self._new_session(share)
        return session

    def _new_session(self, share: int) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = share
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads that spin take the cores from the other streams, and from an idle server.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return onnxruntime.InferenceSession(
            str(self._path), options, providers=["CPUExecutionProvider"]
        )
