"""Futures whose waiters are finished in a forked child too."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any


class Promise(Future[Any]):
    """The future of a call that runs on a thread of this process."""

    def fail_after_fork(self, error: BaseException) -> None:
        """In a forked child: fail, since the thread that was to answer is not here."""
        # A thread of the parent may have held the lock. Callbacks belong to threads and event
        # loops of the parent.
        self._condition = threading.Condition()
        if self.done():
            return
        self._done_callbacks.clear()  # type: ignore[attr-defined]  # not in its stubs
        self.set_exception(error)
