"""Keeping the near cache true: a thread that hears from the servers what changes in the cache."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from typing import TYPE_CHECKING, Final

from redis.exceptions import NoPermissionError, ResponseError

from hornbeam_state.backends.redis.errors import FAILURES
from hornbeam_state.backends.redis.feed import Feed
from hornbeam_state.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hornbeam_state.backends.redis.connections import SyncConnection
    from hornbeam_state.backends.redis.link import Link
    from hornbeam_state.backends.redis.near_cache import NearCache

logger = logging.getLogger("hornbeam.store")

_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 2.0


class Tracker:
    """Keeps a near cache true, by a daemon thread that runs from `start` to `stop`.

    The cache is enabled while every server is heard. When one is lost it is emptied, and disabled
    until all are heard again. A server that refuses is not asked again before a stop.

    Args:
        link: Connects to the servers that entries are on.
        near: What to keep true.
        timeout: Seconds in which a server answers.
        where: What to call the servers in the log.
    """

    def __init__(
        self,
        link: Link,
        near: NearCache,
        timeout: float,
        where: str,
    ) -> None:
        self._link = link
        self._near = near
        self._timeout = timeout
        self._where = where
        self._run: _Run | None = None
        # Reentrant, since a finalizer that calls `stop` may come at any time.
        self._lock = threading.RLock()

    def start(self) -> None:
        """Have the thread run, and do not wait for it."""
        if self._run is not None:
            return
        # Without a descriptor or a thread to spare, reading goes on, just not from near.
        with self._lock, contextlib.suppress(OSError, RuntimeError):
            if self._run is None:
                run = _Run()
                try:
                    threading.Thread(
                        target=self._work, args=(run,), name="hornbeam-near", daemon=True
                    ).start()
                except BaseException:
                    run.close()
                    raise
                self._run = run

    def stop(self) -> _Run | None:
        """Empty and disable the cache, and have the thread end, without waiting for it."""
        with self._lock:
            run, self._run = self._run, None
            self._near.disable()
            if run is not None:
                run.end()
        return run

    def close(self) -> None:
        """Stop, and wait for the thread, for no longer than a server has to answer."""
        run = self.stop()
        if run is not None:
            run.over.wait(self._timeout)

    def after_fork(self) -> None:
        """Leave the thread and its connections to the parent."""
        self._lock = threading.RLock()
        self._near.after_fork()
        run, self._run = self._run, None
        if run is not None:
            run.close()

    def _work(self, run: _Run) -> None:
        try:
            while not run.ended:
                try:
                    self._follow(run)
                except Exception as error:  # whatever it is, the next try may go better
                    if _is_refusal(error):
                        self._log_refusal(error)
                        return
                    if not isinstance(error, (StoreError, *FAILURES)):
                        logger.exception("the cache in this process was emptied: %s", self._where)
                finally:
                    self._lose(run)
                run.rest()
        finally:
            with self._lock:
                run.close()
            run.over.set()

    def _follow(self, run: _Run) -> None:
        """Keep the cache true until the run is to end.

        Raises:
            Exception: a server was lost, or could not be reached.
        """
        servers = self._link.primaries()
        feeds: list[Feed] = []
        for server in servers:
            connection = self._link.dial_to(server, protocol=3)
            run.connections.append(connection)
            feeds.append(Feed(connection, self._timeout, time.monotonic()))
        with self._lock:
            if run.ended:
                return
            self._near.enable()
        run.pause = _FIRST_PAUSE
        # A failover, or a slot that moved, makes another server the one to listen to.
        while not run.ended and self._link.primaries() == servers:
            for feed in run.wait(feeds):
                self._apply(feed)
            for feed in feeds:
                feed.keep_up(time.monotonic())

    def _apply(self, feed: Feed) -> None:
        for keys in feed.changes(time.monotonic()):
            if keys is None:
                self._near.flush()
            else:
                self._near.forget(keys)

    def _lose(self, run: _Run) -> None:
        with self._lock:
            if self._run is run:  # else the cache is another run's by now
                self._near.disable()
            run.hang_up()

    def _log_refusal(self, error: Exception) -> None:
        logger.warning(
            "%s: the cache is read from the server every time, since it refuses CLIENT TRACKING "
            "to this user or altogether (%s)",
            self._where,
            error,
        )


class _Run:
    """One run of the thread: when it ends, and what it has open."""

    def __init__(self) -> None:
        self.ended = False
        self.over = threading.Event()
        self.connections: list[SyncConnection] = []
        self.pause = _FIRST_PAUSE
        self._pipe = list(os.pipe())

    def end(self) -> None:
        """Have the thread leave whatever it waits in, for good."""
        self.ended = True
        if len(self._pipe) == 2:  # noqa: PLR2004 - both ends
            os.close(self._pipe.pop())  # which makes the other one readable

    def wait(self, feeds: Sequence[Feed]) -> list[Feed]:
        """Wait until there is something to read or to do; return the feeds to read from."""
        now = time.monotonic()
        due = min((now if feed.behind else feed.next() for feed in feeds), default=now + 1)
        readable = self._poll(feeds, due - now)
        return [feed for feed in feeds if feed.behind or feed.fileno() in readable]

    def rest(self) -> None:
        """Wait before the next try, each time for longer."""
        self._poll((), self.pause)
        self.pause = min(2 * self.pause, _LONGEST_PAUSE)

    def hang_up(self) -> None:
        """Close the connections; in a forked child, without a word to the servers."""
        while self.connections:
            self.connections.pop().disconnect()

    def close(self) -> None:
        """Close all there is to close."""
        self.hang_up()
        while self._pipe:
            os.close(self._pipe.pop())

    def _poll(self, feeds: Sequence[Feed], seconds: float) -> set[int]:
        poller = select.poll()
        poller.register(self._pipe[0], select.POLLIN)
        for feed in feeds:
            poller.register(feed, select.POLLIN)
        return {descriptor for descriptor, _ in poller.poll(max(0.0, seconds) * 1000)}


def _is_refusal(error: Exception) -> bool:
    """Return whether the server said that it will not do this, now or later."""
    reply = error.__cause__ if isinstance(error, StoreError) else error
    return isinstance(reply, NoPermissionError) or (
        isinstance(reply, ResponseError)
        and (reply.status_code == "ERR" or str(reply).startswith("NOPROTO"))
    )
