"""Subscriptions that share one connection, which is made again whenever it is lost."""

from __future__ import annotations

import math
import selectors
from typing import TYPE_CHECKING, Final

from redis.exceptions import ResponseError

from hornbeam_state.backends.redis.channels import Coverage
from hornbeam_state.backends.redis.errors import FAILURES, Interrupted, Stage, refused, unreachable
from hornbeam_state.backends.redis.outage import Outage
from hornbeam_state.backends.redis.session import Session, settle
from hornbeam_state.backends.redis.wire import Wire
from hornbeam_state.errors import StoreError, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from hornbeam_state.backends.base import Topics
    from hornbeam_state.backends.redis.channels import Naming
    from hornbeam_state.backends.redis.connections import SyncConnection
    from hornbeam_state.backends.redis.session import Member
    from hornbeam_state.config import StoreConfig

LINGER: Final = 1.0  # seconds that a connection is kept when its last subscription has gone
PATIENCE: Final = 5  # timeouts of silence before a PING, and again until the connection is lost


class Lane:
    """Members of which no two match the same topic, and their connection.

    All of it happens on the reader's thread.

    Args:
        config: Of the store.
        naming: How channels are named.
        selector: Where the connection is waited for; the data of its key is the lane.
        dial: Begins to make a connection; `dialled` is to be called with what came of it.
    """

    def __init__(
        self,
        config: StoreConfig,
        naming: Naming,
        selector: selectors.BaseSelector,
        dial: Callable[[Lane], None],
    ) -> None:
        self._where = config.safe_url
        self._timeout = config.timeout
        self._naming = naming
        self._selector = selector
        self._dial = dial
        self._members: dict[Member, None] = {}
        self._coverage = Coverage()
        self._open: tuple[Wire, Session] | None = None
        self._opened_at = 0.0
        self._dialling = False
        self._idle_since = 0.0
        self._draining = False
        self._outage = Outage(config.timeout)
        self._error: StoreError | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing is left of it."""
        return not (self._members or self._open or self._dialling)

    @property
    def is_connected(self) -> bool:
        """Whether the server may send something."""
        return self._open is not None

    def fits(self, topics: Topics) -> bool:
        """Return whether a subscription to `topics` may join."""
        return not self._draining and self._coverage.is_apart(topics)

    def join(self, member: Member, now: float) -> None:
        """Subscribe."""
        self._members[member] = None
        self._coverage.add(member.topics)
        if self._open is None:
            self._outage.next_try = now  # somebody waits for it
        else:
            self._open[1].subscribe(member, now)
            self._flush(now)

    def leave(self, member: Member, now: float, done: Future[None] | None) -> None:
        """Unsubscribe; `done` is done when the server knows, or is not to be waited for."""
        if member not in self._members:
            settle(done)
            return
        self._remove(member, now)
        if self._open is None:
            settle(done)
            return
        _, session = self._open
        silent_since = session.silent_since
        if silent_since is not None and now - silent_since > self._timeout:
            settle(done)
        session.unsubscribe(member, now, done)
        self._flush(now)

    def drain(self, now: float) -> None:
        """Close all inboxes and, once the server has unsubscribed them, the connection."""
        self._draining = True
        for member in list(self._members):
            self.leave(member, now, None)
            self._end(member)

    def abort(self) -> None:
        """Close all inboxes and the connection at once."""
        self._hang_up()
        for member in self._members:
            self._end(member)

    def dialled(self, outcome: SyncConnection | StoreError, now: float) -> None:
        """Go on with a connection, or without one."""
        self._dialling = False
        if isinstance(outcome, StoreError):
            self._error = outcome
            self._outage.failed(now)
            for member in list(self._members):
                if not member.begun.done():
                    self._remove(member, now)
                    settle(member.begun, _copy(outcome))
        elif not self._members:
            outcome.disconnect()
        else:
            wire, session = Wire(outcome), Session(self._naming, now)
            self._selector.register(wire, selectors.EVENT_READ, self)
            self._open, self._opened_at = (wire, session), now
            for member in self._members:
                session.subscribe(member, now)
            self._flush(now)

    def ready(self, now: float) -> None:
        """Read what has arrived, and write what can be written now."""
        if self._open is None:
            return
        wire, session = self._open
        try:
            for member, error in session.received(wire.receive(), now):
                self._refuse(member, error, now)
        except FAILURES as error:
            self._lose(error, now)
        self._flush(now)

    def attend(self, now: float) -> float:
        """Do what is due; return when something will be due again."""
        if self._open is not None:
            _, session = self._open
            due = self._watch(session, now) if self._members else self._retire(session, now)
        elif self._dialling or not self._members:
            due = math.inf
        elif now < self._outage.next_try:
            due = self._outage.next_try
        else:
            due, self._dialling = math.inf, True
            self._dial(self)
        if self._outage.must_tell(now):
            self._tell()
        return min(due, self._outage.tell_at())

    def after_fork(self) -> None:
        """Close the child's copy of the connection."""
        if self._open is not None:
            self._open[0].close()

    def _watch(self, session: Session, now: float) -> float:
        """See to it that a server that is gone is noticed."""
        silent_since, patience = session.silent_since, PATIENCE * self._timeout
        if silent_since is None:
            self._recover()
            if now >= session.heard + patience:
                session.ping(now)
                self._flush(now)
                return now + self._timeout
            return session.heard + patience
        if now >= silent_since + patience:
            self._lose(TimeoutError("it was silent for too long"), now)
            return now
        if now >= silent_since + self._timeout:
            self._outage.begin(silent_since)
            return silent_since + patience
        return silent_since + self._timeout

    def _retire(self, session: Session, now: float) -> float:
        """Close a connection that no subscription needs any more."""
        silent_since = session.silent_since
        if not self._draining:
            due = self._idle_since + LINGER
        else:
            due = now if silent_since is None else silent_since + self._timeout
        if now >= due:
            self._hang_up()
        return due

    def _tell(self) -> None:
        """Let the readers know that the server has been away for longer than a call waits."""
        error = self._error or self._explained(TimeoutError())
        for member in self._members:
            inbox = member.inbox()
            if inbox is not None and member.has_begun:
                inbox.fail(_copy(error))

    def _recover(self) -> None:
        """Note that the server has answered everything."""
        self._error = None
        if self._outage.end():
            for member in self._members:
                inbox = member.inbox()
                if inbox is not None:
                    inbox.recover()

    def _refuse(self, member: Member, error: ResponseError, now: float) -> None:
        """Give up on a member that the server does not let subscribe."""
        if member not in self._members:
            return
        if member.begun.done():  # it did before: it may again
            raise error
        self.leave(member, now, None)
        settle(member.begun, refused(error, self._where))

    def _flush(self, now: float) -> None:
        if self._open is None:
            return
        wire, session = self._open
        try:
            wire.send(session.output)
        except OSError as error:
            self._lose(error, now)
            return
        writing = selectors.EVENT_WRITE if session.output else 0
        self._selector.modify(wire, selectors.EVENT_READ | writing, self)

    def _lose(self, error: Exception, now: float) -> None:
        """Count a gap for whoever was subscribed, and have the connection made again."""
        if self._open is None:
            return
        self._hang_up()
        self._error = self._explained(error)
        self._outage.begin(now)
        self._outage.failed(now, lasted=now - self._opened_at)
        for member in self._members:
            inbox = member.inbox()
            if inbox is not None and member.has_begun and not member.unanswered:
                inbox.lost()

    def _hang_up(self) -> None:
        if self._open is not None:
            wire, session = self._open
            self._open = None
            self._selector.unregister(wire)
            wire.close()
            session.end()

    def _remove(self, member: Member, now: float) -> None:
        del self._members[member]
        self._coverage.remove(member.topics)
        self._idle_since = now

    def _end(self, member: Member) -> None:
        settle(member.begun, StoreUnavailable(f"{self._where}: the store was closed meanwhile"))
        inbox = member.inbox()
        if inbox is not None:
            inbox.shut()

    def _explained(self, error: Exception) -> StoreError:
        if isinstance(error, ResponseError):
            return refused(error, self._where)
        failure = Interrupted(Stage.WAITING, error)
        return unreachable(failure, self._where, self._timeout, write=False)


def _copy(error: StoreError) -> StoreError:
    """Return the same error for another thread to raise."""
    copy = type(error)(*error.args)
    copy.__cause__ = error.__cause__
    return copy
