"""What the registry holds of a node, and what is told of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final

from hornbeam_state.rpc import places

PREFIX: Final = "node:"
"""What the keys of nodes begin with, in hornbeam's own key space."""


@dataclass(frozen=True, kw_only=True)
class NodeInfo:
    """A node, as it last said of itself.

    Attributes:
        name: ``name@host``.
        host: The machine.
        pid: The process.
        functions: What it exposes: ``"module.function"``, sorted.
        idempotent: Those of them that may run twice for one call.
        servings: Names of the servings that it runs.
        tags: Words it was given, to choose nodes by.
        concurrency: How many calls it runs at a time.
        running: How many ran, those of servings among them.
        queued: How many waited.
        last_seen: When it was last heard of, in seconds since the epoch by the clock of whoever
            asks.
    """

    name: str
    host: str
    pid: int
    functions: tuple[str, ...]
    idempotent: tuple[str, ...]
    servings: tuple[str, ...]
    tags: tuple[str, ...]
    concurrency: int
    running: int
    queued: int
    last_seen: float

    @property
    def load(self) -> float:
        """Calls that ran or waited, for each that it runs at a time."""
        return (self.running + self.queued) / self.concurrency


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A node in the registry.

    Attributes:
        token: Which process this is, of all that ever had the name.
        place: See `places.place`.
        started: See `places.started`.
        beat: How often it was written.
        transports: The address for each transport; none: the node is not ready.
        functions: Each function it exposes, and whether that is idempotent.
        servings: Each serving it runs, and whether that is idempotent.
    """

    name: str
    token: str
    host: str
    pid: int
    place: str
    started: int
    beat: int = 0
    transports: dict[str, dict[str, Any]] = field(default_factory=dict)
    functions: dict[str, bool] = field(default_factory=dict)
    servings: dict[str, bool] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    concurrency: int = 1
    running: int = 0
    queued: int = 0

    @property
    def load(self) -> float:
        """Calls that ran or waited, for each that it runs at a time."""
        return (self.running + self.queued) / self.concurrency

    @property
    def is_ready(self) -> bool:
        """Whether calls may be sent there: it serves, and its process was not seen to be dead."""
        return bool(self.transports) and self.is_alive() is not False

    def is_alive(self) -> bool | None:
        """Return whether its process runs; None: it is elsewhere, and cannot be seen."""
        return places.is_alive(self.place, self.pid, self.started)

    def to_value(self) -> dict[str, Any]:
        """Return it as a value of the store."""
        return asdict(self)

    def to_info(self, last_seen: float) -> NodeInfo:
        """Return what is told of it."""
        return NodeInfo(
            name=self.name,
            host=self.host,
            pid=self.pid,
            functions=tuple(sorted(self.functions)),
            idempotent=tuple(sorted(name for name, is_so in self.functions.items() if is_so)),
            servings=tuple(sorted(self.servings)),
            tags=self.tags,
            concurrency=self.concurrency,
            running=self.running,
            queued=self.queued,
            last_seen=last_seen,
        )


def read_entry(value: Any) -> Entry | None:
    """Return the entry of a value of the store; None: it is none, or of another version."""
    if not isinstance(value, dict):
        return None
    try:
        entry = Entry(**value)
    except TypeError:
        return None
    return entry if _is_sound(entry) else None


def _is_sound(entry: Entry) -> bool:
    """Whether everything in it is of its type, so that one bad entry harms no look at all."""
    tables = (entry.functions, entry.servings, entry.transports)
    if not (isinstance(entry.tags, tuple) and all(isinstance(one, dict) for one in tables)):
        return False
    texts = (entry.name, entry.token, entry.host, entry.place)
    names = (*entry.functions, *entry.servings)
    numbers = (entry.pid, entry.started, entry.beat, entry.running, entry.queued)
    return (
        all(isinstance(text, str) for text in (*texts, *names))
        and all(isinstance(number, int) for number in (*numbers, entry.concurrency))
        and all(isinstance(address, dict) for address in entry.transports.values())
        and entry.concurrency > 0
    )
