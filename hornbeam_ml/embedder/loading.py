"""From what a user asks for to an engine: candidates, the choice among them, opening it."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, get_args

import msgspec

from hornbeam_ml.embedder.engines.opening import check_installed, is_installed, open_engine
from hornbeam_ml.embedder.fingerprint import fingerprint_of
from hornbeam_ml.embedder.measurements import Report, Request
from hornbeam_ml.embedder.probe import check_same, probe_texts
from hornbeam_ml.embedder.settings import Unsupported
from hornbeam_ml.embedder.workshop import FILES, Workshop, cpu_flags, machine_key, workshop_for
from hornbeam_ml.errors import ModelError
from hornbeam_state.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    from hornbeam_ml.embedder.engines.base import Engine, Precision

logger = logging.getLogger("hornbeam.embedder")

Backend = Literal["auto", "torch", "onnx", "openvino", "sentence-transformers"]
AskedPrecision = Literal["auto", "exact", "fp32", "bf16", "int8"]
_LONGEST_PREPARATION_S: Final = 900.0
_PRECISIONS: Final[dict[str, tuple[Precision, ...]]] = {
    "torch": ("fp32", "bf16"),
    "openvino": ("fp32", "bf16"),
    "onnx": ("fp32", "int8"),
}
_BF16_FLAGS: Final = {"avx512_bf16", "amx_bf16", "bf16"}


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
        if self.backend in _PRECISIONS and not self._pairs([self.backend], has_bf16=True):
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
            for precision in _PRECISIONS.get(backend, ())
            if precision in wanted and (precision != "bf16" or has_bf16)
        ]


class Source:
    """A model on disk: a SentenceTransformer, or an export of one.

    Args:
        directory: Where it lies.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.exported = Workshop(directory) if Workshop(directory).settings() else None
        settings = self.exported.settings() if self.exported else None
        self.fingerprint = settings.fingerprint if settings else fingerprint_of(directory)

    def open(self, wish: Wish) -> Engine:
        """Return the engine that is asked for; converts and measures what was not before.

        Raises:
            ModelError: there is none.
        """
        if wish.backend == "sentence-transformers":
            return self._whole(wish, "")
        candidates = self._candidates(wish)
        if self.exported is None and [name for name, _ in candidates] == ["torch"]:
            return self._torch(wish, candidates[0][1])
        return self._chosen(wish, candidates)

    def _candidates(self, wish: Wish) -> list[tuple[str, Precision]]:
        if wish.backend != "auto":
            check_installed(wish.backend)
        installed = [name for name in _PRECISIONS if is_installed(name)]
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
        target = Workshop(Path(path))
        if self.exported is not None:
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
            return self._without_choice(wish, error)
        if report.unsupported:
            return self._whole(wish, report.unsupported)
        return self._best(kept, wish, report)

    def _report(
        self, kept: Workshop, wish: Wish, candidates: list[tuple[str, Precision]]
    ) -> Report:
        """Return what is known of some engines; one process of the machine finds it out."""
        key = machine_key(device=wish.device, streams=wish.streams, candidates=candidates)
        name = f"choice-{key}.json"
        report = self._remembered(kept, name)
        if report is None:
            with kept.only_one():
                report = self._remembered(kept, name)
                if report is None:
                    logger.info(
                        "%s is converted and measured, once for this machine; takes about half a "
                        "minute; kept in %s",
                        *(self.directory.name, kept.directory),
                    )
                    report = self._prepared(kept, wish, candidates)
                    kept.write(name, msgspec.json.encode(report))
        return report

    def _remembered(self, kept: Workshop, name: str) -> Report | None:
        """Return what was measured before, unless a file of it is gone."""
        try:
            report = msgspec.json.decode(kept.path(name).read_bytes(), type=Report)
        except (OSError, msgspec.DecodeError):
            return None
        best = report.best()
        file = FILES.get((best.backend, best.precision)) if best else None
        files = self.exported or kept
        return report if file is None or files.path(file).is_file() else None

    def _best(self, kept: Workshop, wish: Wish, report: Report) -> Engine:
        best = report.best()
        if best is None:
            raise ModelError(f"no engine runs {self.directory}: {report}")
        logger.info(
            "%s runs on %s %s, the fastest of: %s",
            *(self.directory.name, best.backend, best.precision, report),
        )
        if best.backend == "torch":
            return self._torch(wish, best.precision)  # type: ignore[arg-type]
        workshop = self.exported or kept
        return open_engine(workshop, best.backend, best.precision)  # type: ignore[arg-type]

    def _prepared(
        self, kept: Workshop, wish: Wish, candidates: Sequence[tuple[str, str]]
    ) -> Report:
        """Have a process of its own convert and measure."""
        request = Request(
            model=None if self.exported else str(self.directory),
            fingerprint=self.fingerprint,
            workshop=str((self.exported or kept).directory),
            device=wish.device,
            engines=list(candidates),
            streams=wish.streams,
        )
        return _run_preparation(request)

    def _without_choice(self, wish: Wish, error: Exception) -> Engine:
        """Make do with torch, which needs no preparation."""
        if self.exported or wish.backend not in ("auto", "torch"):
            raise ModelError(f"cannot prepare {self.directory}: {error}") from error
        logger.warning("%s runs on torch fp32, since: %s", self.directory.name, error)
        return self._torch(wish, "fp32")

    # Opening.

    def _torch(self, wish: Wish, precision: Precision) -> Engine:
        from hornbeam_ml.embedder.checkpoint import Checkpoint
        from hornbeam_ml.embedder.engines.torch import TorchEngine
        from hornbeam_ml.embedder.engines.whole import WholeEngine
        from hornbeam_ml.embedder.tokens import TextTokenizer

        checkpoint = Checkpoint(self.directory, wish.device)
        try:
            settings = checkpoint.settings(self.fingerprint)
            tokenizer = TextTokenizer(checkpoint.tokenizer_definition(), settings)
            engine = TorchEngine(checkpoint, "fp32", tokenizer, settings)
            check_same(engine, checkpoint.encode(probe_texts()))
        except Unsupported as problem:
            self._say_whole(str(problem))
            return WholeEngine(checkpoint)
        return TorchEngine(checkpoint, precision, tokenizer, settings)

    def _whole(self, wish: Wish, problem: str) -> Engine:
        from hornbeam_ml.embedder.checkpoint import Checkpoint
        from hornbeam_ml.embedder.engines.whole import WholeEngine

        if problem:
            self._say_whole(problem)
        return WholeEngine(Checkpoint(self.directory, wish.device))

    def _say_whole(self, problem: str) -> None:
        logger.warning(
            "%s runs on SentenceTransformer.encode, since %s", self.directory.name, problem
        )


def _run_preparation(request: Request) -> Report:
    """Have `prepare` do what is asked for, and wait.

    Raises:
        ModelError: it crashed.
        subprocess.TimeoutExpired: it took too long.
    """
    ran = subprocess.run(
        [sys.executable, "-m", "hornbeam_ml.embedder.prepare"],
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
