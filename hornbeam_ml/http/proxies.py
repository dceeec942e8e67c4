"""What proxies say about their clients, where they connect through a Unix socket."""

from __future__ import annotations

from typing import Any

from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware


class UnixProxies:
    """Believes X-Forwarded-For and X-Forwarded-Proto of whoever may open a Unix socket.

    As gunicorn documents for `forwarded_allow_ips`; uvicorn believes them for "*" alone. Of
    several hops, those that `forwarded_allow_ips` names are still skipped, so a client cannot
    pass for another one.

    Args:
        app: An ASGI app, uvicorn's own middleware for the same around it included.
        trusted: The setting.
    """

    def __init__(self, app: Any, trusted: str) -> None:
        self._app = app
        middleware: Any = ProxyHeadersMiddleware(app, trusted_hosts=trusted)
        middleware.trusted_hosts = _TrustedPeer(middleware.trusted_hosts)
        self._forwarded = middleware

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Run the app."""
        app = self._forwarded if _came_through_unix_socket(scope) else self._app
        await app(scope, receive, send)


class _TrustedPeer:
    """Trusted hosts to which the peer belongs, whatever its address."""

    def __init__(self, hosts: Any) -> None:
        self._hosts = hosts

    def __contains__(self, peer: object) -> bool:
        return True

    def get_trusted_client_address(self, forwarded_for: str) -> Any:
        return self._hosts.get_trusted_client_address(forwarded_for)


def _came_through_unix_socket(scope: Any) -> bool:
    """Tell by the server's own address: a peer without one may also be one that just left."""
    server = scope.get("server")
    return bool(server) and server[1] is None
