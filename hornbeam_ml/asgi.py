"""ASGI inside a gunicorn worker: recognising such an app, and serving it with uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import sys
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, Protocol

from gunicorn.sock import ssl_context
from uvicorn.config import Config
from uvicorn.server import Server

from hornbeam_state.errors import ConfigError

if TYPE_CHECKING:
    import socket
    from collections.abc import Generator, Mapping
    from concurrent.futures import Future

Interface = Literal["wsgi", "asgi2", "asgi3"]
OVERRIDE: Final = "HORNBEAM_INTERFACE"
_BY_ARGUMENTS: Final[dict[int, Interface]] = {1: "asgi2", 2: "wsgi", 3: "asgi3"}
_POLL_S: Final = 0.05
_QUICK_SHUTDOWN_S: Final = 0.5  # of the second that the worker leaves itself


def wanted_interface(environ: Mapping[str, str]) -> str:
    """Return what ``HORNBEAM_INTERFACE`` says: ``auto``, ``wsgi`` or ``asgi``.

    Raises:
        ConfigError: it says something else.
    """
    wanted = environ.get(OVERRIDE, "").strip().lower() or "auto"
    if wanted not in ("auto", "wsgi", "asgi"):
        raise ConfigError(f"{OVERRIDE}={environ[OVERRIDE]!r}: use wsgi, asgi or auto")
    return wanted


def interface_of(app: Any, wanted: str = "auto") -> Interface:
    """Tell how an app wants to be called.

    Coroutine functions, and objects with a coroutine ``__call__``, are ASGI. Anything else is
    told by the number of arguments it needs: 3 (scope, receive, send) is ASGI, 2 (environ,
    start_response) is WSGI, 1 (scope) is the older ASGI 2, also as the constructor of a class.

    Args:
        app: The loaded app.
        wanted: ``wsgi`` and ``asgi`` override the above; see `wanted_interface`.

    Raises:
        ConfigError: it cannot be told; the message says how to decide it.
    """
    if wanted == "wsgi":
        return "wsgi"
    plain = inspect.isroutine(app) or inspect.isclass(app) or isinstance(app, functools.partial)
    call = app if plain else getattr(app, "__call__", app)  # noqa: B004 - the method itself
    if inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(inspect.unwrap(call)):
        return "asgi3"
    needed = _arguments_needed(call)
    if wanted == "asgi":
        return "asgi2" if needed == 1 else "asgi3"
    if needed in _BY_ARGUMENTS:
        return _BY_ARGUMENTS[needed]
    raise ConfigError(_undecided(app, needed))


def _arguments_needed(call: Any) -> int | None:
    """Count the positional arguments without a default; None where that decides nothing."""
    # A decorator's own arguments count. Where it takes any number, those of the function inside.
    for follow_wrapped in (False, True):
        try:
            signature = inspect.signature(call, follow_wrapped=follow_wrapped)
        except (TypeError, ValueError):  # not callable, or written in C
            return None
        parameters = signature.parameters.values()
        if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
            positional = [
                parameter.default is parameter.empty
                for parameter in parameters
                if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
            ]
            # (scope, receive=None, send=None) may be called with one or with three.
            return None if sum(positional) == 1 < len(positional) else sum(positional)
    return None


def _undecided(app: Any, needed: int | None) -> str:
    name = getattr(app, "__qualname__", None) or f"an object of {type(app).__qualname__}"
    if not callable(app):
        return f"the app ({name}) is not callable: name a WSGI or ASGI app, as in 'module:app'"
    if needed == 0:
        return (
            f"the app ({name}) takes no arguments: if it makes the app, write the name with "
            f"parentheses, as in 'module:{name}()'; else set {OVERRIDE}=wsgi or {OVERRIDE}=asgi"
        )
    return (
        f"cannot tell whether the app ({name}) is WSGI or ASGI: WSGI apps take 2 arguments "
        f"(environ, start_response), ASGI apps 3 (scope, receive, send); "
        f"set {OVERRIDE}=wsgi or {OVERRIDE}=asgi"
    )


class Host(Protocol):
    """What the server needs of the gunicorn worker it runs in."""

    wsgi: Any
    cfg: Any
    max_requests: int

    def notify(self) -> None:
        """Tell the arbiter that the loop runs."""

    def expect_silence(self, seconds: float) -> None:
        """Tell the arbiter to wait that much longer for the next `notify`."""

    def is_wanted(self) -> bool:
        """Return whether to go on serving."""
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
    return _Server(_config(worker, interface), worker)


def _config(worker: Host, interface: Interface) -> Config:
    """Return uvicorn's configuration with those settings of gunicorn that it knows."""
    cfg = worker.cfg
    tls = functools.partial(_ssl_context, cfg) if cfg.is_ssl else None
    return Config(
        app=worker.wsgi,
        # uvicorn's own guess takes any app without a coroutine `__call__` for ASGI 2.
        interface=interface,
        loop=cfg.asgi_loop,
        lifespan=cfg.asgi_lifespan,
        root_path=cfg.root_path,
        log_config=None,
        forwarded_allow_ips=cfg.forwarded_allow_ips,
        backlog=cfg.backlog,
        limit_max_requests=worker.max_requests,
        timeout_keep_alive=cfg.keepalive,
        timeout_graceful_shutdown=cfg.graceful_timeout,
        ws_max_size=cfg.websocket_max_message_size or sys.maxsize,
        ssl_context_factory=tls,
    )


def _ssl_context(cfg: Any, _config: Any, _default: Any) -> Any:
    """Build the context as gunicorn does, its `ssl_context` hook included."""
    return ssl_context(cfg)


class _Server(Server):
    """uvicorn's server, which lives and dies with its gunicorn worker."""

    def __init__(self, config: Config, worker: Host) -> None:
        super().__init__(config)
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
        self._worker.notify()
        return not self._worker.is_wanted() or bool(await super().on_tick(counter))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, let requests in flight finish, then end the app's lifespan."""
        self._worker.expect_silence(self._worker.cfg.graceful_timeout)
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn would cut the app's lifespan off with a traceback
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.lifespan.shutdown(), _QUICK_SHUTDOWN_S)


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
