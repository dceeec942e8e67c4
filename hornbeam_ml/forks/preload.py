"""What the arbiter imports before it forks, so that all workers share that memory.

``HORNBEAM_PRELOAD=torch,sentence_transformers`` names modules, which are imported and no more;
gunicorn's own ``--preload`` imports the app. The modules are imported when the first worker is
made, not when the worker class is looked up: by then the arbiter knows the configuration, with
the number of workers and so their thread budget, which libraries read when they are imported.
"""

from __future__ import annotations

import gc
import importlib
import os
from typing import Any, Final

from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer

from hornbeam_ml import threads
from hornbeam_ml.forks.native_threads import unexplained_threads
from hornbeam_ml.telemetry import without_telemetry
from hornbeam_state.errors import ConfigError, HornbeamError

VARIABLE: Final = "HORNBEAM_PRELOAD"


class _Arbiter:
    """What was done in this process before forks.

    Attributes:
        used: Whether modules were named.
    """

    def __init__(self) -> None:
        self.used = False
        self._cfg: Any = None

    def prepare(self, cfg: Any, log: Any) -> None:
        if cfg is self._cfg:
            return  # a worker that replaces another, or one of several
        first, self._cfg = self._cfg is None, cfg  # SIGHUP makes another one
        names = [name for name in map(str.strip, os.environ.get(VARIABLE, "").split(",")) if name]
        self.used |= bool(names)
        try:
            if names:
                _import(names, cfg.workers)
        except HornbeamError as error:
            if first:
                raise HaltServer(str(error), Arbiter.WORKER_BOOT_ERROR) from error
            log.error("%s; going on without it", error)  # noqa: TRY400 - one line
        if self.used or cfg.preload_app:
            _freeze(log)


def prepare_fork(cfg: Any, log: Any) -> None:
    """Import what the environment names and settle the memory, once for each configuration.

    Raises:
        HaltServer: a module could not be imported at the start of the server. After SIGHUP that
            is logged, and the server goes on with the modules it has.
    """
    _arbiter.prepare(cfg, log)


def was_used() -> bool:
    """Return whether the environment named modules in this process or in its parent."""
    return _arbiter.used


def _import(names: list[str], workers: int) -> None:
    """Import modules as a worker would, with its thread budget.

    Raises:
        ConfigError: a module cannot be imported, or the budget is no number.
    """
    share = threads.fair_share(threads.usable_cores(), workers)
    with threads.environment(threads.thread_budget(share)), without_telemetry():
        for name in names:
            _import_one(name)


def _import_one(name: str) -> None:
    try:
        importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{VARIABLE}: {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def _freeze(log: Any) -> None:
    """Keep the collector, which writes to what it looks at, from what the workers share."""
    gc.collect()
    gc.freeze()
    count = unexplained_threads()
    if count:
        log.warning(
            "Native threads in the arbiter: %d. No worker will have them, and a library that waits "
            "for one hangs there",
            count,
        )


_arbiter = _Arbiter()
