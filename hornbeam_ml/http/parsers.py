"""The HTTP protocol of uvicorn that is used here, with gunicorn's limits on requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.protocols.http.h11_impl import H11Protocol

# mypy reads one of the two, whichever runs.
if TYPE_CHECKING or not issubclass(AutoHTTPProtocol, H11Protocol):
    from hornbeam_ml.http.httptools_protocol import HttptoolsProtocol as HttpProtocol
else:
    from hornbeam_ml.http.h11_protocol import LimitedH11Protocol as HttpProtocol

__all__ = ["HttpProtocol"]
