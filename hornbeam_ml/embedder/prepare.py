"""Converts a model and measures its engines, in a process of its own.

``python -m hornbeam_ml.embedder.prepare PID`` reads a `Request` from its standard input and prints
a `Report`; it ends with its parent, whose number is PID. Converters print, patch libraries, hold
hundreds of megabytes and now and then crash; a worker that starts this program instead of calling
them has none of it.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from hornbeam_ml.embedder import conversion
from hornbeam_ml.embedder.checkpoint import Checkpoint
from hornbeam_ml.embedder.description import describe
from hornbeam_ml.embedder.engines.opening import open_engine
from hornbeam_ml.embedder.fingerprint import fingerprint_of
from hornbeam_ml.embedder.measurements import Measurement, Report, Request
from hornbeam_ml.embedder.probe import measure, probe_texts
from hornbeam_ml.embedder.settings import Unsupported
from hornbeam_ml.embedder.workshop import FILES, REFERENCE, SETTINGS, TOKENIZER, Workshop
from hornbeam_ml.errors import ModelError
from hornbeam_ml.processes import end_with_parent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hornbeam_ml.embedder.engines.base import Engine


def write_description(checkpoint: Checkpoint, fingerprint: str, workshop: Workshop) -> None:
    """Write down how a model is run on token ids, having checked that it can be.

    Raises:
        Unsupported: it cannot; on some texts the vectors differ.
    """
    reference = checkpoint.encode(probe_texts())
    settings = describe(checkpoint, fingerprint, reference)
    found = workshop.settings()
    if found is None or found.fingerprint != fingerprint:
        workshop.discard()  # an export of another model, or one of which nothing is known
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(reference, np.float32), allow_pickle=False)
    workshop.write(TOKENIZER, checkpoint.tokenizer_definition().encode())
    workshop.write(REFERENCE, buffer.getvalue())
    workshop.write(SETTINGS, msgspec.json.encode(settings))


def convert(checkpoint: Checkpoint, workshop: Workshop, backend: str, precision: str) -> None:
    """Write the file of an engine, unless it is there."""
    name = FILES.get((backend, precision))
    if name is None or workshop.path(name).is_file():
        return
    if precision == "int8":
        convert(checkpoint, workshop, backend, "fp32")
        with workshop.writing(name) as path:
            conversion.to_int8(workshop.path(FILES[backend, "fp32"]), path)
        return
    settings = workshop.settings()
    if settings is None:
        raise ModelError("the model has no description yet")
    model = checkpoint.token_model(packs=settings.packs)
    with workshop.writing(name) as path:
        if backend == "openvino":
            conversion.to_openvino(model, path, settings)
        else:
            conversion.to_onnx(model, path, settings)


def prepare(request: Request) -> Report:
    """Do what is asked for.

    Raises:
        ModelError: the model changed meanwhile.
    """
    workshop = Workshop(Path(request.workshop))
    checkpoint = None
    if request.model is not None:
        checkpoint = Checkpoint(Path(request.model), request.device)
        try:
            write_description(checkpoint, request.fingerprint, workshop)
        except Unsupported as problem:
            return Report(unsupported=str(problem))
    report = Report(measurements=list(_measurements(request, workshop, checkpoint)))
    if request.model is not None and fingerprint_of(Path(request.model)) != request.fingerprint:
        workshop.discard()  # nobody knows of which of the two models it is
        raise ModelError("its files changed while it was converted")
    return report


def _measurements(
    request: Request, workshop: Workshop, checkpoint: Checkpoint | None
) -> Iterator[Measurement]:
    reference = np.load(workshop.path(REFERENCE), allow_pickle=False)
    for backend, precision in request.engines:
        try:
            if checkpoint is not None:
                convert(checkpoint, workshop, backend, precision)
            engine: Engine = open_engine(workshop, backend, precision, checkpoint)  # type: ignore[arg-type]
            yield measure(engine, reference, request.streams)
        except Exception as error:  # noqa: BLE001 - the others may do
            problem = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
            yield Measurement(backend=backend, precision=precision, problem=problem)


def main() -> None:
    """Serve one request."""
    end_with_parent(int(sys.argv[1]))
    answer = os.dup(1)
    os.dup2(2, 1)  # libraries print; only the report is the answer
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    with os.fdopen(answer, "wb") as file:
        file.write(msgspec.json.encode(prepare(request)))


if __name__ == "__main__":
    main()
