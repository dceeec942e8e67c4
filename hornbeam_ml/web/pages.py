"""The pages: from a path and a query to a status and a body. No server in here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs

import msgspec

from hornbeam_ml.cache import cache_stats
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


def respond(method: str, path: str, query: str) -> Page:
    """Return the page for a request. Blocks on the store for as long as its timeout.

    Args:
        method: The HTTP method.
        path: The path below the mount point.
        query: The query string, undecoded.
    """
    page = _PAGES.get(path.rstrip("/") or "/")
    if page is None:
        return _json(404, "Not Found", {"error": f"no such page; there are {sorted(_PAGES)}"})
    if method not in ("GET", "HEAD"):
        allow = (("allow", "GET, HEAD"),)
        return _json(405, "Method Not Allowed", {"error": "these pages are read with GET"}, allow)
    try:
        return _json(200, "OK", page(parse_qs(query)))
    except ValueError as error:
        return _json(400, "Bad Request", {"error": str(error)})
    except StoreUnavailable:
        retry = (("retry-after", "1"),)
        return _json(503, "Service Unavailable", {"error": "the store is unavailable"}, retry)


def _cache_stats(query: dict[str, list[str]]) -> Any:
    return cache_stats(query.get("prefix", [None])[0])


_PAGES: Final[dict[str, Callable[[dict[str, list[str]]], Any]]] = {"/cache_stats": _cache_stats}


def _json(status: int, reason: str, value: Any, headers: tuple[tuple[str, str], ...] = ()) -> Page:
    headers = (("content-type", "application/json"), ("cache-control", "no-store"), *headers)
    return Page(status, reason, msgspec.json.encode(value), headers)
