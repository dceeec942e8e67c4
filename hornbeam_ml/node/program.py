"""The process of ``hornbeam node``: loads a module, and serves what it offers."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import signal
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hornbeam_ml import devices, models, supervisor, threads
from hornbeam_ml.errors import ModelError
from hornbeam_ml.node.servings import serve
from hornbeam_ml.serving import registry
from hornbeam_state.default import default_store
from hornbeam_state.errors import ConfigError, HornbeamError
from hornbeam_state.rpc.exposed import exposed_names
from hornbeam_state.rpc.names import VARIABLE, full_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from hornbeam_state.rpc.server import NodeServer

logger = logging.getLogger("hornbeam.node")

REFUSED_EXIT: Final = 2
_LOST_EXIT: Final = 3


@dataclass(frozen=True, kw_only=True)
class NodeSpec:
    """What a node serves, and as whom.

    Attributes:
        module: What it imports.
        name: ``name`` or ``name@host``; None: ``HORNBEAM_NODE``, or the name of the module.
        tags: Words by which others may choose it.
        concurrency: How many functions run at a time.
        queue_limit: How many more may wait.
        grace: Seconds that calls have to finish when it is told to end.
    """

    module: str
    name: str | None
    tags: tuple[str, ...]
    concurrency: int
    queue_limit: int
    grace: float

    def full_name(self) -> str:
        """Return ``name@host``.

        Raises:
            ConfigError: it is no name.
        """
        named = self.name or os.environ.get(VARIABLE)
        return full_name(named or self.module.rpartition(".")[2])


def supervise(spec: NodeSpec) -> int:
    """Keep a node running until a signal says to stop; return the exit status.

    When it cannot start the first time, that is the end: it has said why. Later it is tried
    again.
    """

    def run_here(_index: int, loaded: Callable[[], None]) -> int:
        return run(spec, loaded)

    what = f"The process of the node {spec.full_name()}"
    return supervisor.supervise(
        run_here, what=what, grace=spec.grace, fatal=REFUSED_EXIT, ends_on_hangup=True
    )


def run(spec: NodeSpec, loaded: Callable[[], None]) -> int:
    """Serve until a signal says to stop; return the exit status.

    Args:
        spec: What to serve.
        loaded: Called when others can call it.
    """
    os.environ[VARIABLE] = spec.full_name()  # what `node()` says while the module loads
    try:
        _check_store()  # before models load, which may take minutes
        _load(spec.module)
        return asyncio.run(_serve(spec, loaded))
    except HornbeamError as error:
        logger.debug("Starting failed", exc_info=error)
        logger.error("The node cannot start: %s", error)  # noqa: TRY400 - it says it all
        return REFUSED_EXIT


async def _serve(spec: NodeSpec, loaded: Callable[[], None]) -> int:
    # On an event loop, which any thread's signal wakes: a lock that the main thread waits for
    # without a bound was seen to sleep through a SIGTERM.
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):  # before there are calls to finish
        loop.add_signal_handler(signum, stop.set)
    server = await asyncio.to_thread(
        serve,
        spec.full_name(),
        tags=spec.tags,
        concurrency=spec.concurrency,
        queue_limit=spec.queue_limit,
    )
    loaded()
    _say_ready(spec, server)
    ended = asyncio.ensure_future(asyncio.to_thread(server.wait))
    told = asyncio.ensure_future(stop.wait())
    await asyncio.wait({ended, told}, return_when=asyncio.FIRST_COMPLETED)
    if not told.done():
        told.cancel()
        return _LOST_EXIT  # another process has its name
    logger.info("The node %s ends; %d calls run", server.name, server.running)
    await server.aclose(spec.grace)
    return 0


def _check_store() -> None:
    """Find out whether others could find a node here.

    Raises:
        ConfigError: the store is of this process alone.
        StoreUnavailable: it cannot be reached.
    """
    store = default_store()
    if store.config.scheme == "memory":
        raise ConfigError("HORNBEAM_STORE=memory:// is for one process: give one that is shared")
    store.check()


def _load(module: str) -> None:
    """Import the module and load its models.

    Raises:
        ConfigError: there is nothing to serve.
        ModelError: it cannot be imported, or a model cannot be loaded.
    """
    budget = threads.thread_budget(threads.usable_cores())
    threads.set_environment(budget)
    threads.limit_loaded(budget)
    devices.set_worker_slot(0)
    try:
        importlib.import_module(module)
    except BaseException as error:
        what = f"{type(error).__name__}: {error}{_place_of(error)}"
        raise ModelError(f"{module} cannot be imported: {what}") from error
    models.load_all()
    threads.limit_loaded(budget)
    if not exposed_names() and not registry.loaded():
        raise ConfigError(f"{module} exposes no function and defines no serving with a name")


def _place_of(error: BaseException) -> str:
    """Return where in somebody's code it was raised; nothing, if it was not."""
    machinery = {__file__, importlib.__file__}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename not in machinery and not frame.filename.startswith("<"):
            return f" ({Path(frame.filename).name}, line {frame.lineno})"
    return ""


def _say_ready(spec: NodeSpec, server: NodeServer) -> None:
    """Write the one line for whoever started the node."""
    parts = [
        spec.module,
        _count(len(exposed_names()), "function"),
        _count(len(registry.loaded()), "serving"),
        f"concurrency {spec.concurrency}",
        f"store {default_store().config.safe_url}",
    ]
    with contextlib.suppress(OSError):  # nobody reads it
        print(f"{server.name} ready: {', '.join(parts)}", flush=True)  # noqa: T201 - as said
    logger.info("The node %s is ready", server.name)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
