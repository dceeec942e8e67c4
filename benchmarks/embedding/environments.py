"""The virtual environments of the contenders, made when they are first needed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import TYPE_CHECKING

from common import note
from embedding.load import MODEL

if TYPE_CHECKING:
    from embedding.contenders import Contender


def default_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "hornbeam-benchmarks"


def binaries(contender: Contender, folder: Path) -> Path:
    """Return the folder of an environment's programs, installing what is not there yet.

    The requirements name torch without a build; pip's own configuration says where a small one
    for CPUs lies.
    """
    if contender.ours:
        return Path(sys.executable).parent
    home = folder / contender.app
    requirements = contender.folder / "requirements.txt"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    stamp = home / "installed"
    if not stamp.exists() or stamp.read_text() != digest:
        note(f"installing {contender.app} into {home}")
        if not (home / "bin" / "python").exists():
            venv.create(home, with_pip=True)
        pip = [str(home / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
        run([*pip, "-r", str(requirements)])
        stamp.write_text(digest)
    return home / "bin"


def exported(contender: Contender, folder: Path) -> Path | None:
    """Return the model as ONNX, for the contender that wants it, made with its own tools."""
    if "{export}" not in contender.command:
        return None
    home = folder / "minilm-onnx"
    if not (home / "done").exists():
        note(f"exporting the model to {home}")
        python = binaries(contender, folder) / "python"
        run([str(python), str(contender.folder / "export.py"), str(MODEL), str(home)])
        (home / "done").touch()
    return home


def versions(bin_folder: Path) -> dict[str, str]:
    """Return what is installed in an environment."""
    listing = run([str(bin_folder / "python"), "-m", "pip", "list", "--format", "json"])
    return {package["name"].lower(): package["version"] for package in json.loads(listing)}


def run(command: list[str]) -> str:
    done = subprocess.run(
        command,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout
