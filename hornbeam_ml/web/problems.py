"""What an error means to an HTTP client: a status and a short body. No server in here."""

from __future__ import annotations

import http
import json
import logging
import math
from typing import Final, NamedTuple

from hornbeam_ml.errors import ClientDisconnected
from hornbeam_state.errors import (
    DeadlineExceeded,
    HornbeamError,
    NodeDown,
    Overloaded,
    StoreUnavailable,
)

logger = logging.getLogger("hornbeam.web")
_UNKNOWN_TO_HTTP: Final = {499: "Client Closed Request"}  # as nginx calls it; nobody receives it


class Problem(NamedTuple):
    """A response that says what went wrong, and nothing of what the error says.

    Attributes:
        status: The HTTP status.
        detail: One sentence.
        retry_after: For ``Retry-After``, whole seconds from 1 up; None: no such header.
    """

    status: int
    detail: str
    retry_after: int | None = None

    @property
    def reason(self) -> str:
        """The phrase that goes with the status."""
        return _UNKNOWN_TO_HTTP.get(self.status) or http.HTTPStatus(self.status).phrase

    @property
    def body(self) -> bytes:
        """The sentence as JSON."""
        return json.dumps({"detail": self.detail}, separators=(",", ":")).encode()

    @property
    def retry_headers(self) -> dict[str, str]:
        """The headers that a response has in any case, whoever makes its body."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    @property
    def headers(self) -> list[tuple[str, str]]:
        """All headers that go with `body`."""
        return [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(self.body))),
            *self.retry_headers.items(),
        ]


_PROBLEMS: Final[dict[type[HornbeamError], Problem]] = {
    Overloaded: Problem(503, "The server is overloaded. Try again later.", 1),
    StoreUnavailable: Problem(503, "A part of the service is unavailable. Try again later.", 1),
    NodeDown: Problem(503, "A part of the service is unavailable. Try again later.", 1),
    DeadlineExceeded: Problem(504, "There was no result in time."),
    ClientDisconnected: Problem(499, "The client has left."),
}
LEAVING: Final = Problem(503, "The server ends before there was a result. Try again.", 1)
ERRORS: Final = tuple(_PROBLEMS)
"""The errors that have a status of their own; so have their subclasses."""


def problem_of(error: BaseException) -> Problem | None:
    """Return what an error means to a client; None: nothing in particular.

    ``Retry-After`` is the `retry_after_s` of the error rounded up, and 1 for a store, which is
    asked again about that often.
    """
    for kind, problem in _PROBLEMS.items():
        if isinstance(error, kind):
            if isinstance(error, Overloaded | NodeDown):
                return problem._replace(retry_after=max(1, math.ceil(error.retry_after_s)))
            return problem
    return None


def note(error: BaseException) -> None:
    """Log an error that was answered, where the status alone does not tell what to mend."""
    if isinstance(error, StoreUnavailable | NodeDown):  # their messages hold no secrets
        logger.warning("answered 503: %s", error)


def bad_request(detail: str) -> Problem:
    """Return the response to a request that makes no sense."""
    return Problem(400, detail)
