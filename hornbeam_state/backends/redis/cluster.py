"""A Cluster: each bucket on the primary that serves its hash slot.

A node that does not serve a slot says so, and has done nothing: the command goes to the right one.
Each node has a circuit breaker of its own, so that one that is down does not keep callers from
the others.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from hornbeam_state.backends.redis.breaker import Breaker
from hornbeam_state.backends.redis.errors import (
    Interrupted,
    Stage,
    not_tried,
    rearranged,
    refused,
    unreachable,
)
from hornbeam_state.backends.redis.routes import (
    Outcome,
    Pause,
    Routes,
    Together,
    Work,
    is_late,
    pauses,
)
from hornbeam_state.backends.redis.slots import SlotTable
from hornbeam_state.backends.redis.topology import Address, Ask, Later, Moved, Torn, redirection
from hornbeam_state.backends.redis.turn import Part, Turn

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hornbeam_state.backends.redis.batches import Batch
    from hornbeam_state.config import StoreConfig

_AT_ONCE: Final = 4  # redirections that are followed without a pause
_BRIEF: Final = 0.3  # of the timeout, for slots that nobody serves: it may take long until one does


class ClusterRoutes(Routes):
    """Decides for the calls to a Cluster.

    Args:
        config: The store.
    """

    def __init__(self, config: StoreConfig) -> None:
        super().__init__(config, Address(*config.hosts[0]))
        self._slots = SlotTable(config)
        self._breakers: dict[Address, Breaker] = {}

    def after_fork(self) -> None:
        """Begin anew: another thread may have held a lock, or been asking for the map."""
        self._breakers = {}
        self._slots.after_fork()

    def primaries(self) -> Work[tuple[Address, ...]]:
        """Find out which servers hold the store."""
        return (yield from self._slots.current(time.monotonic() + self.timeout)).primaries

    def locate(self, bucket: int) -> Work[Address]:
        """Find out which server holds a bucket."""
        known = yield from self._slots.current(time.monotonic() + self.timeout)
        owner = known.owners[bucket]
        if owner is None:
            self._slots.doubt()
            raise rearranged(None, self.where, self.timeout, write=False)
        return owner

    def knows(self, address: Address) -> bool:
        """Return whether a server is a node of the Cluster, as far as is known."""
        return self._slots.knows(address)

    def lost(self, address: Address) -> None:
        """Take note that a node failed: another may have taken its place."""
        self._slots.doubt(address)

    def named(self, address: Address) -> str:
        """Return what messages call a node."""
        return f"{self.where} (node {address})"

    def _call(self, batch: Batch, at: Address | None) -> Work[list[Any]]:
        started = time.monotonic()
        deadline = started + self.timeout
        turn = Turn(batch, at)
        for number, pause in enumerate(pauses()):
            parts = yield from self._admitted(turn, deadline)
            unserved = sum(len(part.indexes) for part in parts) < len(turn.todo)
            wait = unserved or number >= _AT_ONCE
            turn.down.clear()
            outcomes = yield from _sent(parts, deadline)
            for part, outcome in sorted(zip(parts, outcomes, strict=True), key=_best_first):
                wait |= self._settle(turn, part, outcome, started)
            turn.raise_failure()
            if not turn.todo:
                break
            patience = _BRIEF if unserved or turn.down else 1
            if wait and is_late(started + patience * self.timeout, patience * self.timeout):
                self._run_out(turn, started)
                break
            if wait:
                self._slots.doubt()
                yield Pause(pause)
        return turn.replies

    def _admitted(self, turn: Turn, deadline: float) -> Work[list[Part]]:
        """Say where to send what is still to be asked, sparing the nodes that are down."""
        parts = turn.parts((yield from self._slots.current(deadline)))
        if not self._spared(turn, parts):
            return parts
        self._slots.doubt()
        parts = turn.parts((yield from self._slots.current(deadline)))
        spared = self._spared(turn, parts)
        for part in parts:
            if part.address in spared:
                pause = spared[part.address]
                write = turn.is_in_doubt and not turn.batch.repeatable
                where = self.named(part.address)
                turn.fail(part.indexes, not_tried(where, pause, write=write))
        turn.raise_failure()
        return [part for part in parts if part.address not in spared]

    def _spared(self, turn: Turn, parts: Iterable[Part]) -> dict[Address, float]:
        """Return the nodes that are to be left alone, each with for how long."""
        now = time.monotonic()
        spared = {}
        for address in {part.address for part in parts} - turn.admitted:
            if pause := self._breaker_of(address).wait(now):
                spared[address] = pause
            else:
                turn.admitted.add(address)
        return spared

    def _breaker_of(self, address: Address) -> Breaker:
        breaker = self._breakers.get(address)
        return breaker or self._breakers.setdefault(address, Breaker(self.timeout))

    def _settle(self, turn: Turn, part: Part, outcome: Outcome, started: float) -> bool:
        """Take note of what became of a part; return whether to wait before going on."""
        if isinstance(outcome, list):
            wait = self._read(turn, part, outcome)
            if part.address not in turn.down:
                self._breaker_of(part.address).succeeded()
            return wait
        self.lost(part.address)
        if not isinstance(outcome, Interrupted):
            turn.fail(part.indexes, refused(outcome, self.named(part.address)), outcome)
        elif turn.may_repeat(part) and self._repeats(outcome, turn.batch, started):
            turn.repeat(part)
        else:
            self._give_up(turn, part, outcome, started)
        return False

    def _read(self, turn: Turn, part: Part, answers: list[Any]) -> bool:
        """Note the replies of a node; return whether one says to wait."""
        wait = False
        for index, reply in zip(part.indexes, part.replies(answers), strict=True):
            turn.note(index, reply)
            match redirection(reply, part.address):
                case None:
                    turn.done(index)
                case Moved(slot, address):
                    self._slots.moved(slot, address)
                case Ask(address):
                    turn.ask(index, address)
                case Torn() if not turn.batch.repeatable:
                    turn.is_begun = True
                    self._wait_no_longer(turn, [index], reply, in_doubt=True)
                case Later(is_down=True):
                    turn.down.add(part.address)
                    wait = True
                case _:
                    wait = True
        return wait

    def _repeats(self, failure: Interrupted, batch: Batch, started: float) -> bool:
        """Return whether the call may be made again; another node may serve the slot by now."""
        if failure.stage is Stage.CONNECTING and not failure.timed_out:
            return time.monotonic() - started < self.timeout
        return super()._repeats(failure, batch, started)

    def _give_up(self, turn: Turn, part: Part, failure: Interrupted, started: float) -> None:
        if failure.stage is not Stage.QUEUED:
            self._breaker_of(part.address).failed(started, time.monotonic())
        if failure.stage is Stage.WAITING:
            turn.is_begun = True
        elif turn.is_in_doubt:
            failure = Interrupted(Stage.WAITING, failure.error)
        where, write = self.named(part.address), not turn.batch.repeatable
        said = [turn.replies[index] for index in part.indexes]
        error = unreachable(failure, where, self.timeout, write=write, said=said)
        turn.fail(part.indexes, error, failure)

    def _run_out(self, turn: Turn, started: float) -> None:
        """Give up on what no node has answered in the end."""
        for address in turn.down:
            self._breaker_of(address).failed(started, time.monotonic())
        answers = (turn.replies[index] for index in turn.todo)
        answer = next((reply for reply in answers if reply is not None), None)
        self._wait_no_longer(turn, turn.todo, answer, in_doubt=turn.is_in_doubt)
        turn.raise_failure()

    def _wait_no_longer(
        self, turn: Turn, indexes: Iterable[int], answer: object, *, in_doubt: bool
    ) -> None:
        write = in_doubt and not turn.batch.repeatable
        error = rearranged(answer, self.where, self.timeout, write=write)
        cause = Interrupted(Stage.WAITING, TimeoutError("waited for a slot")) if write else None
        turn.fail(indexes, error, cause)


def _best_first(settled: tuple[Part, Outcome]) -> int:
    """Sort what was or may have been done to the front: it changes what the rest comes to."""
    outcome = settled[1]
    if isinstance(outcome, list):
        return 0
    return 1 if isinstance(outcome, Interrupted) and outcome.stage is Stage.WAITING else 2


def _sent(parts: Sequence[Part], deadline: float) -> Work[list[Outcome]]:
    """Send every part, and return what became of each."""
    match parts:
        case []:
            return []
        case [part]:
            return [(yield part.send(deadline))]
        case _:
            return list((yield Together([part.send(deadline) for part in parts])))
