"""What a worker says while it boots, and when it cannot."""

from __future__ import annotations

import threading
import time
import traceback
from typing import Any, Final

NOTICE_S: Final = 30.0


class BootError(SystemExit):
    """The worker cannot boot, and has said why."""


def traceback_of_app(error: BaseException) -> str:
    """Format an exception from where it left this package."""
    frames = error.__traceback__
    while frames and frames.tb_frame.f_globals.get("__name__", "").startswith("hornbeam_ml."):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))


class BootWatch:
    """Logs every 30 s what a worker that boots slowly is doing.

    Attributes:
        step: That, in words.
    """

    def __init__(self, log: Any) -> None:
        self.step = "importing the app"
        self._log = log
        self._over = threading.Event()

    def start(self) -> None:
        """Begin to watch, on a thread of its own."""
        threading.Thread(target=self._run, name="hornbeam-boot", daemon=True).start()

    def stop(self) -> None:
        """The boot is over."""
        self._over.set()

    def _run(self) -> None:
        started = time.monotonic()
        while not self._over.wait(NOTICE_S):
            elapsed = time.monotonic() - started
            self._log.warning("Still %s after %.0f s", self.step, elapsed)
