"""The thread that reads all connections of a backend that carry messages."""

from __future__ import annotations

import math
import selectors
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final

from hornbeam_state.backends.readiness import Readiness
from hornbeam_state.backends.redis.lane import Lane
from hornbeam_state.backends.redis.session import settle
from hornbeam_state.errors import StoreError, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from hornbeam_state.backends.base import Topics
    from hornbeam_state.backends.redis.channels import Naming
    from hornbeam_state.backends.redis.connections import SyncConnection
    from hornbeam_state.backends.redis.session import Member
    from hornbeam_state.config import StoreConfig

_DIALS: Final = 8  # connections that are being made at a time


class Reader:
    """Moves messages from connections to inboxes, however slow those who take them are.

    Other threads hand it requests. It ends by itself when it has no subscription and no
    connection left; from then on it refuses requests.

    A connection is made in a thread of its own, since that may take its time, while messages go
    on arriving through the others.

    Args:
        config: Of the store.
        naming: How channels are named.
        dial: Makes a connection, or raises a `StoreError`.
    """

    def __init__(
        self, config: StoreConfig, naming: Naming, dial: Callable[[], SyncConnection]
    ) -> None:
        self._config = config
        self._naming = naming
        self._make_connection = dial
        self._wake = Readiness()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._lanes: list[Lane] = []
        self._homes: dict[Member, Lane] = {}
        self._draining: list[tuple[Future[None], list[Lane]]] = []
        self._to_dial: deque[Lane] = deque()
        self._dialling = 0
        self._due = 0.0
        self._lock = threading.Lock()
        self._requests: deque[Callable[[float], None]] = deque()
        self._finished = False

    def start(self) -> None:
        """Begin to serve requests.

        Raises:
            RuntimeError: the process can have no more threads.
        """
        threading.Thread(target=self._work, name="hornbeam-messages", daemon=True).start()

    def join(self, member: Member) -> bool:
        """Subscribe; its future tells what came of it. Return False when it has ended."""
        return self._post(partial(self._join, member))

    def leave(self, member: Member, done: Future[None]) -> bool:
        """Unsubscribe; `done` tells when. Return False when it has ended."""
        return self._post(partial(self._leave, member, done))

    def let_go(self, member: Member) -> None:
        """Unsubscribe soon. Takes no lock, so that a finalizer may call it."""
        if not self._finished:
            self._requests.append(partial(self._leave, member, None))
            self._wake.set()

    def drain(self, done: Future[None]) -> bool:
        """End what subscriptions there are; `done` tells when. Return False when it has ended."""
        return self._post(partial(self._drain, done))

    def after_fork(self) -> None:
        """Close the child's copies of all descriptors, without a word to the server."""
        for lane in self._lanes:
            lane.after_fork()
        self._selector.close()
        self._wake.after_fork()

    def _post(self, request: Callable[[float], None]) -> bool:
        with self._lock:
            if self._finished:
                return False
            self._requests.append(request)
        self._wake.set()
        return True

    def _work(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException:
            self._give_up()
            raise
        finally:
            self._selector.close()

    def _turn(self) -> bool:
        """Do what is due, then wait for more to do; return False at the end."""
        now = time.monotonic()
        if now >= self._due and not self._attend(now):
            return False
        wait = None if self._due == math.inf else max(0.0, self._due - now)
        for key, _ in self._selector.select(wait):
            now = time.monotonic()
            if key.data is None:
                self._wake.clear()
                self._serve(now)
            else:
                key.data.ready(now)
                self._due = min(self._due, key.data.attend(now))
        return True

    def _attend(self, now: float) -> bool:
        """Do what is due on each lane; return False when there is none left, and no request."""
        self._due = min([lane.attend(now) for lane in self._lanes], default=math.inf)
        self._lanes = [lane for lane in self._lanes if not lane.is_over]
        for done, lanes in self._draining:
            if all(lane.is_over for lane in lanes):
                settle(done)
        self._draining = [entry for entry in self._draining if not entry[0].done()]
        if self._lanes:
            return True
        with self._lock:
            self._finished = not self._requests
        return not self._finished

    def _serve(self, now: float) -> None:
        while self._requests:
            self._requests.popleft()(now)
        self._due = now

    def _join(self, member: Member, now: float) -> None:
        if member.begun.done():  # its caller has left already
            return
        lane = self._lane_for(member.topics)
        self._homes[member] = lane
        lane.join(member, now)

    def _lane_for(self, topics: Topics) -> Lane:
        for lane in self._lanes:
            if lane.fits(topics):
                return lane
        lane = Lane(self._config, self._naming, self._selector, self._dial)
        self._lanes.append(lane)
        return lane

    def _leave(self, member: Member, done: Future[None] | None, now: float) -> None:
        lane = self._homes.pop(member, None)
        if lane is None:
            settle(done)
        else:
            lane.leave(member, now, done)

    def _drain(self, done: Future[None], now: float) -> None:
        for lane in self._lanes:
            lane.drain(now)
        self._draining.append((done, [lane for lane in self._lanes if lane.is_connected]))

    def _dial(self, lane: Lane) -> None:
        self._to_dial.append(lane)
        self._start_dialling()

    def _start_dialling(self) -> None:
        while self._to_dial and self._dialling < _DIALS:
            work = partial(self._connect, self._to_dial.popleft())
            self._dialling += 1
            try:
                threading.Thread(target=work, name="hornbeam-messages-dial", daemon=True).start()
            except RuntimeError as error:
                self._report(work.args[0], self._no_connection(error))

    def _connect(self, lane: Lane) -> None:
        try:
            outcome: SyncConnection | StoreError = self._make_connection()
        except StoreError as error:
            outcome = error
        except BaseException as error:
            self._report(lane, self._no_connection(error))
            raise
        self._report(lane, outcome)

    def _report(self, lane: Lane, outcome: SyncConnection | StoreError) -> None:
        self._requests.append(partial(self._dialled, lane, outcome))
        self._wake.set()

    def _dialled(self, lane: Lane, outcome: SyncConnection | StoreError, now: float) -> None:
        self._dialling -= 1
        self._start_dialling()
        lane.dialled(outcome, now)

    def _no_connection(self, error: BaseException) -> StoreUnavailable:
        return StoreUnavailable(f"{self._config.safe_url}: no connection for messages: {error!r}")

    def _give_up(self) -> None:
        """Leave nobody waiting, after a fault of ours."""
        with self._lock:
            self._finished = True
        for lane in self._lanes:
            lane.abort()
        for done, _ in self._draining:
            settle(done)
