"""The trace that this thread or task works for, in the words of W3C Trace Context."""

from __future__ import annotations

from contextvars import ContextVar

traceparent: ContextVar[str | None] = ContextVar("traceparent", default=None)
"""The ``traceparent`` header of the work at hand. Calls carry it to the node that answers them."""
