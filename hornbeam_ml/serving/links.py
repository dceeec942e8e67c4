"""Connections to the processes of a model host, kept while these come and go."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any, Final, Protocol

from hornbeam_state.errors import HornbeamError, NodeDown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from hornbeam_state.transports.base import Channel

logger = logging.getLogger("hornbeam.host")

LATER_S: Final = 1.0
_SILENT_S: Final = 15.0  # a host tells how it is every second
_SOON_S: Final = 0.05


class Connect(Protocol):
    """Connects to the server at a socket; see `hornbeam_state.transports.local.connect`."""

    def __call__(
        self,
        path: Path,
        hello: Mapping[str, Any],
        *,
        on_note: Callable[[Any], None],
        on_lost: Callable[[BaseException | None], None],
    ) -> Channel:
        """Return the connection, or raise `NodeDown`, or why the server refuses."""
        ...


class Links:
    """A connection to each socket of a directory, made again when it is lost. Thread-safe.

    Args:
        directory: Where the sockets are.
        hello: What this process says of itself.
        what: What the log calls the host.
        connect: How to connect.

    Attributes:
        served: What the host said last that it serves, also while it is away; None: nothing yet.
        closed: Whether `close` was called, or this is a forked child.
    """

    def __init__(
        self, directory: Path, hello: Mapping[str, Any], what: str, connect: Connect
    ) -> None:
        self.served: frozenset[str] | None = None
        self.closed = False
        self._directory = directory
        self._hello = hello
        self._what = what
        self._connect = connect
        self._links: dict[Path, Link] = {}
        self._changed = threading.Condition()
        threading.Thread(target=self._keep, name="hornbeam-hosts", daemon=True).start()

    def all(self) -> list[Link]:
        """Return one for each socket that was ever there."""
        return list(self._links.values())

    def told(self) -> list[Link]:
        """Return those that are connected and have told lately how they are."""
        return [link for link in self.all() if link.usable]

    def wait(self, seconds: float) -> None:
        """Wait for so long at most until something is new."""
        with self._changed:
            if not self.closed:
                self._changed.wait(seconds)

    def close(self) -> None:
        """End the connections."""
        self.closed = True
        self._tell()
        for link in self.all():
            link.close()

    def forget_after_fork(self) -> None:
        """In a forked child: the connections are the parent's."""
        self._changed = threading.Condition()
        self.closed = True
        self._links = {}

    def _keep(self) -> None:
        """Connect, and connect again, until closed."""
        while not self.closed:
            self.wait(self._look())

    def _look(self) -> float:
        """Connect where it is due; return in how many seconds to look again."""
        try:
            self._connect_all()
        except OSError as error:
            logger.warning("%s: %s", self._directory, error)
            return LATER_S
        except Exception:
            logger.exception("looking for %s", self._what)
            return LATER_S
        links = self.all()
        return LATER_S if links and all(link.usable for link in links) else _SOON_S

    def _connect_all(self) -> None:
        there = set(self._directory.glob("*.sock")) if self._directory.is_dir() else set()
        for path in sorted(there):
            link = self._links.get(path)
            if link is None:
                link = Link(path)
                self._links = {**self._links, path: link}
            if link.is_due():
                self._open(link)

    def _open(self, link: Link) -> None:
        number = link.begin()
        try:
            channel = self._connect(
                link.path,
                self._hello,
                on_note=lambda note: self._note(link, number, note),
                on_lost=lambda error: self._lost(link, number, error),
            )
        except NodeDown:
            return  # it comes up, or goes down
        except HornbeamError as error:
            link.refuse(str(error))
            logger.error("%s refuses this process: %s", self._what, error)  # noqa: TRY400
        else:
            link.channel = channel
            if self.closed or not channel.connected:  # closed or lost before it was noted
                link.close()
        self._tell()

    def _note(self, link: Link, number: int, note: Any) -> None:
        if number == link.number:
            link.hear(note)
            if link.complete:
                self.served = frozenset(link.targets)
        self._tell()

    def _lost(self, link: Link, number: int, error: BaseException | None) -> None:
        if number == link.number:  # else this is late, and there is another connection already
            link.close()
        if error is not None and not self.closed:
            logger.warning("Lost the connection to %s", self._what)
        self._tell()

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()


class Link:
    """One socket, and what is known of the process behind it.

    Attributes:
        channel: The connection, if any.
        targets: What it serves, by name: ``loaded``, ``ready``, ``info``.
        complete: Whether these are all.
        pid: Of the process.
        number: Which connection this is, counted from 1.
        refused: Why it does not want this process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.channel: Channel | None = None
        self.targets: dict[str, dict[str, Any]] = {}
        self.complete = False
        self.pid = 0
        self.number = 0
        self.refused: str | None = None
        self._failed: str | None = None
        self._heard = 0.0
        self._due = 0.0

    @property
    def failure(self) -> str | None:
        """Why it will not do: it refused this process, or failed to load."""
        return self.refused or self._failed

    @property
    def usable(self) -> bool:
        """Whether it is connected, and has told how it is lately."""
        if self.channel is None or not self.channel.connected:
            return False
        return time.monotonic() - self._heard < _SILENT_S

    def has(self, target: str, what: str) -> bool:
        """Return whether it said that of something it serves."""
        return bool(self.targets.get(target, {}).get(what))

    def is_due(self) -> bool:
        """Return whether it is time to connect."""
        connected = self.channel is not None and self.channel.connected
        return not connected and time.monotonic() >= self._due

    def begin(self) -> int:
        """Note that a connection is about to be made; return its number."""
        self.number += 1
        return self.number

    def hear(self, note: dict[str, Any]) -> None:
        """Take what the process says of itself."""
        self._heard = time.monotonic()
        self.refused = None
        self._failed = note["failed"]
        self.pid = note["pid"]
        self.targets = note["targets"]
        self.complete = note["complete"]

    def refuse(self, reason: str) -> None:
        """Note that the process does not want this one; it is asked again later."""
        self.refused = reason
        self._due = time.monotonic() + LATER_S

    def close(self) -> None:
        """End the connection, if there is one."""
        channel, self.channel = self.channel, None
        self.targets, self.complete = {}, False
        if channel is not None:
            channel.close()
