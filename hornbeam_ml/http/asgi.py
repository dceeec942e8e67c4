"""Serving an ASGI app with uvicorn inside a gunicorn worker."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import sys
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol

from gunicorn.sock import ssl_context
from uvicorn.config import Config
from uvicorn.server import Server

from hornbeam_ml.http.access_log import Observer
from hornbeam_ml.http.connections import Connection, Connections
from hornbeam_ml.http.departure import LINGER_S, end_app, finish, stop_accepting
from hornbeam_ml.http.limits import Limits
from hornbeam_ml.http.proxies import UnixProxies
from hornbeam_state.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Generator
    from concurrent.futures import Future

    from hornbeam_ml.http.interfaces import Interface

_POLL_S: Final = 0.05
_QUICK_SHUTDOWN_S: Final = 0.5  # of the second that the worker leaves itself
_EXIT_S: Final = 0.1  # from the end of the app's shutdown to that of the process


class Host(Protocol):
    """What the server needs of the gunicorn worker it runs in."""

    wsgi: Any
    cfg: Any
    log: Any
    sockets: Any
    nr: int

    def notify(self) -> None:
        """Tell the arbiter that the loop runs."""

    def expect_silence(self, seconds: float) -> None:
        """Tell the arbiter to wait that much longer for the next `notify`."""

    def is_wanted(self) -> bool:
        """Return whether to go on serving."""
        ...

    def leave(self) -> None:
        """Note that no more connections are accepted."""

    def unfinished(self) -> int:
        """Return how many calls of servings and of other nodes wait or run."""
        ...

    def load_models(self) -> Future[None]:
        """Start loading what is registered and not loaded yet, off this thread."""
        ...

    def check_boot(self, loading: Future[None]) -> None:
        """End the process if there is reason to while it boots."""

    def fail_boot(self, message: str) -> NoReturn:
        """End the process, since it cannot serve."""
        ...

    def begin_serving(self) -> None:
        """Do what comes last before connections are accepted."""


def server_for(worker: Host, interface: Interface) -> Server:
    """Return the server of the worker's app; its `run` serves until the worker has to stop."""
    observer = Observer(worker)
    config = _config(worker, interface, observer)
    config.load()
    if any(listener.sock.family == socket.AF_UNIX for listener in worker.sockets):
        config.loaded_app = UnixProxies(config.loaded_app, worker.cfg.forwarded_allow_ips)
    if observer.looks:
        config.loaded_app = observer.websockets(config.loaded_app)
    return _Server(config, worker)


def _config(worker: Host, interface: Interface, observer: Observer) -> Config:
    """Return uvicorn's configuration with those settings of gunicorn that it knows."""
    cfg = worker.cfg

    class Configured(Connection):
        limits = Limits.of(cfg)
        keeps_alive = cfg.keepalive > 0

    Configured.observer = observer if observer.looks else None
    tls = functools.partial(_ssl_context, cfg) if cfg.is_ssl else None
    return Config(
        app=worker.wsgi,
        # uvicorn's own guess takes any app without a coroutine `__call__` for ASGI 2.
        interface=interface,
        http=Configured,
        loop=cfg.asgi_loop,
        lifespan=cfg.asgi_lifespan,
        root_path=cfg.root_path,
        log_config=None,
        access_log=False,  # gunicorn's own is written instead
        forwarded_allow_ips=cfg.forwarded_allow_ips,
        backlog=cfg.backlog,
        timeout_keep_alive=cfg.keepalive,
        timeout_graceful_shutdown=cfg.graceful_timeout,
        ws_max_size=cfg.websocket_max_message_size or sys.maxsize,
        ssl_context_factory=tls,
    )


def _ssl_context(cfg: Any, _config: Any, _default: Any) -> Any:
    """Build the context as gunicorn does, its `ssl_context` hook included."""
    try:
        context = ssl_context(cfg)
    except OSError as error:  # of ssl, too
        raise ConfigError(f"certfile={cfg.certfile!r}, keyfile={cfg.keyfile!r}: {error}") from error
    if "h2" in cfg.http_protocols:  # gunicorn offers it to clients, uvicorn does not speak it
        context.set_alpn_protocols(["http/1.1"])
    return context


class _Server(Server):
    """uvicorn's server, which lives and dies with its gunicorn worker."""

    def __init__(self, config: Config, worker: Host) -> None:
        super().__init__(config)
        self.server_state: Connections = Connections()
        self._worker = worker

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave the worker's signal handlers in place."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the app and its models, then accept from the sockets."""
        self.lifespan = _Lifespan(self.lifespan, self._worker)
        await super().startup(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Tell the arbiter, ten times a second, that the loop runs; return whether to stop."""
        self._worker.nr = self.server_state.total_requests
        self._worker.notify()
        return not self._worker.is_wanted() or bool(await super().on_tick(counter))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, let what was begun finish, then end the app's lifespan."""
        cfg = self._worker.cfg
        loop = asyncio.get_running_loop()
        # Before the arbiter's patience is over, too: it would kill, and nobody would say why.
        end = loop.time() + cfg.graceful_timeout - _EXIT_S
        self._worker.expect_silence(cfg.graceful_timeout)
        self._worker.leave()
        await stop_accepting(self.servers)
        for sock in sockets or []:
            sock.close()
        self.server_state.leave(min(LINGER_S, cfg.graceful_timeout))
        await finish(
            self.server_state,
            cfg.graceful_timeout,
            lambda: self.force_exit,
            self._worker.unfinished,
        )
        seconds = _QUICK_SHUTDOWN_S if self.force_exit else max(_EXIT_S, end - loop.time())
        await end_app(self.lifespan.shutdown(), seconds)


class _Lifespan:
    """The app's lifespan, the startup of which includes the models.

    uvicorn accepts connections as soon as this startup ends.
    """

    def __init__(self, app: Any, worker: Host) -> None:
        self._app = app
        self._worker = worker
        self.state = app.state
        self.should_exit = False  # a failed startup ends the process instead

    async def startup(self) -> None:
        """Start the app while the models load, since its startup may wait for one."""
        loading = self._worker.load_models()
        starting = asyncio.create_task(self._app.startup())
        while not starting.done():
            self._worker.check_boot(loading)
            await asyncio.wait({starting}, timeout=_POLL_S)
        starting.result()
        self._worker.check_boot(loading)
        if self._app.should_exit:
            self._worker.fail_boot("the app's lifespan startup failed")
        try:
            await self._finish(loading)
            await self._finish(self._worker.load_models())  # those the app just registered
        except SystemExit:
            await self._app.shutdown()
            raise
        self._worker.begin_serving()

    async def shutdown(self) -> None:
        """End the app's lifespan."""
        await self._app.shutdown()

    async def _finish(self, loading: Future[None]) -> None:
        while not loading.done():
            self._worker.check_boot(loading)
            await asyncio.sleep(_POLL_S)
        self._worker.check_boot(loading)
