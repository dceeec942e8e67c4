"""Keeps the processes of a model host running, and takes their sockets away in the end."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from hornbeam_ml import supervisor
from hornbeam_ml.host import program
from hornbeam_state.errors import ConfigError
from hornbeam_state.transports.local import remove_stale

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hornbeam_ml.host.spec import HostSpec


def supervise(
    spec: HostSpec, directory: Path, processes: int, *, lease: int | None, grace: float
) -> int:
    """Run the processes of a host until a signal or the lease says to stop.

    Args:
        spec: What to serve.
        directory: Where the sockets go.
        processes: How many processes.
        lease: A descriptor that reads as ended when nobody is left whom the host is for.
        grace: Seconds that running calls have to finish.

    Returns:
        The exit status.
    """

    def run(index: int, loaded: Callable[[], None]) -> int:
        return program.run(spec, directory, index, processes=processes, grace=grace, loaded=loaded)

    status = supervisor.supervise(
        run, what="A process of the model host", grace=grace, processes=processes, lease=lease
    )
    for index in range(processes):
        with contextlib.suppress(ConfigError, OSError):  # another host's stay
            remove_stale(directory / f"{index}.sock")
    with contextlib.suppress(OSError):
        directory.rmdir()
    return status
