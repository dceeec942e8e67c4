"""Which servings a model host runs, and where it is found."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import re
import sys
import tempfile
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hornbeam_state.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SPEC: Final = "HORNBEAM_HOST"
WORKERS: Final = "HORNBEAM_HOST_WORKERS"
DIRECTORY: Final = "HORNBEAM_HOST_SOCKETS"
MOST_WORKERS: Final = 64
_SPEC: Final = re.compile(r"(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*)(:(?P<names>.*))?")


@dataclass(frozen=True)
class HostSpec:
    """What ``HORNBEAM_HOST`` asks for: ``app.models``, or ``app.models:name,name``.

    Attributes:
        module: The module that defines the servings.
        names: Those that the host runs; empty: all with a name, and all embedders.
    """

    module: str
    names: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> HostSpec:
        """Return what a text asks for.

        Raises:
            ConfigError: it is no module, or the names are missing.
        """
        found = _SPEC.fullmatch(text.strip())
        names = [name.strip() for name in (found["names"] or "").split(",")] if found else []
        if found is None or (found["names"] is not None and not all(names)):
            raise ConfigError(
                f"{SPEC}={text!r}: give a module, as in app.models or app.models:name"
            )
        return cls(found["module"], tuple(filter(None, names)))

    def __str__(self) -> str:
        return self.module + (f":{','.join(self.names)}" if self.names else "")

    def wants(self, target: str) -> bool:
        """Return whether a host runs what has this name."""
        return not self.names or target in self.names

    def source(self) -> Path:
        """Return the file of the module. Nothing is imported, not even the packages above it.

        Raises:
            ConfigError: there is no such module.
        """
        try:
            found = _find(self.module)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{SPEC}={self}: {error}") from error
        if found is None or not found.origin or not found.has_location:
            raise ConfigError(f"{SPEC}={self}: there is no module {self.module!r} to import")
        return Path(found.origin)

    def hello(self) -> dict[str, Any]:
        """Return what client and host have to agree on, or one would misread the other.

        Raises:
            ConfigError: there is no such module.
        """
        try:
            source = self.source().read_bytes()
        except OSError as error:
            raise ConfigError(f"{SPEC}={self}: {error}") from error
        return {
            "module": self.module,
            "source": hashlib.blake2b(source, digest_size=16).hexdigest(),
            "hornbeam": _version(),
            "python": "{}.{}".format(*sys.version_info),
        }


def wanted_spec(environ: Mapping[str, str] = os.environ) -> HostSpec | None:
    """Return what ``HORNBEAM_HOST`` asks for; None: there is no model host.

    Raises:
        ConfigError: it cannot be read.
    """
    text = environ.get(SPEC, "").strip()
    return HostSpec.parse(text) if text else None


def wanted_workers(environ: Mapping[str, str] = os.environ) -> int:
    """Return how many processes a model host has: ``HORNBEAM_HOST_WORKERS``, or 1.

    Raises:
        ConfigError: it is no number from 1 to 64.
    """
    text = environ.get(WORKERS, "").strip() or "1"
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= MOST_WORKERS):
        raise ConfigError(f"{WORKERS}={text!r}: give a whole number from 1 to {MOST_WORKERS}")
    return int(text)


def default_directory(spec: HostSpec, environ: Mapping[str, str] = os.environ) -> Path:
    """Return where the sockets of a host lie that was started by hand.

    Clients of the same user and working directory find the same; ``HORNBEAM_HOST_SOCKETS``
    names another.
    """
    named = environ.get(DIRECTORY, "").strip()
    if named:
        return Path(named).absolute()
    app = hashlib.blake2b(f"{Path.cwd()}\0{spec.module}".encode(), digest_size=8).hexdigest()
    root = environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return Path(root) / f"hornbeam-{os.getuid()}-{app}"


def _find(module: str) -> ModuleSpec | None:
    """Return where a module is. `importlib.util.find_spec` would import the packages above it.

    In the arbiter that would be for good: all workers to come would have that code.
    """
    importlib.invalidate_caches()  # the file may have come this moment
    name, *rest = module.split(".")
    found = importlib.util.find_spec(name)
    for part in rest:
        if found is None:
            break
        name = f"{name}.{part}"
        found = _find_in(found.submodule_search_locations or (), name)
    return found


def _find_in(directories: Iterable[str], name: str) -> ModuleSpec | None:
    """Return what of that name is in the directories of a package."""
    portions: list[str] = []
    for directory in directories:
        finder = pkgutil.get_importer(directory)
        found = None if finder is None else finder.find_spec(name)
        if found is not None and found.loader is not None:
            return found
        if found is not None:  # a directory without an __init__.py
            portions += found.submodule_search_locations or ()
    if not portions:
        return None
    package = ModuleSpec(name, None, is_package=True)
    package.submodule_search_locations = portions
    return package


def _version() -> str:
    try:
        return importlib.metadata.version("hornbeam")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
