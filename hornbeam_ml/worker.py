"""The gunicorn worker class: ``gunicorn -k hornbeam app:app``.

A worker boots in steps: it sets its process up (thread budget, shared store), imports the app,
loads the registered models, and for an ASGI app runs its lifespan startup; only then does it
accept connections. A step that fails ends it with one clear line: in a server of which no worker
was ever ready with gunicorn's boot error, which stops the server, else with another code.

What it makes of the others of its server, `lifecycle` says: it leaves to those of a newer
configuration once they are ready, and takes turns when it is to be replaced.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import logging
import math
import os
import socket
import sys
import threading
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Final, NoReturn

from gunicorn.arbiter import Arbiter
from gunicorn.errors import AppImportError
from gunicorn.util import make_fail_app
from gunicorn.workers.gthread import TConn, ThreadWorker

from hornbeam_ml import devices, identity, models, readiness, threads
from hornbeam_ml.forks import fork_hazards, preload
from hornbeam_ml.host import launch
from hornbeam_ml.http import asgi, interfaces, settings
from hornbeam_ml.http.entry import WsgiEntry
from hornbeam_ml.lifecycle import board, recycling
from hornbeam_ml.lifecycle.boot import BootError, BootWatch, traceback_of_app
from hornbeam_ml.lifecycle.lifecycle import Lifecycle
from hornbeam_ml.node.worker_node import WorkerNode
from hornbeam_ml.serving import registry
from hornbeam_ml.web import figures
from hornbeam_ml.web.admin import with_pages
from hornbeam_ml.web.handlers import install_in_frameworks
from hornbeam_state.config import REDIS_SCHEMES
from hornbeam_state.default import default_store
from hornbeam_state.errors import HornbeamError, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

DEFAULT_REQUEST_THREADS: Final = 32
BOOT_LIMIT_S: Final = 3600.0  # a boot that takes longer is taken for a deadlock
QUICK_EXIT_S: Final = 1.0
_RELOAD_PAUSE_S: Final = 2.0  # at most, before the next try to boot an app under development
_POLL_S: Final = 0.02


class HornbeamWorker(ThreadWorker):  # type: ignore[misc] # gunicorn is untyped for us
    """Serves a WSGI app with gunicorn's threads, an ASGI app with uvicorn.

    The arbiter kills a worker that is silent for ``--timeout`` seconds. A booting worker may be
    silent for `BOOT_LIMIT_S`, whatever it does in that time, and one that drains for
    ``--graceful-timeout``. While it serves, its loop notifies: a model that computes for minutes
    in a request thread does no harm, and a loop that hangs gets the worker killed.

    gunicorn makes the object in the arbiter, before each fork and with a new configuration after
    SIGHUP. Before `load_wsgi` nothing happens that concerns one worker only.

    Attributes:
        budget: Compute threads of this process. Until the app is loaded: its share of the cores.
        server: The uvicorn server of an ASGI app once it starts, else None.
    """

    wsgi: Any
    alive: bool
    max_requests: int

    @classmethod
    def setup(cls) -> None:
        """Watch the arbiter; gunicorn calls this there, before it may import the app."""
        fork_hazards.watch()

    def __init__(  # noqa: PLR0917 - gunicorn passes them like this
        self, age: int, ppid: int, sockets: Any, app: Any, timeout: float, cfg: Any, log: Any
    ) -> None:
        self._changed = settings.changed(cfg)
        # One thread, gunicorn's default, could never form a batch; an explicit `--threads 1` looks
        # the same. The base class counts the connections it may keep alive from this setting.
        if cfg.threads == 1:
            cfg.set("threads", max(1, min(DEFAULT_REQUEST_THREADS, cfg.worker_connections // 2)))
        preload.prepare_fork(cfg, log)
        super().__init__(age, ppid, sockets, app, timeout, cfg, log)
        self._life = Lifecycle(self, cfg)
        # gunicorn's own loop would stop at this number, with or without another that is ready.
        self._most_requests = None if self.max_requests == sys.maxsize else self.max_requests
        self.max_requests = sys.maxsize
        self.budget = threads.fair_share(threads.usable_cores(), cfg.workers)
        self.server: Any = None
        self._interface: interfaces.Interface = "wsgi"
        self._watch = BootWatch(log)
        self._limits = recycling.Limits(self._most_requests, None)
        self._quitting = False
        self._broken = False
        self._left_at = math.inf
        self._host = launch.HostOfWorker(cfg)
        self._node = WorkerNode()

    # Booting. Except for `__init__` everything below runs in the worker's own process.

    def init_process(self) -> None:
        """Boot and serve; gunicorn calls this in the new process, which ends afterwards."""
        self._life.begin()
        try:
            super().init_process()
        except BaseException as error:
            if self._life.booting and self.is_wanted():
                self._end_boot(error)
            raise
        finally:
            self._life.end()

    def _end_boot(self, error: BaseException) -> NoReturn:
        """End a process that cannot boot; the server too, unless it has served before."""
        code = Arbiter.WORKER_BOOT_ERROR
        if isinstance(error, AppImportError):
            self.log.error("Worker failed to boot: %s", error)
            code = Arbiter.APP_LOAD_ERROR
        elif isinstance(error, SystemExit) and not isinstance(error, BootError):
            self.log.error("Worker failed to boot: the app called sys.exit(%r)", error.code)
        elif isinstance(error, Exception):
            self.log.error("Worker failed to boot", exc_info=error)
        sys.exit(1 if self._life.fail() else code)

    def get_thread_pool(self) -> ThreadPoolExecutor:
        """Make the request threads; they run the WSGI app."""
        # OpenMP counts its threads per calling thread, and a copy of it that was loaded before
        # the fork has read another environment than ours.
        preloaded = self.cfg.preload_app or preload.was_used()
        limit = self._limit_threads if preloaded else None
        return ThreadPoolExecutor(max_workers=self.cfg.threads, initializer=limit)

    def load_wsgi(self) -> None:
        """Set the process up and load the app. gunicorn calls this before `run`."""
        self.expect_silence(BOOT_LIMIT_S)
        readiness.boot()
        self._life.pause(_RELOAD_PAUSE_S if self.cfg.reload else math.inf, self.is_wanted)
        if not self.is_wanted():
            sys.exit(0)
        self._watch.start()
        if not logging.getLogger("hornbeam").handlers:  # `--log-config` may have set some
            self.use_log("hornbeam", self.log.error_log)
        with self._boot_errors():
            fork_hazards.check()
            self.budget = threads.thread_budget(self.budget)
            wanted = interfaces.wanted_interface(os.environ)
            threads.set_environment(self.budget)
            fork_hazards.restore_torch_threads(self.budget)
            self._limit_threads()
            self._host.join()
            memory = recycling.memory_limit(os.environ)
            self._limits = recycling.Limits(self._most_requests, memory)
            self._open_store()
            # One that replaces another gets its slot, and so its GPU; ages only ever grow.
            devices.set_worker_slot(self._life.slot)
            self._node.take_name(self._life.slot)
        try:
            self.wsgi = self.app.wsgi()
        except (Exception, SystemExit) as error:
            if not (self.cfg.reload and self.alive):
                raise
            self._serve_failure(error)
            return
        with self._boot_errors():
            self._interface = interfaces.interface_of(self.wsgi, wanted)
            self._install_error_handlers()
            self.wsgi, self._interface = with_pages(self.wsgi, self._interface, os.environ)
            if self._interface == "wsgi":
                self.wsgi = WsgiEntry(self.wsgi)  # that of an ASGI app is its connections'
        figures.show_workers(_workers)
        for warning in settings.warnings(self._changed, wsgi=self._interface == "wsgi"):
            self.log.warning("%s", warning)

    def _serve_failure(self, error: BaseException) -> None:
        """Serve the traceback of an app under development until one of its files changes."""
        self.log.error("The app failed to load", exc_info=error)
        files = {frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)}
        if isinstance(error, SyntaxError) and error.filename is not None:
            files.add(error.filename)
        for file in filter(os.path.isfile, files):
            self.reloader.add_extra_file(file)
        self.wsgi = make_fail_app("".join(traceback.format_exception(error)))
        self._broken = True

    def load_models(self) -> Future[None]:
        """Start loading what is registered and not loaded yet, off this thread."""
        loading: Future[None] = Future()

        def load() -> None:
            try:
                models.load_all()
                self._host.wait_loaded()
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
        if self._host.is_lost():
            self.fail_boot("the model host has ended")
        error = loading.exception() if loading.done() else None
        if error is not None:
            if error.__cause__ is not None:
                self.log.error("%s", traceback_of_app(error.__cause__))
            self.fail_boot(str(error) if isinstance(error, HornbeamError) else repr(error))

    def begin_serving(self) -> None:
        """End the boot: everything is loaded, and the next thing is to accept connections."""
        self._watch.stop()
        self._limit_threads()
        # What was loaded stays: the collector need not look through it at every full collection.
        gc.collect()
        gc.freeze()
        reason = self._limits.give_up_memory()
        if reason is not None:
            self.log.error("Not applied, since a new worker is as large: %s", reason)
        served = f"WSGI, {self.cfg.threads} request threads" if self.server is None else "ASGI"
        if not self._broken:
            self._node.start()  # before older workers learn that they may leave
        self._life.serve(self._limits)
        self.log.info("Ready: %s, compute threads: %d", served, self.budget)

    def fail_boot(self, message: str) -> NoReturn:
        """End the process with one line; see `_end_boot`."""
        self.log.error("Worker failed to boot: %s", message)
        raise BootError(Arbiter.WORKER_BOOT_ERROR)

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
            self._watch.step = "starting the app and loading models"
            with self._boot_errors():
                self.server = asgi.server_for(self, self._interface)
            self.server.run([listener.sock for listener in self.sockets])
            return
        if not self._broken:
            self._watch.step = "loading models"
            loading = self.load_models()
            while not wait([loading], timeout=0.1).done:
                self.check_boot(loading)
            self.check_boot(loading)
        self.begin_serving()
        super().run()
        self._finish_calls()

    def notify(self) -> None:
        """Tell the arbiter that the loop runs, and see whether it is time to leave."""
        super().notify()
        if self.alive and self._host.is_lost():
            self.log.error("The model host has ended; this worker makes way for one with another")
            self.alive = False
        if self.alive and self._life.tick(self.nr, self._in_flight()):
            self.alive = False
            self.method_queue.defer(_nothing)  # its loop looks after the next event
        if not self.alive:
            self.leave()

    def leave(self) -> None:
        """Note that no more connections are accepted."""
        self._left_at = min(self._left_at, time.monotonic())
        self._life.leave()
        self._node.leave(self.cfg.graceful_timeout)

    def unfinished(self) -> int:
        """Return how many calls of servings and of other nodes wait or run."""
        return registry.unfinished() + self._node.unfinished

    def _in_flight(self) -> int:
        if self.server is not None:
            return len(self.server.server_state.tasks)
        return int(self.nr_conns) - len(self.keepalived_conns) - len(self.pending_conns)

    def set_accept_enabled(self, enabled: bool) -> None:  # noqa: FBT001 - gunicorn's
        """Accept connections or not; once the worker leaves, let go of the listening sockets.

        gunicorn would keep them to its end, and connections nobody will accept with them.
        """
        super().set_accept_enabled(enabled)
        if not enabled and not self.alive:
            for listener in self.sockets:
                listener.close()

    def enqueue_req(self, conn: Any) -> None:
        """Hand a connection with a request to the request threads."""
        conn.close = functools.partial(self._close, conn)
        super().enqueue_req(conn)

    def _close(self, conn: Any, *, graceful: bool = False) -> None:
        """Close a connection; gunicorn's loop would wait up to 2 s for the client to do so too."""
        if graceful:
            with contextlib.suppress(OSError):
                conn.sock.shutdown(socket.SHUT_WR)
            self.tpool.submit(TConn.close, conn, graceful=True)
        else:
            TConn.close(conn)

    def _finish_calls(self) -> None:
        """Wait, when the last request has ended, for the calls that no request waits for."""
        self.leave()
        until = self._left_at + self.cfg.graceful_timeout
        self.expect_silence(max(0.0, until - time.monotonic()))
        while self.unfinished() and not self._quitting and time.monotonic() < until:
            time.sleep(_POLL_S)

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
        """SIGTERM: finish what is in flight, then stop; or first wait for a newer generation.

        While the app is imported: stop now.
        """
        self._life.stop()
        if self._life.ask():
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


def _nothing() -> None:
    """Wake a loop."""


def _workers() -> list[dict[str, Any]]:
    """Return what `/stats` shows of the workers of this server."""
    return [
        {"pid": row.pid, "state": row.state.name.lower(), "generation": row.generation}
        for row in board.workers()
        if row.pid
    ]
