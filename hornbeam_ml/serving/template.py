"""What the items of a serving have to be like, and so which of them may share a batch."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from hornbeam_ml.serving.batch import difference, signature

if TYPE_CHECKING:
    from collections.abc import Hashable

    from hornbeam_ml.serving.config import ServingConfig


class Lane(NamedTuple):
    """What the items of one batch have in common.

    Attributes:
        key: Their batch key.
        signature: Their shapes and dtypes when they are stacked, else None.
        streams: Whether their callers want chunks.
    """

    key: Hashable
    signature: Hashable
    streams: bool


class Template:
    """The signature that stacked items must have.

    It is that of the warm-up item, or else of the first item whose batch succeeded. Until one
    has, items of different signatures are batched apart.
    """

    def __init__(self, config: ServingConfig) -> None:
        self._label = config.label
        self._stacks = config.collate == "stack"
        self._lock = threading.Lock()
        self._known: Hashable = None
        if self._stacks and config.warmup is not None:
            self._known = signature(config.warmup)

    def lane_of(self, item: Any, key: Hashable, *, streams: bool) -> Lane:
        """Return the lane of an item that arrives.

        Raises:
            ValueError: the item is not like those the model takes.
        """
        lane = Lane(key, signature(item) if self._stacks else None, streams)
        self.check(lane)
        return lane

    def check(self, lane: Lane) -> None:
        """Look again at what was let in before the template was known.

        Raises:
            ValueError: the items are not like those the model takes.
        """
        known = self._known
        if known is not None and lane.signature != known:
            raise ValueError(f"{self._label}: {difference(known, lane.signature)}")

    def learn(self, lane: Lane) -> None:
        """Take the items of a batch that succeeded for what all later ones must be like."""
        if self._known is None and self._stacks:
            with self._lock:
                if self._known is None:
                    self._known = lane.signature
