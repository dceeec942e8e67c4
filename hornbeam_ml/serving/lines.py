"""Waiting items that may share a batch, in the order of arrival. Pure."""

from __future__ import annotations

from collections import OrderedDict
from math import inf
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable


class Waiting(Protocol):
    """What a policy needs to know of a waiting item."""

    heads_batch: bool

    @property
    def lane(self) -> Hashable:
        """What it has in common with those it may share a batch with."""
        ...

    @property
    def length(self) -> int:
        """Its tokens, at least 1."""
        ...

    @property
    def arrived(self) -> float:
        """When it arrived, seconds."""
        ...

    @property
    def deadline(self) -> float:
        """When it is too late for it, seconds; `inf`: never."""
        ...


W = TypeVar("W", bound=Waiting)


class Line(Generic[W]):
    """The waiting items of one lane; any of them can be taken out at once.

    Args:
        batch_size: The most items in a batch.

    Attributes:
        items: Those that wait, oldest first.
        full_at: Since when a batch of it is complete; `inf` when none is.
    """

    def __init__(self, batch_size: int) -> None:
        self.items: OrderedDict[W, Any] = OrderedDict()
        self.full_at = inf
        self._batch_size = batch_size
        self._heads = 0  # how many of them begin a batch of their own

    @property
    def oldest(self) -> W:
        """The item that arrived first."""
        return next(iter(self.items))

    def add(self, item: W) -> None:
        """Let an item wait."""
        self.items[item] = None
        self._heads += item.heads_batch

    def remove(self, item: W) -> None:
        """Forget an item that waits."""
        del self.items[item]
        self._heads -= item.heads_batch

    def is_full(self) -> bool:
        """Return whether a batch is complete."""
        if len(self.items) >= self._batch_size:
            return True
        return bool(self._heads) and self._heads > self.oldest.heads_batch

    def take(self, now: float, share: int, late: list[W]) -> list[W]:  # noqa: ARG002 - see LengthLine
        """Take out the next batch; none when it is too late for all that wait.

        Args:
            now: Seconds.
            share: The most items, where these are shared out; here they are not.
            late: Gets the items for which it is too late.
        """
        batch: list[W] = []
        while self.items and len(batch) < self._batch_size:
            item = self.oldest
            if item.heads_batch and batch:
                break
            self.items.popitem(last=False)
            self._heads -= item.heads_batch
            (batch if now < item.deadline else late).append(item)
        return batch
