"""Which nodes a call goes to, one after the other. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hornbeam_state.errors import NodeDown, NotExposed, Overloaded
from hornbeam_state.rpc.choosing import choose

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from random import Random

    from hornbeam_state.rpc.entries import Entry

AT_THE_NODE = (NodeDown, NotExposed, Overloaded)
"""What says something of the node that was asked, and nothing of the call."""


class Route:
    """The nodes that one call may go to; each is asked once.

    Args:
        entries: The nodes, one at least.
        pending: How many calls this process has under way to a node.
        random: Where chance comes from.
        repeats: Whether a call that one node may have begun may go to another.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        pending: Callable[[str], int],
        random: Random,
        *,
        repeats: bool = False,
    ) -> None:
        self._left = list(entries)
        self._asked: set[str] = set()  # processes, by their tokens
        self._pending = pending
        self._random = random
        self._repeats = repeats
        self._refused = False

    @property
    def goes_on(self) -> bool:
        """Whether there is a node that was not asked."""
        return bool(self._left)

    def next(self) -> str:
        """Return the name of the node to ask: the less busy of two random ones."""
        chosen = choose(self._left, self._pending, self._random)
        self._left.remove(chosen)
        self._asked.add(chosen.token)
        return chosen.name

    def is_outdated(self, error: BaseException) -> bool:
        """Return whether the last node was not there: others may be, that were not known."""
        if self._left:
            return False
        return isinstance(error, NotExposed) or (isinstance(error, NodeDown) and not error.sent)

    def add(self, entries: Iterable[Entry]) -> None:
        """Take note of nodes; those whose process was asked are asked no more."""
        self._left += [entry for entry in entries if entry.token not in self._asked]

    def may_follow(self, error: BaseException) -> bool:
        """Return whether to ask the next node, given what the call of one raised.

        One that is full sends the call on once: when two are, others are not to be filled too.
        """
        if not self._left:
            return False
        if isinstance(error, NodeDown):
            return self._repeats or not error.sent
        if isinstance(error, Overloaded) and not error.sent:
            refused, self._refused = self._refused, True
            return not refused
        return isinstance(error, NotExposed)
