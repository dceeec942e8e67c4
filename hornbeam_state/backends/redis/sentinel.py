"""One server that is found through sentinels, which promote a replica when it fails.

What the sentinels say holds for a second. Then one caller asks them again, while the others go on
for another second at most: a primary that was replaced goes on as if nothing had happened until
it is told, which takes ten seconds. If no sentinel answers, connections that are open are used,
but no new one is made. Each new connection begins with a look at the server's role. A server that
is no primary has done nothing, so that even a write goes to the next one.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from redis import exceptions as driver

from hornbeam_state.backends.redis.errors import Interrupted, Stage, unreachable
from hornbeam_state.backends.redis.flight import Flight
from hornbeam_state.backends.redis.routes import (
    Inquiry,
    Outcome,
    Pause,
    Routes,
    Send,
    Work,
    is_late,
    pauses,
)
from hornbeam_state.backends.redis.topology import Address
from hornbeam_state.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hornbeam_state.backends.redis.batches import Batch, Command
    from hornbeam_state.config import StoreConfig

_HOLDS: Final = 1.0
_SHARE: Final = 0.25  # of the timeout, for asking the sentinels while a connection may be open
_NO_PRIMARY: Final = (driver.ReadOnlyError, driver.BusyLoadingError, driver.MasterDownError)


class SentinelRoutes(Routes):
    """Decides for the calls to the primary of a service.

    Args:
        config: The store.
    """

    def __init__(self, config: StoreConfig) -> None:
        self._sentinels = tuple(Address(*host) for host in config.hosts)
        super().__init__(config, self._sentinels[0])
        self._service = config.service
        self._primary: Address | None = None
        self._asked_at = 0.0
        self._failed_at = 0.0
        self._failed_with: Exception | None = None
        self._flight = Flight(config.timeout)

    def after_fork(self) -> None:
        """Begin anew: another thread may have held a lock, or been asking the sentinels."""
        super().after_fork()
        self._flight = Flight(self.timeout)

    def primaries(self) -> Work[tuple[Address, ...]]:
        """Find out which server holds the store."""
        return ((yield from self.locate(0)),)

    def locate(self, bucket: int) -> Work[Address]:  # noqa: ARG002
        """Find out which server holds the store."""
        found = yield from self._current(time.monotonic() + self.timeout)
        if isinstance(found, Interrupted):
            raise unreachable(found, self.where, self.timeout, write=False) from found
        return found

    def knows(self, address: Address) -> bool:
        """Return whether a server is the primary, as far as is known."""
        return address == self._primary

    def lost(self, address: Address) -> None:
        """Ask the sentinels before the next new connection."""
        if address == self._primary:
            self._asked_at = 0.0

    def _call(self, batch: Batch, at: Address | None) -> Work[list[Any]]:  # noqa: ARG002
        started = time.monotonic()
        self._admit(started)
        deadline = started + self.timeout
        turn = _Turn(batch)
        repeated = False
        for pause in pauses():
            outcome = yield from self._send(turn, deadline, fresh=repeated)
            if isinstance(outcome, Interrupted):
                if repeated or not self._repeats(outcome, batch, started):
                    reason = self._reason_of(outcome, turn, deadline)
                    raise self._failure(reason, batch, started) from reason
                repeated = True
                continue
            if isinstance(outcome, list):
                turn.take(outcome)
                if not turn.todo:
                    break
            elif isinstance(outcome, _NO_PRIMARY):
                turn.refusal = outcome
            else:
                raise self.refusal(outcome) from outcome
            self._demoted(turn.asked)
            if is_late(deadline, self.timeout):
                if isinstance(outcome, list):
                    return turn.replies
                raise self.refusal(outcome) from outcome
            yield Pause(pause)
        self._breaker.succeeded()
        return turn.replies

    def _repeats(self, failure: Interrupted, batch: Batch, started: float) -> bool:
        """Return whether the call may be made again; another server may be the primary by now."""
        if failure.stage is Stage.CONNECTING:
            return time.monotonic() - started < self.timeout
        return super()._repeats(failure, batch, started)

    def _reason_of(
        self, failure: Interrupted, turn: _Turn, deadline: float
    ) -> Interrupted | driver.RedisError:
        """Return what the last server said, if time ran out looking for another."""
        if turn.refusal and failure.stage is Stage.CONNECTING and is_late(deadline, self.timeout):
            return turn.refusal
        return failure

    def _send(self, turn: _Turn, deadline: float, *, fresh: bool) -> Work[Outcome]:
        """Send on a connection that is open, or on a new one to whom the sentinels name now."""
        yield from self._look_again(deadline)
        primary = self._primary
        if primary is not None and not fresh:
            holds = time.monotonic() - self._asked_at < _HOLDS
            turn.asked = primary
            send = Send(primary, turn.commands, turn.whole, deadline, idle=not holds)
            outcome: Outcome = yield send
            if not isinstance(outcome, Interrupted):
                return outcome
            self.lost(primary)
            if holds or outcome.stage is not Stage.CONNECTING:
                return outcome
        found = yield from self._current(deadline)
        if isinstance(found, Interrupted):
            return found
        turn.asked = found
        outcome = yield Send(found, turn.commands, turn.whole, deadline, fresh)
        if isinstance(outcome, Interrupted):
            self.lost(found)
        return outcome

    def _look_again(self, deadline: float) -> Work[None]:
        """Ask the sentinels if it has been a while; if it has been long, wait for who does."""
        for pause in pauses():
            now = time.monotonic()
            age = now - max(self._asked_at, self._failed_at)
            if self._primary is None or age < _HOLDS:
                return
            if self._flight.begin(now, at_once=True):
                break
            if age < 2 * _HOLDS or is_late(deadline, self.timeout):
                return
            yield Pause(pause)
        try:
            yield from self._ask_sentinels(min(deadline, now + _SHARE * self.timeout))
        except StoreUnavailable:  # one of them refused; connections may be open nevertheless
            pass
        finally:
            self._flight.end()

    def _current(self, deadline: float) -> Work[Address | Interrupted]:
        """Return the primary, as known or as the sentinels name it now; or why none is known."""
        began = time.monotonic()
        for pause in pauses():
            now = time.monotonic()
            if self._primary is not None and now - self._asked_at < _HOLDS:
                return self._primary
            if self._flight.begin(now, at_once=True):
                try:
                    return (yield from self._ask_sentinels(deadline))
                finally:
                    self._flight.end()
            if self._failed_at > began and self._failed_with is not None:
                return Interrupted(Stage.CONNECTING, self._failed_with)
            if now + pause >= deadline:
                break
            yield Pause(pause)
        return Interrupted(Stage.CONNECTING, driver.TimeoutError("the sentinels did not answer"))

    def _ask_sentinels(self, deadline: float) -> Work[Address | Interrupted]:
        """Ask one after the other, each for its share of the time that is left."""
        words = (b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", self._service.encode())
        sentinels = self._sentinels
        outcomes: list[Outcome] = []
        for number, sentinel in enumerate(sentinels):
            share = (deadline - time.monotonic()) / (len(sentinels) - number)
            if share <= 0:
                break
            outcome = yield Inquiry(sentinel, words, share, sentinel=True)
            if isinstance(outcome, list) and isinstance(outcome[0], list):
                host, port = outcome[0]
                self._primary = Address(host.decode(), int(port))
                self._asked_at = time.monotonic()
                self._sentinels = (*sentinels[number:], *sentinels[:number])
                return self._primary
            outcomes.append(outcome)
        self._failed_with, self._failed_at = None, time.monotonic()
        self._failed_with = self._reason(outcomes)
        return Interrupted(Stage.CONNECTING, self._failed_with)

    def _reason(self, outcomes: Sequence[Outcome]) -> Exception:
        """Say why no sentinel named a primary.

        Raises:
            StoreUnavailable: because one of them refused: waiting will not help.
        """
        for outcome in outcomes:
            if outcome == [None]:
                raise StoreUnavailable(
                    f"{self.where}: the sentinels know no service {self._service!r}: correct its "
                    f"name in the store URL"
                )
            refusal = outcome[0] if isinstance(outcome, list) else outcome
            if isinstance(refusal, driver.RedisError):
                raise StoreUnavailable(
                    f"{self.where}: a sentinel refused ({refusal}): give the address of a sentinel "
                    f"and, if it asks for a password, write ?sentinel_password=PASSWORD"
                ) from refusal
        last = str(outcomes[-1]) if outcomes else "no time was left"
        return driver.ConnectionError(f"no sentinel answers: {last or 'time ran out'}")

    def _demoted(self, address: Address | None) -> None:
        """Forget a server that is no primary; ask another sentinel first, as this one knew less."""
        if address == self._primary:
            self._primary = None
            first, *others = self._sentinels
            self._sentinels = (*others, first)


class _Turn:
    """What of a batch is still to be asked, and the replies so far."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self.replies: list[Any] = [None] * len(batch.commands)
        self.todo = list(range(len(batch.commands)))
        self.commands: Sequence[Command] = batch.commands
        self.asked: Address | None = None
        self.refusal: driver.RedisError | None = None  # of the last server that was no primary

    @property
    def whole(self) -> bool:
        return self._batch.whole or len(self.todo) == 1

    def take(self, replies: list[Any]) -> None:
        """Note the replies; what a server refused for being no primary is still to be asked."""
        if self._batch.is_transaction:
            self.replies = replies
            self.refusal = next(filter(_refuses, _flat(replies)), None)
            self.todo = self.todo if self.refusal else []
            return
        for index, reply in zip(self.todo, replies, strict=True):
            self.replies[index] = reply
        self.refusal = next(filter(_refuses, replies), None)
        self.todo = [index for index in self.todo if _refuses(self.replies[index])]
        self.commands = [self._batch.commands[index] for index in self.todo]


def _flat(replies: Sequence[Any]) -> list[Any]:
    """Return the replies of a transaction, and those in the reply of its EXEC."""
    executed = replies[-1]
    return [*replies, *executed] if isinstance(executed, list) else [*replies]


def _refuses(reply: Any) -> bool:
    """Return whether a server said that it is no primary; a script of 6.2 says so in its midst."""
    return isinstance(reply, driver.ResponseError) and (
        isinstance(reply, _NO_PRIMARY) or " -READONLY" in str(reply)
    )
