"""Where a process runs, so that others can tell whether it still does."""

from __future__ import annotations

import functools
from pathlib import Path


@functools.cache
def place() -> str:
    """Return what processes have in common that see each other's pids and files.

    It names the boot of the machine and two namespaces, and is empty where these cannot be read.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        spaces = [Path(f"/proc/self/ns/{kind}").readlink() for kind in ("pid", "mnt")]
    except OSError:
        return ""
    return " ".join([boot, *map(str, spaces)])


def is_alive(where: str, pid: int, began: int) -> bool | None:
    """Return whether a process still runs; None: it is elsewhere, and cannot be seen.

    Args:
        where: Its place.
        pid: Its pid there.
        began: When it began, since another one may have the pid by now.
    """
    if not where or where != place():
        return None
    return started(pid) == began


def started(pid: int) -> int | None:
    """Return when a process of this place began, in ticks since boot; None: there is none."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return None
    fields = status.rpartition(")")[2].split()  # a program may have any name, in parentheses
    return None if fields[0] in "ZX" else int(fields[19])
