"""Settings of gunicorn that do nothing here, and what to say about them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from gunicorn.config import make_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

_ASKED: Final = "hornbeam_asked_what_changed"
_NO_HTTP2: Final = "uvicorn speaks HTTP/1.1; let a proxy in front speak HTTP/2"
_NO_PROXY_PROTOCOL: Final = "a PROXY header is answered with 400; use X-Forwarded-For"
_NO_UWSGI: Final = "the uwsgi protocol is answered with 400; speak HTTP"
_AS_SENT: Final = "an ASGI app gets all header fields as they were sent"
_STRICT: Final = "uvicorn's parsers have no such leniency"
_TLS: Final = "TLS is asyncio's; use the ssl_context hook"
_NO_CANCELLING: Final = "a client that leaves takes back what waits for a model, nothing else"
_FOR_ASGI: Final = "it is for ASGI apps"

IDLE_FOR_ASGI: Final = {
    "threads": "an ASGI app runs in one event loop, its sync endpoints in threads of anyio",
    "worker_connections": "connections are not counted; bound them in the proxy",
    "asgi_disconnect_grace_period": _NO_CANCELLING,
    "http_parser": "uvicorn brings its own parsers, httptools or h11",
    "http_protocols": _NO_HTTP2,
    "http2_cleartext": _NO_HTTP2,
    "http2_max_concurrent_streams": _NO_HTTP2,
    "http2_initial_window_size": _NO_HTTP2,
    "http2_max_frame_size": _NO_HTTP2,
    "http2_max_header_list_size": _NO_HTTP2,
    "protocol": _NO_UWSGI,
    "uwsgi_allow_ips": _NO_UWSGI,
    "proxy_protocol": _NO_PROXY_PROTOCOL,
    "proxy_allow_ips": _NO_PROXY_PROTOCOL,
    "sendfile": "an ASGI app sends its files itself",
    "secure_scheme_headers": "X-Forwarded-Proto alone tells the scheme",
    "header_map": _AS_SENT,
    "forwarder_headers": _AS_SENT,
    "permit_obsolete_folding": _STRICT,
    "permit_unconventional_http_method": _STRICT,
    "permit_unconventional_http_version": _STRICT,
    "strip_header_spaces": _STRICT,
    "casefold_http_method": "methods are passed on as they were sent",
    "do_handshake_on_connect": _TLS,
    "suppress_ragged_eofs": _TLS,
}
"""Why they do nothing for ASGI apps, or what to do instead, by name."""

IDLE_FOR_WSGI: Final = dict.fromkeys(
    (
        "asgi_loop",
        "asgi_lifespan",
        "asgi_disconnect_grace_period",
        "root_path",
        "websocket_max_message_size",
    ),
    _FOR_ASGI,
)
"""The same for WSGI apps, which gunicorn's own threads serve."""


def changed(cfg: Any) -> frozenset[str]:
    """Return which of the settings above have another value than their default.

    Only when it is called first for a configuration, so that one worker of each tells the user.
    Call it before changing any of them.
    """
    if getattr(cfg, _ASKED, False):
        return frozenset()
    setattr(cfg, _ASKED, True)
    untouched = make_settings()
    return frozenset(
        name
        for name in IDLE_FOR_ASGI.keys() | IDLE_FOR_WSGI.keys()
        if cfg.settings[name].get() != untouched[name].get()
    )


def warnings(changed: frozenset[str], *, wsgi: bool) -> Iterator[str]:
    """Yield a line for each of the changed settings that does nothing for the app."""
    idle, kind = (IDLE_FOR_WSGI, "a WSGI") if wsgi else (IDLE_FOR_ASGI, "an ASGI")
    for name in sorted(changed & idle.keys()):
        yield f"The setting {name} does nothing for {kind} app: {idle[name]}"
