"""gunicorn's access log, statsd counts and request hooks for ASGI apps."""

from __future__ import annotations

import time
from datetime import timedelta
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from gunicorn.glogging import Logger

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hornbeam_ml.http.entry import AsgiEntry

CLIENT_LEFT: Final = 499  # as nginx: no client got this status
_FAILED: Final = 500
_FORBIDDEN: Final = 403
_SWITCHING: Final = 101


class Observer:
    """Tells gunicorn's logger and the hooks of a worker about requests.

    Args:
        worker: The gunicorn worker; the hooks get it.
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._access = worker.log.access if _logs(worker.log) else None
        self._before, self._after = (
            _own_hook(worker.cfg, name) for name in ("pre_request", "post_request")
        )

    @property
    def looks(self) -> bool:
        """Whether anybody wants to know about requests."""
        return any((self._access, self._before, self._after))

    def http(self, entry: AsgiEntry) -> ObservedHttp:
        """Return what has to be called for HTTP requests in place of their entry."""
        return ObservedHttp(entry, self)

    def websockets(self, app: Any) -> Any:
        """Return the app as it has to be called for WebSockets."""
        return ObservedWebSockets(app, self)

    def begin(self, request: LoggedRequest) -> None:
        """Run `pre_request`, which may raise."""
        if self._before is not None:
            self._before(self._worker, request)

    def end(self, request: LoggedRequest, response: LoggedResponse) -> None:
        """Log a request, count it, run `post_request`."""
        took = timedelta(seconds=time.monotonic() - request.started)
        environ = request.environ()
        if self._access is not None:
            self._access(response, request, environ, took)
        if self._after is not None:
            try:
                self._after(self._worker, request, environ, response)
            except Exception:
                self._worker.log.exception("Exception in post_request hook")


class ObservedHttp:
    """An ASGI app whose responses are logged when their last byte is handed over."""

    def __init__(self, entry: AsgiEntry, observer: Observer) -> None:
        self._entry = entry
        self._observer = observer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Run the app for one request."""
        request, response = LoggedRequest(scope), LoggedResponse()
        sends_body = scope["method"] != "HEAD"
        complete = False

        async def observed(message: Any) -> None:
            nonlocal complete
            await send(message)
            if message["type"] == "http.response.start":
                response.start(message["status"], message.get("headers", ()))
            elif message["type"] == "http.response.body":
                response.sent += len(message.get("body", b"")) if sends_body else 0
                if not message.get("more_body") and not complete:
                    complete = True
                    self._observer.end(request, response)

        try:
            self._observer.begin(request)
            await self._entry(scope, receive, observed)
        finally:
            if not complete:
                if not response.started:
                    response.start(CLIENT_LEFT if self._entry.client_left else _FAILED)
                self._observer.end(request, response)


class ObservedWebSockets:
    """An ASGI app whose answers to WebSocket handshakes are logged when they are given."""

    def __init__(self, app: Any, observer: Observer) -> None:
        self._app = app
        self._observer = observer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Run the app for one connection, or for anything else."""
        if scope["type"] != "websocket":
            await self._app(scope, receive, send)
            return
        request, response = LoggedRequest(scope), LoggedResponse()

        def answered(status: int, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
            if not response.started:
                response.start(status, headers)
                self._observer.end(request, response)

        async def observed(message: Any) -> None:
            await send(message)
            match message["type"]:
                case "websocket.accept":
                    answered(_SWITCHING, message.get("headers", ()))
                case "websocket.close":
                    answered(_FORBIDDEN)
                case "websocket.http.response.start":
                    answered(message["status"], message.get("headers", ()))

        try:
            self._observer.begin(request)
            await self._app(scope, receive, observed)
        finally:
            answered(_FAILED)


class LoggedRequest:
    """A request with the attributes that gunicorn's own requests have.

    Attributes:
        method, uri, path, query, fragment, scheme: Text; `uri` as it was sent, without the host.
        version: Of HTTP, such as (1, 1).
        headers: Upper-case names and values, text, in the order they were sent.
        remote_addr: The peer's address and port, or "" for a Unix socket.
        started: When it began, seconds of `time.monotonic`.
    """

    def __init__(self, scope: Any) -> None:
        self.started = time.monotonic()
        self.method: str = scope.get("method", "GET")  # a handshake is a GET
        self.scheme: str = scope["scheme"]
        root: str = scope["root_path"]
        self.path = scope["path"].removeprefix(root)
        self.query = scope["query_string"].decode("latin-1")
        raw = scope["raw_path"].decode("latin-1").removeprefix(root)
        self.uri = f"{raw}?{self.query}" if self.query else raw
        self.fragment = ""
        major, _, minor = scope["http_version"].partition(".")
        self.version = (int(major), int(minor or 0))
        self.headers = [
            (name.decode("latin-1").upper(), value.decode("latin-1"))
            for name, value in scope["headers"]
        ]
        self.remote_addr = scope["client"] or ""  # middleware puts a proxy's client there later
        self._root = root
        self._server = scope["server"] or ("", None)

    def environ(self) -> dict[str, Any]:
        """Return what a WSGI app would have got, of those that are text."""
        environ: dict[str, Any] = {
            "REQUEST_METHOD": self.method,
            "RAW_URI": self.uri,
            "SCRIPT_NAME": self._root,
            "PATH_INFO": self.path,
            "QUERY_STRING": self.query,
            "SERVER_PROTOCOL": "HTTP/{}.{}".format(*self.version),
            "SERVER_NAME": self._server[0],
            "SERVER_PORT": "" if self._server[1] is None else str(self._server[1]),
            "wsgi.url_scheme": self.scheme,
        }
        if self.remote_addr:
            environ["REMOTE_ADDR"], environ["REMOTE_PORT"] = map(str, self.remote_addr)
        for name, value in self.headers:
            key = name.replace("-", "_")
            key = key if key in {"CONTENT_TYPE", "CONTENT_LENGTH"} else "HTTP_" + key
            environ[key] = f"{environ[key]},{value}" if key in environ else value
        return environ


class LoggedResponse:
    """A response with the attributes that gunicorn's own responses have.

    Attributes:
        status: Such as "200 OK".
        status_code: The number of it.
        headers: Names and values, text, as the app gave them.
        sent: Bytes of its body that were handed over.
        started: Whether there is any.
    """

    def __init__(self) -> None:
        self.status = ""
        self.status_code = 0
        self.headers: list[tuple[str, str]] = []
        self.sent = 0
        self.started = False

    def start(self, status: int, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Take the status and the headers."""
        self.started = True
        self.status_code = status
        self.status = f"{status} {_phrase(status)}".rstrip()
        self.headers = [
            (bytes(name).decode("latin-1"), bytes(value).decode("latin-1"))
            for name, value in headers
        ]


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def _logs(log: Any) -> bool:
    """Return whether a logger does anything with an access: it writes it, or counts as statsd."""
    return type(log).access is not Logger.access or log.access_log_enabled


def _own_hook(cfg: Any, name: str) -> Any:
    """Return a hook of the user, None for the default, which does nothing of use."""
    hook = getattr(cfg, name)
    return None if hook is cfg.settings[name].default else hook
