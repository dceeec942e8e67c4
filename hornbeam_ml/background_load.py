"""Loading models before traffic comes, where no worker does it: when readiness is asked for.

Under plain uvicorn a model is loaded when it is first asked for, and a balancer that waits for
readiness lets nobody ask. So its first question begins the load.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
from math import inf
from typing import TYPE_CHECKING, Final

from hornbeam_ml import identity, models, readiness
from hornbeam_state.errors import HornbeamError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

logger = logging.getLogger("hornbeam.models")
_PAUSE_S: Final = 5.0
_EXIT_WAIT_S: Final = 2.0
_SCOPE_WAIT_S: Final = 30.0


class BackgroundLoad:
    """Runs a load on a thread of its own, once at a time, and not soon again when it failed.

    Args:
        load: What to run.
        clock: Returns seconds.
        pause_s: From the end of a load that failed to the next.
    """

    def __init__(
        self,
        load: Callable[[], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        pause_s: float = _PAUSE_S,
    ) -> None:
        self._load = load
        self._clock = clock
        self._pause_s = pause_s
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._not_before = -inf

    def start(self) -> None:
        """Begin to load, unless one runs, or failed a moment ago. Does not wait."""
        with self._lock:
            if self._thread is not None or self._clock() < self._not_before:
                return
            # A daemon: a script that ends does not wait for minutes of loading.
            self._thread = threading.Thread(target=self._run, name="hornbeam-load", daemon=True)
            self._thread.start()

    def wait(self, seconds: float) -> None:
        """Wait until the load that runs now has ended, or for so long."""
        thread = self._thread
        if thread is not None:
            thread.join(seconds)

    def forget_after_fork(self) -> None:
        """In a forked child: the thread was the parent's."""
        self._lock = threading.Lock()
        self._thread = None
        self._not_before = -inf

    def _run(self) -> None:
        failed = True
        try:
            self._load()
            failed = False
        except HornbeamError as error:
            logger.warning("%s; a later probe tries again", error, exc_info=error.__cause__)
        except Exception:
            logger.exception("loading failed; a later probe tries again")
        finally:
            with self._lock:
                self._thread = None
                if failed:
                    self._not_before = self._clock() + self._pause_s


def _load_everything() -> None:
    models.load_all()
    identity.read_models()


_background = BackgroundLoad(_load_everything)  # of this process


def load_in_background() -> None:
    """Begin to load what is registered and not loaded, unless the worker does. Does not wait."""
    if readiness.phase() == "serving" and models.some_wait():
        _background.start()


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Let loads of a block end before it does, and forget that one failed."""
    global _background  # noqa: PLW0603 - the one of this process
    outer, _background = _background, BackgroundLoad(_load_everything)
    try:
        yield
    finally:
        _background.wait(_SCOPE_WAIT_S)
        _background = outer


def _forget_after_fork() -> None:
    _background.forget_after_fork()


def _wait_at_exit() -> None:
    """Native code of a daemon thread may crash an interpreter that shuts down around it."""
    _background.wait(_EXIT_WAIT_S)


os.register_at_fork(after_in_child=_forget_after_fork)
atexit.register(_wait_at_exit)
