"""Limits on the head of a request, as gunicorn's WSGI workers apply them. Pure."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_MOST_FIELDS: Final = 32_768
_DEFAULT_FIELD_SIZE: Final = 8190
_LONGEST_LINE: Final = 8190
_UNLIMITED_LINE: Final = 1 << 20  # what gunicorn's own parsers take for no limit
_AROUND_TARGET: Final = len("  HTTP/1.1")
_AROUND_FIELD: Final = len(": \r\n")


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a request is not served.

    Attributes:
        status: Of the response.
        reason: One line for the client and the log, without anything that the client sent.
    """

    status: int
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What the head of a request may have.

    Attributes:
        line: Bytes of the request line.
        fields: Number of header fields, and of trailer fields.
        field_size: Bytes of one field, its line end included.
    """

    line: int
    fields: int
    field_size: int

    @classmethod
    def of(cls, cfg: Any) -> Limits:
        """Read gunicorn's settings, with its meaning of 0."""
        fields, size, line = (
            getattr(cfg, f"limit_request_{name}") for name in ("fields", "field_size", "line")
        )
        return cls(
            line=min(line, _LONGEST_LINE) if line > 0 else _UNLIMITED_LINE,
            fields=min(fields, _MOST_FIELDS) if fields > 0 else _MOST_FIELDS,
            field_size=size if size > 0 else _DEFAULT_FIELD_SIZE,
        )

    @property
    def harmless(self) -> int:
        """Bytes of a head in which nothing can be too long."""
        return min(self.line, self.field_size)

    @property
    def longest_part(self) -> int:
        """Bytes that may come without one more part of a head being complete."""
        return max(self.line, self.field_size)

    @property
    def longest_head(self) -> int:
        """Bytes of the longest head."""
        return self.line + self.fields * self.field_size + 4

    def refusal(
        self, method: bytes, target: bytes, headers: Sequence[tuple[bytes, bytes]]
    ) -> Refusal | None:
        """Return what is wrong with a head, whole or as far as it has come."""
        if len(method) + len(target) + _AROUND_TARGET > self.line:
            return TOO_LONG_LINE
        if len(headers) > self.fields:
            return TOO_MANY_FIELDS
        longest = self.field_size - _AROUND_FIELD
        if any(len(name) + len(value) > longest for name, value in headers):
            return TOO_LONG_FIELD
        return None


TOO_LONG_LINE: Final = Refusal(414, "the request line is longer than limit_request_line")
TOO_MANY_FIELDS: Final = Refusal(431, "more header fields than limit_request_fields")
TOO_LONG_FIELD: Final = Refusal(431, "a header field is longer than limit_request_field_size")
