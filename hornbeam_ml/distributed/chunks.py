"""Chunks of a batch, and the calls that they make. Without threads, sockets or a clock."""

from __future__ import annotations

from dataclasses import dataclass, field

_MOST_TRIES = 3  # at nodes; one whose items end processes must not end all of them
_MOST_ERRORS = 2


@dataclass(eq=False)
class Chunk:
    """Items of a batch that are given away together.

    Attributes:
        start: The first, by its place in the batch.
        stop: The one after the last.
        tried: Where it failed.
        errors: How often the function failed on it.
        error: What happened last.
        refused_at: When a node first had no room for it.
        copies: How many calls are under way with it.
        done: Whether it has its results.
    """

    start: int
    stop: int
    tried: set[str] = field(default_factory=set)
    errors: int = 0
    error: BaseException | None = None
    refused_at: float | None = None
    copies: int = 0
    done: bool = False

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def is_spent(self) -> bool:
        """Whether no further node is to be bothered with it."""
        return self.errors >= _MOST_ERRORS or len(self.tried) >= _MOST_TRIES

    def split(self, size: int) -> Chunk | None:
        """Keep so many items, and return a chunk of the others with the same history."""
        if size >= len(self):
            return None
        rest = Chunk(
            self.start + size,
            self.stop,
            tried=set(self.tried),
            errors=self.errors,
            error=self.error,
            refused_at=self.refused_at,
        )
        self.stop = rest.start
        return rest


@dataclass(eq=False)
class Lane:
    """A node, or this process, in the eyes of one batch, which gives it one chunk at a time.

    Attributes:
        name: Its name, or `LOCAL`.
        is_listed: Whether it is among the live nodes.
        flight: What it has.
        out_until: Since it failed: until when it gets nothing.
        rests_until: Since it had no room: the same.
        failures: How often it failed since it last answered.
    """

    name: str
    is_listed: bool = True
    flight: Flight | None = None
    out_until: float | None = None
    rests_until: float = 0.0
    failures: int = 0

    @property
    def is_usable(self) -> bool:
        """Whether it may get chunks, now or in a moment."""
        return self.is_listed and self.out_until is None


@dataclass(frozen=True, eq=False)
class Flight:
    """A call under way.

    Attributes:
        chunk: What it is about.
        lane: Where it went.
        began: When.
    """

    chunk: Chunk
    lane: Lane
    began: float

    @property
    def name(self) -> str:
        """The node, or `LOCAL`."""
        return self.lane.name
