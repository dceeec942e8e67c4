"""What becomes of a batch: where it goes, how often, and what its failure means. No sockets here.

`Routes` says it for one server, `sentinel` for one that is found through sentinels and
`cluster` for a Cluster. They are generators: they yield requests (`Send`, `Together`,
`Inquiry`, `Pause`), which a link carries out, so that the blocking and the asyncio link run the
very same code. All of them keep to these rules:

- a read whose connection breaks is asked once more, on a new connection; a write only when the
  server cannot have acted on it;
- a call is over, well or not, within the timeout;
- a server that failed three times in a row is left alone for a moment (see `breaker`).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from redis import exceptions as driver

from hornbeam_state.backends.redis.batches import Batch, OnEachPrimary
from hornbeam_state.backends.redis.breaker import Breaker
from hornbeam_state.backends.redis.errors import (
    Interrupted,
    Stage,
    not_tried,
    refused,
    unreachable,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hornbeam_state.backends.redis.batches import Command, Steps
    from hornbeam_state.backends.redis.topology import Address
    from hornbeam_state.config import StoreConfig
    from hornbeam_state.errors import StoreError

T = TypeVar("T")


class Send(NamedTuple):
    """Send commands to a server, on one of its connections; answered by an `Outcome`.

    Attributes:
        address: The server.
        commands: What to send.
        whole: As in `Batch`.
        deadline: When to give up, by the monotonic clock; None for the timeout from now.
        fresh: Whether to use a new connection.
        idle: Whether to use one that is open, and fail at `Stage.CONNECTING` if there is none.
    """

    address: Address
    commands: Sequence[Command]
    whole: bool
    deadline: float | None = None
    fresh: bool = False
    idle: bool = False


class Together(NamedTuple):
    """Send commands to several servers at once; answered by a list of outcomes."""

    sends: Sequence[Send]


class Inquiry(NamedTuple):
    """Ask a server something on a connection of its own; answered by an `Outcome`.

    Attributes:
        address: The server.
        words: The command.
        seconds: Most seconds to wait for a connection, and for the reply.
        sentinel: Whether it is a sentinel, which has a login of its own.
    """

    address: Address
    words: tuple[bytes, ...]
    seconds: float
    sentinel: bool = False


class Pause(NamedTuple):
    """Wait; answered by None."""

    seconds: float


Outcome: TypeAlias = list[Any] | Interrupted | driver.RedisError
"""The replies, errors among them; or how the connection failed; or why the server wanted none."""

Work: TypeAlias = Generator[Send | Together | Inquiry | Pause, Any, T]
"""Something to be carried out by a link."""


class Routes:
    """Decides for the calls to one server.

    Args:
        config: The store.
        address: The server.
    """

    def __init__(self, config: StoreConfig, address: Address) -> None:
        self.where = config.safe_url
        self.timeout = config.timeout
        self._address = address
        self._breaker = Breaker(config.timeout)

    def after_fork(self) -> None:
        """Begin anew: another thread may have held the breaker's lock."""
        self._breaker = Breaker(self.timeout)

    def operation(self, steps: Steps[T], at: Address | None = None) -> Work[T]:
        """Carry an operation out.

        Args:
            steps: The operation.
            at: The primary for commands that belong to no bucket.

        Raises:
            StoreUnavailable: a server could not be reached in time, or refused.
            StoreFull: a server is out of memory.
        """
        try:
            request = next(steps)
            while True:
                if isinstance(request, Batch):
                    answer = yield from self._call(request, at)
                else:
                    answer = yield from self._on_each(request)
                request = steps.send(answer)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        except driver.RedisError as error:
            raise self.refusal(error) from error
        finally:
            steps.close()  # now, whatever holds on to an error

    def primaries(self) -> Work[tuple[Address, ...]]:
        """Find out which servers hold the store."""
        yield from ()
        return (self._address,)

    def locate(self, bucket: int) -> Work[Address]:  # noqa: ARG002
        """Find out which server holds a bucket."""
        yield from ()
        return self._address

    def knows(self, address: Address) -> bool:
        """Return whether a server is one of those that calls go to at present."""
        return address == self._address

    def lost(self, address: Address) -> None:
        """Take note that a connection to a server failed."""

    def named(self, address: Address) -> str:  # noqa: ARG002
        """Return what messages call a server."""
        return self.where

    def _on_each(self, request: OnEachPrimary) -> Work[list[Any]]:
        results = []
        for address in (yield from self.primaries()):
            steps = request.operation(self.named(address))
            results.append((yield from self.operation(steps, address)))
        return results

    def _call(self, batch: Batch, at: Address | None) -> Work[list[Any]]:  # noqa: ARG002
        started = time.monotonic()
        self._admit(started)
        outcome = yield Send(self._address, batch.commands, batch.whole)
        if isinstance(outcome, Interrupted) and self._repeats(outcome, batch, started):
            deadline = started + self.timeout
            outcome = yield Send(self._address, batch.commands, batch.whole, deadline, fresh=True)
        if isinstance(outcome, list):
            self._breaker.succeeded()
            return outcome
        raise self._failure(outcome, batch, started) from outcome

    def _admit(self, now: float) -> None:
        """Refuse a call while the server is known to be down."""
        pause = self._breaker.wait(now)
        if pause:
            raise not_tried(self.where, pause)

    def _repeats(self, failure: Interrupted, batch: Batch, started: float) -> bool:
        """Return whether the call may be made again, on a new connection."""
        if failure.timed_out or time.monotonic() - started >= self.timeout:
            return False
        return failure.stage is Stage.SENDING or (
            failure.stage is Stage.WAITING and batch.repeatable
        )

    def _failure(
        self, outcome: Interrupted | driver.RedisError, batch: Batch, started: float
    ) -> StoreError:
        """Return the error for the caller."""
        if not isinstance(outcome, Interrupted):
            return self.refusal(outcome)
        if outcome.stage is not Stage.QUEUED:
            self._breaker.failed(started, time.monotonic())
        return unreachable(outcome, self.where, self.timeout, write=not batch.repeatable)

    def refusal(self, error: driver.RedisError) -> StoreError:
        """Return the error for a caller whom a server refused."""
        return refused(error, self.where)


def is_late(deadline: float, timeout: float) -> bool:
    """Return whether too little time is left to wait and ask again: less than a tenth."""
    return time.monotonic() > deadline - timeout / 10


def pauses() -> Iterator[float]:
    """Yield how many seconds to wait before each further look: more and more, 0.05 at most."""
    pause = 0.001
    while True:
        pause = min(2 * pause, 0.05)
        yield pause
