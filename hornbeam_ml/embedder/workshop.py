"""Where converted models and choices are kept: a directory of this user on this machine."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import stat
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from hornbeam_ml.embedder.settings import FORMAT, TextSettings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PLACE: Final = "HORNBEAM_CACHE"
_LEFT_BEHIND_S: Final = 3600.0
_LIBRARIES: Final = (
    *("torch", "transformers", "sentence-transformers", "tokenizers"),
    *("openvino", "onnx", "onnxscript", "onnxruntime"),
)
SETTINGS: Final = "hornbeam.json"
TOKENIZER: Final = "tokenizer.json"
REFERENCE: Final = "probe.npy"
FILES: Final = {
    ("openvino", "fp32"): "openvino/model.xml",
    ("openvino", "bf16"): "openvino/model.xml",
    ("onnx", "fp32"): "onnx/model.onnx",
    ("onnx", "int8"): "onnx/model-int8.onnx",
}


class Workshop:
    """The files of one model. Whatever is there is complete: files are put in place when done.

    Args:
        directory: Where they are.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, name: str) -> Path:
        """Return where a file is."""
        return self.directory / name

    def settings(self) -> TextSettings | None:
        """Return the description of the model; None when there is none of this version."""
        try:
            found = msgspec.json.decode(self.path(SETTINGS).read_bytes(), type=TextSettings)
        except (OSError, msgspec.DecodeError):
            return None
        return found if found.format == FORMAT else None

    def tokenizer_definition(self) -> str:
        """Return the content of its ``tokenizer.json``."""
        return self.path(TOKENIZER).read_text("utf-8")

    def discard(self) -> None:
        """Remove what describes the model, and then whatever was made of it."""
        for name in (SETTINGS, *FILES.values()):
            self.path(name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def only_one(self) -> Iterator[None]:
        """Keep the other processes of this machine out; blocks until they are."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self.path("lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._clean_up()
            yield

    def _clean_up(self) -> None:
        """Remove what processes that were killed left half written."""
        for folder in self.directory.glob(".new-*"):
            with contextlib.suppress(OSError):
                if time.time() - folder.stat().st_mtime > _LEFT_BEHIND_S:
                    shutil.rmtree(folder)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Give a path to write a file to, which gets its name when the block ends well.

        Its folder is its own, since some formats write more than one file.
        """
        target = self.path(name)
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=self.directory, prefix=".new-") as folder:
            yield Path(folder) / target.name
            written = sorted(Path(folder).iterdir(), key=lambda path: path.name == target.name)
            for path in written:  # the one that says that all are there comes last
                path.replace(target.parent / path.name)

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole."""
        with self.writing(name) as path:
            path.write_bytes(data)


def workshop_for(fingerprint: str, environ: Mapping[str, str] = os.environ) -> Workshop:
    """Return where the files of a model are kept that these versions of the libraries make.

    That is in ``HORNBEAM_CACHE``; when that is not set, in ``$XDG_CACHE_HOME/hornbeam`` or
    ``~/.cache/hornbeam``, and when these cannot be written to, in the directory for temporary
    files.

    Raises:
        OSError: none of them can be written to.
    """
    made_with = _digest({"libraries": {name: _version(name) for name in _LIBRARIES}})
    for root in _roots(environ):
        directory = root / f"{fingerprint[:32]}-{made_with}"
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            if all(map(_is_ours, (root.parent, directory))) and os.access(directory, os.W_OK):
                return Workshop(directory)
        except OSError:
            continue
    raise OSError(f"no directory to keep converted models in: set {PLACE}")


def machine_key(**others: Any) -> str:
    """Return a digest of what else decides how fast an engine is: the CPU, and `others`."""
    return _digest({"cpu": cpu_flags(), **others})


def _digest(facts: dict[str, Any]) -> str:
    data = msgspec.json.encode({"format": FORMAT, **facts}, order="deterministic")
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _roots(environ: Mapping[str, str]) -> Iterator[Path]:
    if environ.get(PLACE):
        yield Path(environ[PLACE]).expanduser() / "embedders"
        return
    with contextlib.suppress(RuntimeError):  # no home
        home = environ.get("XDG_CACHE_HOME") or "~/.cache"
        yield Path(home).expanduser() / "hornbeam" / "embedders"
    yield Path(tempfile.gettempdir()) / f"hornbeam-{os.geteuid()}" / "embedders"


def _is_ours(directory: Path) -> bool:
    """Return whether nobody else can put files of theirs in the place of ours."""
    found = directory.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & stat.S_IWOTH


def cpu_flags() -> list[str]:
    """Return what the processor says it can do, sorted; where it does not say, its name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return sorted(line.partition(":")[2].split())
    return [platform.machine(), platform.processor()]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
