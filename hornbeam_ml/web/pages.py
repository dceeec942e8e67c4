"""The pages: from a path and a query to a status and a body. No server in here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs

import msgspec

from hornbeam_ml import readiness
from hornbeam_ml.background_load import load_in_background
from hornbeam_ml.cache import cache_stats
from hornbeam_ml.web.access import is_allowed
from hornbeam_ml.web.figures import figures
from hornbeam_state.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Page:
    """A response: an HTTP status, headers and a body."""

    status: int
    reason: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


class Pages:
    """The pages, most of them behind a token when there is one.

    Args:
        token: What the header ``Authorization: Bearer ...`` has to carry; None: nothing.
    """

    def __init__(self, token: str | None = None) -> None:
        self._token = token

    def waits(self, path: str) -> bool:
        """Return whether `respond` may block, on the store or for reading files."""
        return _name(path) not in _PROBES

    def respond(
        self, method: str, path: str, query: str = "", authorization: str | None = None
    ) -> Page:
        """Return the page for a request.

        Blocks on the store for as long as its timeout, except for the pages of probes, which
        never wait for anything.

        Args:
            method: The HTTP method.
            path: The path below the mount point.
            query: The query string, undecoded.
            authorization: The header of that name.
        """
        name = _name(path)
        if name not in _PROBES and not is_allowed(self._token, authorization):
            challenge = (("www-authenticate", "Bearer"),)
            return _json(401, "Unauthorized", {"error": "a token is needed"}, challenge)
        page = _PAGES.get(name)
        if page is None:
            return _json(404, "Not Found", {"error": f"no such page; there are {sorted(_PAGES)}"})
        if method not in ("GET", "HEAD"):
            problem = {"error": "these pages are read with GET"}
            return _json(405, "Method Not Allowed", problem, (("allow", "GET, HEAD"),))
        try:
            return page(parse_qs(query))
        except ValueError as error:
            return _json(400, "Bad Request", {"error": str(error)})
        except StoreUnavailable:
            return _unavailable({"error": "the store is unavailable"})


def _healthz(_query: dict[str, list[str]]) -> Page:
    """Answer as long as the process does."""
    return _json(200, "OK", {"status": "ok"})


def _readyz(_query: dict[str, list[str]]) -> Page:
    """Say whether this process should get requests."""
    load_in_background()
    reasons = readiness.reasons()
    shown = {"ready": not reasons, "reasons": reasons}
    return _unavailable(shown) if reasons else _json(200, "OK", shown)


def _stats(_query: dict[str, list[str]]) -> Page:
    return _json(200, "OK", figures())


def _cache_stats(query: dict[str, list[str]]) -> Page:
    return _json(200, "OK", cache_stats(query.get("prefix", [None])[0]))


_PAGES: Final[dict[str, Callable[[dict[str, list[str]]], Page]]] = {
    "/cache_stats": _cache_stats,
    "/healthz": _healthz,
    "/readyz": _readyz,
    "/stats": _stats,
}
_PROBES: Final = {"/healthz", "/readyz"}  # never wait, and are shown to anybody


def _name(path: str) -> str:
    return path.rstrip("/") or "/"


def _json(status: int, reason: str, value: Any, headers: tuple[tuple[str, str], ...] = ()) -> Page:
    headers = (("content-type", "application/json"), ("cache-control", "no-store"), *headers)
    return Page(status, reason, msgspec.json.encode(value), headers)


def _unavailable(value: Any) -> Page:
    return _json(503, "Service Unavailable", value, (("retry-after", "1"),))
