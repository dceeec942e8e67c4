"""How far a batch has come on its way through a Cluster. No sockets here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from hornbeam_state.backends.redis.batches import Command
from hornbeam_state.backends.redis.routes import Send

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hornbeam_state.backends.redis.batches import Batch
    from hornbeam_state.backends.redis.topology import Address, ClusterMap
    from hornbeam_state.errors import StoreError

_ASKING: Final = Command((b"ASKING",))


@dataclass(slots=True)
class Part:
    """The commands of a batch that go to one node.

    Attributes:
        address: The node.
        asking: Whether it is to answer for slots that are only on their way to it.
        fresh: Whether to use a new connection.
        indexes: Which commands of the batch.
        commands: What is sent for them.
    """

    address: Address
    asking: bool
    fresh: bool = False
    indexes: list[int] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)

    def add(self, index: int, command: Command) -> None:
        """Take a command of the batch in."""
        self.indexes.append(index)
        self.commands += (_ASKING, command) if self.asking else (command,)

    def send(self, deadline: float) -> Send:
        """Return the request; ASKING alone does nothing, so one command is still whole."""
        return Send(self.address, self.commands, len(self.indexes) == 1, deadline, self.fresh)

    def replies(self, answers: list[Any]) -> list[Any]:
        """Return one reply for each of `indexes`."""
        return answers[1::2] if self.asking else answers


class Turn:
    """One call's way through a Cluster.

    Args:
        batch: What to ask.
        at: Where commands go that belong to no bucket; None for any primary.
    """

    def __init__(self, batch: Batch, at: Address | None) -> None:
        self.batch = batch
        self.replies: list[Any] = [None] * len(batch.commands)
        self.todo = dict.fromkeys(range(len(batch.commands)))
        self.admitted: set[Address] = set()  # nodes that the circuit breakers let it go to
        self.down: set[Address] = set()  # nodes that say the Cluster is down, in this round
        self.is_begun = False  # whether something of it has been done, or may have been
        self._at = at
        self._asking: dict[int, Address] = {}
        self._repeated: set[int] = set()
        self._failure: StoreError | None = None

    @property
    def is_in_doubt(self) -> bool:
        """Whether it cannot be said any more of what fails now that nothing was changed."""
        return self.is_begun and not self.batch.independent

    def parts(self, known: ClusterMap) -> list[Part]:
        """Say where to send what is still to be asked. What nobody serves is left out."""
        parts: dict[tuple[Address, bool], Part] = {}
        for index in self.todo:
            command = self.batch.commands[index]
            asked = self._asking.get(index)
            if address := asked or self._owner(command, known):
                key = address, asked is not None
                part = parts.get(key) or parts.setdefault(key, Part(*key))
                part.add(index, command)
                part.fresh |= index in self._repeated
        return list(parts.values())

    def _owner(self, command: Command, known: ClusterMap) -> Address | None:
        if command.bucket is None:
            return self._at or known.primaries[0]
        return known.owners[command.bucket]

    def done(self, index: int) -> None:
        """Note that the reply to a command is its answer."""
        self.is_begun = True
        del self.todo[index]

    def note(self, index: int, reply: Any) -> None:
        """Note a reply; a redirection holds for one time only."""
        self.replies[index] = reply
        self._asking.pop(index, None)

    def ask(self, index: int, address: Address) -> None:
        """Send a command to a node that does not serve its slot yet."""
        self._asking[index] = address

    def may_repeat(self, part: Part) -> bool:
        """Return whether none of the commands has been repeated already."""
        return self._repeated.isdisjoint(part.indexes)

    def repeat(self, part: Part) -> None:
        """Send the commands once more, on a new connection, to whoever serves them by then."""
        self._repeated.update(part.indexes)
        for index in part.indexes:
            self._asking.pop(index, None)

    def fail(
        self, indexes: Iterable[int], error: StoreError, cause: Exception | None = None
    ) -> None:
        """Give up on commands; with them goes the batch, unless they are independent.

        Args:
            indexes: The commands.
            error: What their caller gets.
            cause: Where it comes from; `errors.may_have_happened` tells by it.
        """
        error.__cause__ = cause
        for index in list(indexes):
            self.replies[index] = error
            del self.todo[index]
        if not self.batch.independent and self._failure is None:
            self._failure = error

    def raise_failure(self) -> None:
        """Raise the first error that the whole batch fails with, if there is one."""
        if self._failure is not None:
            raise self._failure from self._failure.__cause__
