"""Names of nodes: ``name@host``."""

from __future__ import annotations

import os
import re
import socket
import sys
from pathlib import Path
from typing import Final

from hornbeam_state.errors import ConfigError

VARIABLE: Final = "HORNBEAM_NODE"
_NAME: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}@[A-Za-z0-9_.-]{1,64}")
_NOT_IN_A_NAME: Final = re.compile(r"[^A-Za-z0-9_.:-]+")


def host_name() -> str:
    """Return the short name of this machine."""
    return socket.gethostname().partition(".")[0] or "localhost"


def full_name(name: str | None = None) -> str:
    """Return the name of a node of this machine.

    Args:
        name: What to call it, with or without ``@host``; None: what ``HORNBEAM_NODE`` says, and
            without that the name of the program.

    Raises:
        ConfigError: it is no name.
    """
    chosen = name or os.environ.get(VARIABLE) or _program()
    full = chosen if "@" in chosen else f"{chosen}@{host_name()}"
    if not _NAME.fullmatch(full):
        raise ConfigError(
            f"node name {full!r}: give letters, digits and _ . : - on either side of one @, at "
            f"most 64 of them"
        )
    return full


def _program() -> str:
    argument = sys.argv[0] if sys.argv else ""  # an embedded interpreter has no arguments
    path = Path(argument)
    stem = path.parent.name if path.name == "__main__.py" else path.stem
    return _NOT_IN_A_NAME.sub("-", stem).strip("-")[:64] or "python"
