"""Keeps OpenVINO from reporting its use to its makers.

Importing it does that in a thread, which starts a process: that is nothing for a worker, whose
processes and connections are its operator's. The user's own consent, a file, stays as it is.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, Final

from hornbeam_state.errors import MISSING

if TYPE_CHECKING:
    from collections.abc import Iterator

_REPORTER: Final = "openvino_telemetry"


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
    """Have OpenVINO, when it is first imported in the block, find nothing to report with.

    It then has a stand-in for good, which does nothing. Other code that imports the reporting
    package may do so before and after; in the block, which one thread at a time is in, it cannot.
    """
    modules: dict[str, Any] = sys.modules
    with _blocking:
        before = modules.get(_REPORTER, MISSING)
        modules[_REPORTER] = None  # this is how an import is made to fail
        try:
            yield
        finally:
            if before is MISSING:
                del modules[_REPORTER]
            else:
                modules[_REPORTER] = before


def _after_fork() -> None:
    global _blocking  # noqa: PLW0603 - a thread of the parent may hold it
    _blocking = threading.Lock()
    if sys.modules.get(_REPORTER, MISSING) is None:
        del sys.modules[_REPORTER]


_blocking = threading.Lock()
os.register_at_fork(after_in_child=_after_fork)
