"""The gunicorn worker class: ``gunicorn -k hornbeam app:app``.

A worker boots in steps: it sets its process up (thread budget, shared store), imports the app,
loads the registered models, and for an ASGI app runs its lifespan startup; only then does it
accept connections. A step that fails ends it with one clear line and gunicorn's boot error, which
stops the server.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import sys
import threading
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Final, NoReturn

from gunicorn.arbiter import Arbiter
from gunicorn.workers.gthread import ThreadWorker

from hornbeam_ml import asgi, cache, devices, identity, interfaces, models, threads
from hornbeam_ml.entry import WsgiEntry
from hornbeam_ml.web.handlers import install_in_frameworks
from hornbeam_state.config import REDIS_SCHEMES
from hornbeam_state.default import default_store
from hornbeam_state.errors import HornbeamError, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

DEFAULT_REQUEST_THREADS: Final = 32
BOOT_LIMIT_S: Final = 3600.0  # a boot that takes longer is taken for a deadlock
BOOT_NOTICE_S: Final = 30.0
QUICK_EXIT_S: Final = 1.0


class HornbeamWorker(ThreadWorker):  # type: ignore[misc] # gunicorn is untyped for us
    """Serves a WSGI app with gunicorn's threads, an ASGI app with uvicorn.

    The arbiter kills a worker that is silent for ``--timeout`` seconds. A booting worker may be
    silent for `BOOT_LIMIT_S`, whatever it does in that time, and one that drains for
    ``--graceful-timeout``. While it serves, its loop notifies: a model that computes for minutes
    in a request thread does no harm, and a loop that hangs gets the worker killed.

    gunicorn makes the object in the arbiter, before each fork and with a new configuration after
    SIGHUP, so nothing process-wide happens before `load_wsgi`.

    Attributes:
        budget: Compute threads of this process. Until the app is loaded: its share of the cores.
        server: The uvicorn server of an ASGI app once it starts, else None.
    """

    wsgi: Any

    def __init__(  # noqa: PLR0917 - gunicorn passes them like this
        self, age: int, ppid: int, sockets: Any, app: Any, timeout: float, cfg: Any, log: Any
    ) -> None:
        # One thread, gunicorn's default, could never form a batch; an explicit `--threads 1` looks
        # the same. The base class counts the connections it may keep alive from this setting.
        if cfg.threads == 1:
            cfg.set("threads", max(1, min(DEFAULT_REQUEST_THREADS, cfg.worker_connections // 2)))
        super().__init__(age, ppid, sockets, app, timeout, cfg, log)
        self.budget = threads.fair_share(threads.usable_cores(), cfg.workers)
        self.server: Any = None
        self._interface: interfaces.Interface = "wsgi"
        self._watch = _BootWatch(log)
        self._quitting = False

    # Booting. Except for `__init__` everything below runs in the worker's own process.

    def get_thread_pool(self) -> ThreadPoolExecutor:
        """Make the request threads; they run the WSGI app."""
        # OpenMP counts its threads per calling thread, and a copy of it that was loaded before
        # the fork has read another environment than ours.
        limit = self._limit_threads if self.cfg.preload_app else None
        return ThreadPoolExecutor(max_workers=self.cfg.threads, initializer=limit)

    def load_wsgi(self) -> None:
        """Set the process up and load the app. gunicorn calls this before `run`."""
        self.expect_silence(BOOT_LIMIT_S)
        self._watch.start()
        if not logging.getLogger("hornbeam").handlers:  # `--log-config` may have set some
            self.use_log("hornbeam", self.log.error_log)
        with self._boot_errors():
            self.budget = threads.thread_budget(self.budget)
            wanted = interfaces.wanted_interface(os.environ)
            threads.set_environment(self.budget)
            self._limit_threads()
            self._open_store()
            # One that replaces another gets its slot, and so its GPU; ages only ever grow.
            slot = cache.process_slot()
            devices.set_worker_slot(self.age - 1 if slot is None else slot)
        super().load_wsgi()
        with self._boot_errors():
            self._interface = interfaces.interface_of(self.wsgi, wanted)
            self._install_error_handlers()

    def load_models(self) -> Future[None]:
        """Start loading what is registered and not loaded yet, off this thread."""
        loading: Future[None] = Future()

        def load() -> None:
            try:
                models.load_all()
                identity.read_models()
            except BaseException as error:  # noqa: BLE001 - `check_boot` reports it
                loading.set_exception(error)
            else:
                loading.set_result(None)

        threading.Thread(target=load, name="hornbeam-load", daemon=True).start()
        return loading

    def check_boot(self, loading: Future[None]) -> None:
        """End the process if it was asked to stop meanwhile, or if a model failed to load."""
        if not self.is_wanted():
            if not loading.done():
                # Native code of a daemon thread may crash an interpreter that shuts down.
                atexit.register(os._exit, 0)
            sys.exit(0)
        error = loading.exception() if loading.done() else None
        if error is not None:
            if error.__cause__ is not None:
                self.log.error("%s", _traceback_of_app(error.__cause__))
            self.fail_boot(str(error) if isinstance(error, HornbeamError) else repr(error))

    def begin_serving(self) -> None:
        """End the boot: everything is loaded, and the next thing is to accept connections."""
        self._watch.stop()
        self._limit_threads()
        # What was loaded stays: the collector need not look through it at every full collection.
        gc.collect()
        gc.freeze()
        served = f"WSGI, {self.cfg.threads} request threads" if self.server is None else "ASGI"
        self.log.info("Ready: %s, compute threads: %d", served, self.budget)

    def fail_boot(self, message: str) -> NoReturn:
        """End the process with one line, and the exit code that stops the server."""
        self.log.error("Worker failed to boot: %s", message)
        sys.exit(Arbiter.WORKER_BOOT_ERROR)

    def use_log(self, name: str, own: logging.Logger) -> None:
        """Send a library's lines where gunicorn's own go, in the format of those."""
        logger = logging.getLogger(name)
        logger.handlers = own.handlers
        logger.setLevel(own.level)
        logger.propagate = False

    @contextlib.contextmanager
    def _boot_errors(self) -> Iterator[None]:
        try:
            yield
        except HornbeamError as error:
            self.fail_boot(str(error))

    def _install_error_handlers(self) -> None:
        try:
            install_in_frameworks(self.wsgi)
        except RuntimeError as error:
            self.log.warning("%s", error)
        if self._interface == "wsgi":
            self.wsgi = WsgiEntry(self.wsgi)  # those of an ASGI app are its connections'

    def _limit_threads(self) -> None:
        threads.limit_loaded(self.budget)

    def _open_store(self) -> None:
        """Find out now, not in a request, that the shared store is wrong or damaged."""
        store = default_store()
        try:
            store.check()
        except StoreUnavailable as error:
            if store.config.scheme not in REDIS_SCHEMES:
                raise
            self.log.warning("%s; serving all the same, as it may come back", error)

    # Serving.

    def run(self) -> None:
        """Serve until told to stop; gunicorn calls this when the app is loaded."""
        if self._interface != "wsgi":
            self.use_log("uvicorn.error", self.log.error_log)
            self.use_log("uvicorn.access", self.log.access_log)
            self._watch.step = "starting the app and loading models"
            self.server = asgi.server_for(self, self._interface)
            self.server.run([listener.sock for listener in self.sockets])
            return
        self._watch.step = "loading models"
        loading = self.load_models()
        while not wait([loading], timeout=0.1).done:
            self.check_boot(loading)
        self.check_boot(loading)
        self.begin_serving()
        super().run()

    def is_wanted(self) -> bool:
        """Return whether to go on: nobody asked the worker to stop, and the arbiter lives."""
        return bool(self.alive and self.is_parent_alive())

    def expect_silence(self, seconds: float) -> None:
        """Have the arbiter wait that much longer for the next `notify`, which ends the grace.

        A thread that notified instead would stop with the GIL: importing a large extension from
        a cold disk holds it for as long as the disk takes.
        """
        # The arbiter compares this file's time with its monotonic clock. (The time of a file
        # that nobody notified through yet is the wall clock's, so gunicorn 27 happens not to
        # time such a worker at all.)
        until = time.monotonic() + seconds
        os.utime(self.tmp.fileno(), (until, until))

    # Signals. Handlers run on the main thread, between two instructions of whatever it does.

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM: finish what is in flight, then stop. While the app is imported: stop now."""
        super().handle_exit(sig, frame)
        if not self.booted:
            sys.exit(0)

    def handle_quit(self, sig: int, frame: FrameType | None) -> None:
        """SIGQUIT and SIGINT: stop without waiting for requests."""
        if self._quitting:  # Ctrl-C in a terminal reaches the worker twice
            return
        self._quitting = True
        self._exit_soon(0)
        if self.server is None:
            super().handle_quit(sig, frame)
        else:
            # An exception from here would end up in the request that happens to run.
            self.alive = False
            self.server.force_exit = True
            self.cfg.worker_int(self)

    def handle_abort(self, sig: int, frame: FrameType | None) -> None:
        """SIGABRT: the arbiter found the worker silent for too long."""
        self._exit_soon(1)
        if self.server is not None:
            self.server.force_exit = True
        super().handle_abort(sig, frame)

    def _exit_soon(self, code: int) -> None:
        """Bound what is left of this process: a busy request thread would keep it for as long."""
        timer = threading.Timer(QUICK_EXIT_S, os._exit, (code,))
        timer.daemon = True
        timer.start()


def _traceback_of_app(error: BaseException) -> str:
    """Format an exception from where it left this package."""
    frames = error.__traceback__
    while frames and frames.tb_frame.f_globals.get("__name__", "").startswith("hornbeam_ml."):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))


class _BootWatch:
    """Logs every 30 s what a worker that boots slowly is doing."""

    def __init__(self, log: Any) -> None:
        self.step = "importing the app"
        self._log = log
        self._over = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name="hornbeam-boot", daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def _run(self) -> None:
        started = time.monotonic()
        while not self._over.wait(BOOT_NOTICE_S):
            elapsed = time.monotonic() - started
            self._log.warning("Still %s after %.0f s", self.step, elapsed)
