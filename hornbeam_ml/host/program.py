"""One process of a model host: loads the servings of a module and answers calls of workers."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from hornbeam_ml import devices, threads
from hornbeam_ml.errors import ModelError
from hornbeam_ml.serving import chosen_hosts, registry
from hornbeam_state.errors import ConfigError, HornbeamError
from hornbeam_state.transports.local import Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
    from pathlib import Path

    from hornbeam_ml.host.spec import HostSpec
    from hornbeam_state.transports.base import Request

logger = logging.getLogger("hornbeam.host")

FAILED_EXIT: Final = 3
_THREADS: Final = 32  # for preprocess, postprocess and calls inline
_TELL_EVERY_S: Final = 1.0
_LAST_WORDS_S: Final = 0.2


def run(
    spec: HostSpec,
    directory: Path,
    index: int,
    *,
    processes: int,
    grace: float,
    loaded: Callable[[], None],
) -> int:
    """Serve until a signal says to stop; return the exit status.

    Args:
        spec: What to serve.
        directory: Where the socket goes.
        index: Which of the processes of the host this is, from 0.
        processes: How many there are; they share the cores.
        grace: Seconds that running calls have to finish when it stops.
        loaded: Called when everything is loaded.
    """
    chosen_hosts.use(lambda: None)  # what is defined here runs here
    budget = threads.thread_budget(threads.fair_share(threads.usable_cores(), processes))
    threads.set_environment(budget)
    threads.limit_loaded(budget)
    devices.set_worker_slot(index)
    return _run_loop(_Host(spec, directory / f"{index}.sock", grace, loaded).serve())


class _Host:
    """What the process does: a server on the event loop, and a thread that loads."""

    def __init__(
        self, spec: HostSpec, path: Path, grace: float, loaded: Callable[[], None]
    ) -> None:
        self._spec = spec
        self._note_loaded = loaded
        self._grace = grace
        self._hello = spec.hello()
        self._offers: dict[str, registry.Offer] = {}
        self._complete = False
        self._stopping = False
        self._failed: str | None = None
        self._server = Server(path, self)

    async def serve(self) -> int:
        """Answer calls until told to stop, or until loading fails."""
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, stop.set)
        loop.set_default_executor(ThreadPoolExecutor(_THREADS, "hornbeam-call"))
        try:
            await self._server.start()
        except ConfigError as error:
            logger.error("The model host failed: %s", error)  # noqa: TRY400 - it says it all
            return FAILED_EXIT
        loading = _in_thread(self._load, loop)
        stopping = asyncio.ensure_future(stop.wait())
        try:
            while not stop.is_set() and self._failed is None:
                self._server.announce(self._note())
                waiting: set[asyncio.Future[Any]] = {stopping}
                if not loading.done():
                    waiting.add(loading)
                await asyncio.wait(waiting, timeout=_TELL_EVERY_S, return_when="FIRST_COMPLETED")
                if loading.done():
                    self._failed = loading.result()
            self._stopping = stop.is_set()
            self._server.announce(self._note())
            if self._failed is not None:
                logger.error("The model host failed: %s", self._failed)
                await asyncio.sleep(_LAST_WORDS_S)
                return FAILED_EXIT
            await self._server.close(grace=self._grace)
        finally:
            stopping.cancel()
            await self._server.close()
        return 0

    def _load(self) -> str | None:
        """Import the module and load its servings; return what went wrong."""
        try:
            importlib.import_module(self._spec.module)
            self._offers = self._chosen()
            self._complete = True
            for target, offer in self._offers.items():
                offer.start()
                logger.info("The model host serves %s", target)
            self._note_loaded()
        except HornbeamError as error:
            if error.__cause__ is not None:
                logger.exception("Loading failed")
            return str(error)
        except BaseException as error:
            logger.exception("%s cannot be imported", self._spec.module)
            return f"{self._spec.module} cannot be imported: {type(error).__name__}: {error}"
        return None

    def _chosen(self) -> dict[str, registry.Offer]:
        """Return what the spec names of what the module defined.

        Raises:
            ConfigError: a name is not defined, or there is nothing to serve.
        """
        offers = registry.offers()
        missing = [name for name in self._spec.names if name not in offers]
        known = ", ".join(sorted(offers)) or "none"
        if missing:
            raise ConfigError(f"{self._spec.module} defines no {missing[0]!r}; it has: {known}")
        if not offers:
            raise ConfigError(f"{self._spec.module} defines no serving with a name, no embedder")
        return {name: offer for name, offer in offers.items() if self._spec.wants(name)}

    def _note(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "complete": self._complete,
            "failed": self._failed,
            "targets": {target: self._state(offer) for target, offer in self._offers.items()},
        }

    def _state(self, offer: registry.Offer) -> dict[str, Any]:
        """Return how clients see it; when the process is about to end, they call another one."""
        loaded = offer.loaded and not self._stopping
        return {
            "loaded": loaded,
            "ready": loaded and offer.ready,
            "info": offer.info() if loaded else {},
            "loads": list(offer.load_costs),
        }

    # Calls of clients.

    def greet(self, hello: Mapping[str, Any]) -> Mapping[str, Any]:
        """Let a client in that runs the same code.

        Raises:
            ModelError: it does not.
        """
        for name, own in self._hello.items():
            if hello.get(name) != own:
                raise ModelError(
                    f"the model host of {self._spec.module} runs another version of the code than "
                    f"this process ({name} differs): restart both, as a SIGHUP to gunicorn does"
                )
        return {"pid": os.getpid()}

    async def call(self, request: Request) -> Sequence[Any]:
        """Answer a call."""
        return await self._find(request).answer(request)

    def stream(self, request: Request) -> AsyncIterator[Any]:
        """Answer a call for chunks."""
        return self._find(request).answer_stream(request)

    def _find(self, request: Request) -> registry.Offer:
        offer = self._offers.get(request.target)
        if offer is None:
            known = ", ".join(sorted(self._offers)) or "nothing yet"
            raise ModelError(f"the model host serves no {request.target!r}; it serves: {known}")
        return offer


def _in_thread(
    load: Callable[[], str | None], loop: asyncio.AbstractEventLoop
) -> asyncio.Future[str | None]:
    """Run it in a daemon thread: loading may never end, and is not waited for at the exit."""
    future: asyncio.Future[str | None] = loop.create_future()

    def finish(outcome: str | None) -> None:
        if not future.done():
            future.set_result(outcome)

    def run_it() -> None:
        outcome = load()
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
            loop.call_soon_threadsafe(finish, outcome)

    threading.Thread(target=run_it, name="hornbeam-load", daemon=True).start()
    return future


def _run_loop(main: Coroutine[Any, Any, int]) -> int:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)
