"""From what a user asks for to an engine: candidates, the choice among them, opening it."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from hornbeam_ml.embedder.engines import openvino
from hornbeam_ml.embedder.engines.opening import check_installed, is_installed, open_engine
from hornbeam_ml.embedder.fingerprint import fingerprint_of
from hornbeam_ml.embedder.measurements import Report, Request
from hornbeam_ml.embedder.probe import probe_texts
from hornbeam_ml.embedder.settings import Unsupported
from hornbeam_ml.embedder.wish import PRECISIONS
from hornbeam_ml.embedder.workshop import (
    FILES,
    SETTINGS,
    Workshop,
    cpu_flags,
    machine_key,
    workshop_for,
)
from hornbeam_ml.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    from hornbeam_ml.embedder.engines.base import Engine, Precision
    from hornbeam_ml.embedder.measurements import Measurement
    from hornbeam_ml.embedder.wish import Wish

logger = logging.getLogger("hornbeam.embedder")

_LONGEST_PREPARATION_S: Final = 900.0
FAILURES_COUNT_S: Final = 3600.0
"""How long an engine that failed is not tried again: the disk may have been full."""
_OF_A_MODEL: Final = ("modules.json", "config.json", *FILES.values())
_BF16_FLAGS: Final = {"avx512_bf16", "amx_bf16", "bf16"}


class Source:
    """A model on disk: a SentenceTransformer, or an export of one.

    Args:
        directory: Where it lies.
        label: What messages call it.
    """

    def __init__(self, directory: Path, label: str) -> None:
        self.directory = directory
        self.label = label
        self.exported = Workshop(directory) if Workshop(directory).settings() else None
        settings = self.exported.settings() if self.exported else None
        self.fingerprint = settings.fingerprint if settings else fingerprint_of(directory)

    def is_unchanged(self) -> bool:
        """Return whether the files are still those of which the fingerprint was taken."""
        return Source(self.directory, self.label).fingerprint == self.fingerprint

    def open(self, wish: Wish) -> Engine:
        """Return the engine that is asked for; converts and measures what was not before.

        Raises:
            ModelError: there is none.
        """
        if wish.backend == "sentence-transformers":
            return self._whole(wish, "")
        candidates = self._candidates(wish)
        if self.exported is None and [name for name, _ in candidates] == ["torch"]:
            logger.info("%s runs on torch %s", self.label, candidates[0][1])
            return self._torch(wish, candidates[0][1])
        return self._chosen(wish, candidates)

    def _candidates(self, wish: Wish) -> list[tuple[str, Precision]]:
        if wish.backend != "auto":
            check_installed(wish.backend)
        installed = [name for name in PRECISIONS if is_installed(name)]
        has_bf16 = wish.device != "cpu" or bool(_BF16_FLAGS & set(cpu_flags()))
        candidates = wish.candidates(installed=installed, has_bf16=has_bf16)
        if self.exported is not None:
            candidates = [
                pair
                for pair in candidates
                if pair in FILES and self.exported.path(FILES[pair]).is_file()
            ]
        if candidates:
            return candidates
        raise ModelError(
            f"nothing that is installed runs {self.directory} with backend={wish.backend!r}, "
            f"precision={wish.precision!r} on {wish.device}; installed: {installed or 'none'}"
        )

    def export(self, path: str | PathLike[str], wish: Wish) -> None:
        """Write all that is needed to run the model without torch; see `Embedder.export`."""
        target = _export_target(Path(path).expanduser(), self.directory)
        if self.exported is not None:
            target.discard()
            shutil.copytree(self.directory, target.directory, dirs_exist_ok=True)
            return
        engines = [
            pair for pair in FILES if is_installed(pair[0]) and pair[1] in ("fp32", wish.precision)
        ]
        if not engines:
            raise ModelError("nothing is installed to export for: onnxruntime or openvino")
        target.directory.mkdir(parents=True, exist_ok=True)
        report = self._prepared(target, wish, engines)
        if report.unsupported:
            raise ModelError(f"{self.directory} cannot be exported, since {report.unsupported}")
        failed = [found for found in report.measurements if found.problem]
        if len(failed) == len(engines):
            raise ModelError(f"{self.directory} cannot be exported: {report}")
        for found in failed:
            logger.warning("%s is not in the export: %s", found.backend, found.problem)

    # Choosing.

    def _chosen(self, wish: Wish, candidates: list[tuple[str, Precision]]) -> Engine:
        """Return the fastest of some engines, as it was measured once on this machine."""
        try:
            kept = workshop_for(self.fingerprint)
            report = self._report(kept, wish, candidates)
        except (OSError, ModelError, subprocess.SubprocessError) as error:
            if self.exported or ("torch", "fp32") not in candidates:
                raise ModelError(f"cannot prepare {self.directory}: {error}") from error
            logger.warning("%s runs on torch fp32, since: %s", self.label, error)
            return self._torch(wish, "fp32")
        if report.unsupported:
            return self._whole(wish, report.unsupported)
        best = self._best(report)
        if best.backend == "torch":
            return self._torch(wish, best.precision)  # type: ignore[arg-type]
        if best.backend == "openvino":
            openvino.check_process()
        if self.exported:
            return _open(self.exported, best)
        return self._kept(kept, wish, candidates, best)

    def _best(self, report: Report) -> Measurement:
        best = report.best()
        if best is None:
            raise ModelError(f"no engine runs {self.directory}: {report}")
        logger.info(
            "%s runs on %s %s, the fastest of: %s",
            *(self.label, best.backend, best.precision, report),
        )
        return best

    def _report(
        self, kept: Workshop, wish: Wish, candidates: list[tuple[str, Precision]]
    ) -> Report:
        """Return what is known of some engines; one process of the machine finds it out."""
        name = _choice_name(wish, candidates)
        files = self.exported or kept
        report = _remembered(kept, name, files)
        if report is None:
            with kept.only_one():
                report = _remembered(kept, name, files)
                if report is None:
                    report = self._measured(kept, wish, candidates)
        return report

    def _measured(
        self, kept: Workshop, wish: Wish, candidates: list[tuple[str, Precision]]
    ) -> Report:
        logger.info(
            "%s is converted and measured for streams=%d, once for this machine; takes about half "
            "a minute; kept in %s",
            *(self.label, wish.streams, kept.directory),
        )
        report = self._prepared(self.exported or kept, wish, candidates)
        if report.unsupported or report.best():
            kept.write(_choice_name(wish, candidates), msgspec.json.encode(report))
        return report

    def _kept(
        self,
        kept: Workshop,
        wish: Wish,
        candidates: list[tuple[str, Precision]],
        best: Measurement,
    ) -> Engine:
        """Open an engine whose files were kept, and make them again when they are damaged."""
        try:
            return _open(kept, best)
        except Exception as error:  # noqa: BLE001 - each library has errors of its own
            logger.warning("%s is made again, since: %s", kept.directory, _first_line(error))
        with kept.only_one():
            with contextlib.suppress(Exception):  # another process may have made them already
                return _open(kept, best)
            kept.discard()
            again = self._best(self._measured(kept, wish, candidates))
        if again.backend == "torch":
            return self._torch(wish, again.precision)  # type: ignore[arg-type]
        return _open(kept, again)

    def _prepared(
        self, files: Workshop, wish: Wish, candidates: Sequence[tuple[str, str]]
    ) -> Report:
        """Have a process of its own convert and measure."""
        request = Request(
            model=None if self.exported else str(self.directory),
            fingerprint=self.fingerprint,
            workshop=str(files.directory),
            device=wish.device,
            engines=list(candidates),
            streams=wish.streams,
        )
        return _run_preparation(request)

    # Opening.

    def _torch(self, wish: Wish, precision: Precision) -> Engine:
        from hornbeam_ml.embedder.checkpoint import Checkpoint
        from hornbeam_ml.embedder.description import describe
        from hornbeam_ml.embedder.engines.torch import TorchEngine
        from hornbeam_ml.embedder.engines.whole import WholeEngine
        from hornbeam_ml.embedder.tokens import TextTokenizer

        checkpoint = Checkpoint(self.directory, wish.device)
        try:
            settings = describe(checkpoint, self.fingerprint, checkpoint.encode(probe_texts()))
        except Unsupported as problem:
            self._say_whole(str(problem))
            return WholeEngine(checkpoint)
        tokenizer = TextTokenizer(checkpoint.tokenizer_definition(), settings)
        return TorchEngine(checkpoint, precision, tokenizer, settings)

    def _whole(self, wish: Wish, problem: str) -> Engine:
        from hornbeam_ml.embedder.checkpoint import Checkpoint
        from hornbeam_ml.embedder.engines.whole import WholeEngine

        if problem:
            self._say_whole(problem)
        return WholeEngine(Checkpoint(self.directory, wish.device))

    def _say_whole(self, problem: str) -> None:
        logger.warning("%s runs on SentenceTransformer.encode, since %s", self.label, problem)


def _export_target(path: Path, source: Path) -> Workshop:
    """Return where to export to.

    Raises:
        ModelError: a model lies there that is no export, or the very one to export.
    """
    target = Workshop(path)
    is_model = any(target.path(name).exists() for name in _OF_A_MODEL)
    if path.resolve() == source or (is_model and not target.path(SETTINGS).exists()):
        raise ModelError(f"{path} holds a model: export to another directory")
    return target


def _choice_name(wish: Wish, candidates: Sequence[tuple[str, str]]) -> str:
    key = machine_key(device=wish.device, streams=wish.streams, candidates=candidates)
    return f"choice-{key}.json"


def _remembered(kept: Workshop, name: str, files: Workshop) -> Report | None:
    """Return what was measured before, unless the file of the best is gone."""
    try:
        report = msgspec.json.decode(kept.path(name).read_bytes(), type=Report)
        age = time.time() - kept.path(name).stat().st_mtime
    except (OSError, msgspec.DecodeError):
        return None
    if age >= FAILURES_COUNT_S and any(found.problem for found in report.measurements):
        return None
    best = report.best()
    file = FILES.get((best.backend, best.precision)) if best else None
    return report if file is None or files.path(file).is_file() else None


def _open(files: Workshop, best: Measurement) -> Engine:
    return open_engine(files, best.backend, best.precision)  # type: ignore[arg-type]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _run_preparation(request: Request) -> Report:
    """Have `prepare` do what is asked for, and wait.

    Raises:
        ModelError: it crashed.
        subprocess.TimeoutExpired: it took too long.
    """
    ran = subprocess.run(  # noqa: S603 - this package's own program
        [sys.executable, "-m", "hornbeam_ml.embedder.prepare", str(os.getpid())],
        input=msgspec.json.encode(request),
        capture_output=True,
        timeout=_LONGEST_PREPARATION_S,
        check=False,
    )
    try:
        return msgspec.json.decode(ran.stdout, type=Report)
    except msgspec.DecodeError:
        last = ran.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        raise ModelError(f"preparing it ended with {ran.returncode}: {last[0]}") from None
