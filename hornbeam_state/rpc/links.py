"""Channels to nodes: made when they are needed, shared by all callers, watched."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from concurrent.futures import Future
from math import inf
from typing import TYPE_CHECKING, Final

from hornbeam_state.errors import NodeDown, StoreError
from hornbeam_state.rpc import carriers
from hornbeam_state.rpc.outcomes import unsent
from hornbeam_state.rpc.registration import TTL_S
from hornbeam_state.rpc.server import node
from hornbeam_state.transports.base import KeepingChannel

if TYPE_CHECKING:
    from collections.abc import Callable

    from hornbeam_state.rpc.entries import Entry
    from hornbeam_state.rpc.registry import Registry
    from hornbeam_state.store import Store
    from hornbeam_state.transports.base import Channel

logger = logging.getLogger("hornbeam.rpc")

_WATCH_S: Final = 0.5
_DOUBT_S: Final = 2.0  # in which nodes can register again at a store that was away
_IDLE_S: Final = 60.0
_CONNECT_S: Final = 4.0


class Link:
    """A channel to one process that serves a node.

    Attributes:
        entry: The node, as it was when the channel was made.
        channel: The channel.
        keeps: Whether it is for casts.
        used_at: When a call was last made, by the monotonic clock.
        retired: Whether no new call used it since the watcher last looked.
        replaced: Whether another process had the name when the watcher last looked.
    """

    def __init__(self, entry: Entry, channel: Channel, *, keeps: bool = False) -> None:
        self.entry = entry
        self.channel = channel
        self.keeps = keeps
        self.used_at = time.monotonic()
        self.retired = False
        self.replaced = False
        self._beat = entry.beat
        self._looked_at = -inf
        self._valid_until = -inf  # its entry does not expire before that

    def note_beat(self, entry: Entry, now: float) -> None:
        """Take note of the entry of its node, as it is now; it may be another process's by now."""
        # Written since the last look. A store that was restored may show an earlier one again.
        if entry.token == self.entry.token and entry.beat > self._beat:
            self._beat, self._valid_until = entry.beat, self._looked_at + TTL_S
        self._looked_at = now

    def is_forgotten(self, now: float) -> bool:
        """Return whether its entry, which is missing, was lost by the store.

        Then it is too early for the entry to have expired, and a node that leaves would have ended
        the connection. One that keeps calls does not end with its node, and tells nothing.
        """
        keeps_calls = isinstance(self.channel, KeepingChannel)
        return now < self._valid_until and self.channel.connected and not keeps_calls

    @property
    def way(self) -> tuple[str, bool]:
        """The node, and whether the link is for casts."""
        return self.entry.name, self.keeps

    def explain(self, error: NodeDown) -> NodeDown:
        """Return the error of a call over this link, with the name of the node."""
        named = NodeDown(f"{self.entry.name}: {error}")
        named.sent = error.sent
        return named


