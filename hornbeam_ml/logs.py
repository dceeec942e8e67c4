"""The log of a program: lines for people, or for machines."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_FORMAT: Final = "%(asctime)s [%(process)d] [%(levelname)s] %(message)s"
_DATE: Final = "[%Y-%m-%d %H:%M:%S %z]"


def configure(level: str, *, file: Path | None = None, as_json: bool = False) -> None:
    """Have this process log to stderr, or to a file.

    Args:
        level: The lowest that is logged, in any case.
        file: Where to; it is opened anew when somebody rotates it.
        as_json: One JSON object in each line.
    """
    handler = logging.StreamHandler() if file is None else _LogFile(file)
    handler.setFormatter(_Json() if as_json else logging.Formatter(_FORMAT, _DATE))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(as_json)  # else they are lines of their own


class _LogFile(WatchedFileHandler):
    """A file that is opened anew when somebody rotates the logs."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line; a file that cannot be opened is no error of who logs."""
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)


class _Json(logging.Formatter):
    """A line of JSON, with the traceback as text where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": os.getpid(),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
