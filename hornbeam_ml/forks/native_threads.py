"""Threads of this process that no Python code started."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Final

from threadpoolctl import ThreadpoolController

_TASKS: Final = Path("/proc/self/task")


def unexplained_threads() -> int:
    """Return how many native threads run beside Python's own and the pools of OpenBLAS.

    OpenBLAS ends its pool before a fork, and makes another one in the child. 0 where there is no
    ``/proc``.
    """
    if not _TASKS.exists():
        return 0
    known = {thread.native_id for thread in threading.enumerate()}
    native = {int(task.name) for task in _TASKS.iterdir()} - known
    pools = [
        int(library.num_threads) - 1
        for library in ThreadpoolController().lib_controllers
        if library.internal_api == "openblas"
    ]
    return max(0, len(native) - sum(pools))
