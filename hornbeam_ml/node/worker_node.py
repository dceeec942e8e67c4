"""A gunicorn worker as a node: others call what the app exposes, and its servings."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Final

from hornbeam_ml.node.servings import serve
from hornbeam_state.errors import HornbeamError
from hornbeam_state.rpc.names import VARIABLE, full_name

if TYPE_CHECKING:
    from hornbeam_state.rpc.server import NodeServer

logger = logging.getLogger("hornbeam.node")

_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 8.0
_LOOK_EVERY_S: Final = 1.0
_FIRST_TRY_S: Final = 1.0


class WorkerNode:
    """What a worker does as a node when ``HORNBEAM_NODE`` is set; nothing without it.

    All of it happens on threads of its own: calls of other processes never hold up the loop that
    serves the app. A node that cannot be one (its name is taken, the store is away) is no reason
    not to serve the app: it is tried again until the worker leaves.
    """

    def __init__(self) -> None:
        self._name: str | None = None
        self._server: NodeServer | None = None
        self._leaving = threading.Event()
        self._tried = threading.Event()
        self._until = 0.0
        self._thread: threading.Thread | None = None

    def take_name(self, slot: int) -> None:
        """Name this process by the worker's slot, ``web-0@host`` where it says ``web``.

        Slots are those of workers that live at the same time, of old and new configurations
        alike, so that their names differ; who comes later gets the name again.

        Raises:
            ConfigError: ``HORNBEAM_NODE`` is no name.
        """
        if os.environ.get(VARIABLE):
            name, _, host = full_name().partition("@")
            self._name = full_name(f"{name}-{slot}@{host}")
            os.environ[VARIABLE] = self._name

    def start(self) -> None:
        """Become a node; waits for the first try, a second at most.

        Older workers leave when this one is ready, and calls need a node in their place.
        """
        if self._name is not None and self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name="hornbeam-worker-node", daemon=True
            )
            self._thread.start()
            self._tried.wait(_FIRST_TRY_S)

    def leave(self, grace: float) -> None:
        """Begin to end: take no more calls, finish those that were taken. Does not wait.

        Args:
            grace: How many seconds these may take; only that of the first time counts.
        """
        if not self._leaving.is_set():
            self._until = time.monotonic() + grace
            self._leaving.set()

    @property
    def unfinished(self) -> int:
        """How many calls of others wait or run; at least 1 until the node has ended."""
        if self._thread is None or not self._thread.is_alive():
            return 0
        server = self._server
        return 1 if server is None else max(1, server.running + server.queued)

    def _run(self) -> None:
        try:
            while not self._leaving.is_set():
                self._serve()
        except Exception:
            logger.exception("This worker is no node")
        finally:
            self._tried.set()

    def _serve(self) -> None:
        """Serve until the worker leaves, or another process has the name."""
        server = self._server = self._begin()
        if server is None:
            return
        logger.info("Serving as node %s", server.name)
        self._tried.set()
        while not (self._leaving.wait(_LOOK_EVERY_S) or server.wait(0)):
            pass
        server.close(max(0.0, self._until - time.monotonic()))

    def _begin(self) -> NodeServer | None:
        """Return the node, tried until it can be one; None: the worker leaves."""
        pause, said = _FIRST_PAUSE_S, ""
        while not self._leaving.is_set():
            try:
                return serve(self._name)
            except HornbeamError as error:
                if str(error) != said:
                    logger.warning("Not a node yet, trying again: %s", error)
                    said = str(error)
            self._tried.set()
            self._leaving.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        return None