class Links:
    """The links of a process. Safe to use from any thread and event loop.

    While there are links, a thread looks every half second whether their nodes are still in the
    registry. A link to one that is not is closed, which ends the calls that wait there: a node that
    hangs, or is cut off, closes nothing by itself.

    Args:
        store: Where nodes are registered.
        registry: Finds them.
    """

    def __init__(self, store: Store, registry: Registry) -> None:
        self._store = store
        self._registry = registry
        self._lock = threading.Lock()
        self._futures: dict[tuple[str, bool], Future[Link]] = {}  # to be used for new calls
        self._links: list[Link] = []  # all that are open
        self._wake = threading.Event()
        self._is_watched = False
        _all.add(self)

    def get(
        self, name: str, *, keeps: bool = False, instead_of: Link | None = None
    ) -> Future[Link]:
        """Return a future of the link to a node; it fails with what `Registry.find` raises.

        Args:
            name: The full name of the node.
            keeps: Whether it is for casts: over what keeps them, where there is that.
            instead_of: A link that turned out to be of no use.
        """
        way = name, keeps and carriers.is_on_redis(self._store)
        future = self._futures.get(way)
        if future is not None and _is_of_use(future, instead_of):
            return future
        with self._lock:
            future = self._futures.get(way)
            if future is not None and _is_of_use(future, instead_of):
                return future
            made: Future[Link] = Future()
            made.set_running_or_notify_cancel()  # nobody may cancel what others wait for
            _start(f"hornbeam-connect-{name}", self._connect, way, made)
            self._futures[way] = made  # the thread looks here with the lock, so after this
            return made

    def pending(self, name: str) -> int:
        """Return how many calls of this process wait for a node."""
        future = self._futures.get((name, False))
        link = None if future is None else _link_of(future)
        return 0 if link is None else link.channel.pending

    def close(self) -> None:
        """Close all links; whoever waits gets `NodeDown`. A later `get` makes new ones."""
        with self._lock:
            links, self._links = self._links, []
            self._futures = {}
            self._wake.set()
        for link in links:
            link.channel.close()

    def forget_after_fork(self) -> None:
        """In a forked child: begin anew. The channels fail those who wait by themselves."""
        self._lock = threading.Lock()
        self._futures = {}
        self._links = []
        self._wake = threading.Event()
        self._is_watched = False

    # Making.

    def _connect(self, way: tuple[str, bool], made: Future[Link]) -> None:
        try:
            link = self._make(*way)
        except BaseException as error:  # noqa: BLE001 - those who wait get it
            with self._lock:
                if self._futures.get(way) is made:
                    del self._futures[way]
            made.set_exception(error)
            return
        with self._lock:
            is_wanted = self._futures.get(way) is made
            if is_wanted:
                self._links.append(link)
            if is_wanted and not self._is_watched:
                self._is_watched = True
                _start("hornbeam-watch", self._watch)
        made.set_result(link)
        if not is_wanted:
            link.channel.close()

    def _make(self, name: str, keeps: bool) -> Link:  # noqa: FBT001 - the two parts of a way
        entry = self._registry.find(name)
        hello = {"node": node(), "pid": os.getpid()}
        try:
            channel = carriers.connect(self._store, entry, hello, _CONNECT_S, keeps=keeps)
        except NodeDown as error:
            raise unsent(f"{name}: {error}") from None
        if channel.peer.get("token") != entry.token:
            channel.close()
            raise unsent(f"{name}: another process listens in its place")
        return Link(entry, channel, keeps=keeps)

    # Watching.

    def _watch(self) -> None:
        believed_from = 0.0  # since when a missing entry means a missing node
        while True:
            self._wake.wait(_WATCH_S)
            with self._lock:
                links = list(self._links)
                self._wake.clear()
                if not links:
                    self._is_watched = False
                    return
            try:
                self._tend(links, believed_from)
            except StoreError as error:
                logger.debug("cannot look after the nodes: %s", error)
                believed_from = time.monotonic() + _DOUBT_S
            except Exception:
                logger.exception("looking after the nodes failed")

    def _tend(self, links: list[Link], believed_from: float) -> None:
        now = time.monotonic()  # before the look: what it finds is not older
        entries = self._registry.find_many([link.entry.name for link in links])
        for link in links:
            entry = entries[link.entry.name]
            if link.channel.pending:
                link.used_at = now
            if entry is None:
                if now >= believed_from and not link.is_forgotten(now):
                    self._drop(link, "no heartbeat came for 4 seconds: it hangs or is cut off")
                continue
            link.note_beat(entry, now)
            if entry.token != link.entry.token:
                self._replace(link)
            elif entry.is_alive() is False:
                self._drop(link, "its process has ended")
            elif not link.channel.connected or (link.retired and not link.channel.pending):
                self._drop(link, None)
            elif not entry.transports or now - link.used_at > _IDLE_S:
                self._retire(link)  # a node that drains finishes the calls it has
            else:
                link.retired = not self._is_current(link)

    def _is_current(self, link: Link) -> bool:
        future = self._futures.get(link.way)
        return future is not None and _link_of(future) is link

    def _retire(self, link: Link) -> None:
        """Let no new call use a link. It is closed later: one may have just got hold of it."""
        with self._lock:
            if self._is_current(link):
                del self._futures[link.way]
        link.retired = True

    def _replace(self, link: Link) -> None:
        """Drop a link to a process that lost its name, when the new one had time to refuse.

        The calls to the process before that are in a stream yet it does not run, and says so.
        """
        if link.replaced:
            self._drop(link, "another process has taken its place")
        else:
            link.replaced = True
            self._retire(link)

    def _drop(self, link: Link, why: str | None) -> None:
        self._retire(link)
        with self._lock, contextlib.suppress(ValueError):  # `close` was faster
            self._links.remove(link)
        if why is not None:
            link.channel.fail(why)
        link.channel.close()


def _start(name: str, target: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=target, args=arguments, name=name, daemon=True).start()


def _link_of(future: Future[Link]) -> Link | None:
    """Return the link, if it is made."""
    if future.done() and future.exception() is None:
        return future.result()
    return None


def _is_of_use(future: Future[Link], instead_of: Link | None) -> bool:
    if not future.done():
        return True
    link = _link_of(future)
    return link is not None and link is not instead_of and link.channel.connected


_all: weakref.WeakSet[Links] = weakref.WeakSet()  # to be told of a fork


def _forget_after_fork() -> None:
    for links in list(_all):
        links.forget_after_fork()


os.register_at_fork(after_in_child=_forget_after_fork)
