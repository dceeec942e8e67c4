"""The contract between the store and what it is kept in: bytes in, bytes out.

A `Backend` is one connection to a store. It hands out `Keyspace`s (disjoint sets of
keys) and locks, and passes messages on. Values are the bytes that `hornbeam_state.codec` makes,
with one rule that both sides rely on: a value that is a plain ASCII decimal of a signed 64-bit
integer is a counter, and no other value starts with an ASCII digit or ``-``.

Every operation is atomic over all threads, processes and machines that share the store, and has
an awaitable twin of the same meaning (``get`` and ``aget``) that never blocks the event loop for
more than some milliseconds. All are safe to call from any thread. Driver errors are translated:
nothing but `hornbeam_state.errors` leaves a backend.

Times to live are seconds, finite and above zero; ``None`` means no expiry. An expired key is
absent for every operation, from the moment it expires.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

Space = Literal["app", "sys", "cache"]
"""The disjoint key spaces: the app's own keys, hornbeam's, and the cache's (which may evict)."""

SPACES: tuple[Space, ...] = ("app", "sys", "cache")

COUNTER_MIN = -(2**63)
COUNTER_MAX = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a key space holds.

    Attributes:
        entries: Number of keys, or None where the backend cannot count them cheaply.
        bytes: Bytes the keys and values take, or None likewise.
        evictions: Keys removed to make room since the store was created.
    """

    entries: int | None
    bytes: int | None
    evictions: int


class HeldLock(Protocol):
    """A lock that was acquired by `Backend.try_lock`."""

    def release(self) -> bool:
        """Free the lock; return whether it was still held until now. Idempotent."""
        ...

    async def arelease(self) -> bool:
        """Awaitable twin of `release`."""
        ...


class Topics(NamedTuple):
    """What a subscription asks for. No name or prefix is covered by another prefix of it.

    Attributes:
        names: Topics as they are.
        prefixes: What topics may begin with.
    """

    names: tuple[bytes, ...]
    prefixes: tuple[bytes, ...]

    def match(self, topic: bytes) -> bool:
        """Return whether a message on `topic` is for this subscription."""
        return topic in self.names or topic.startswith(self.prefixes)


INBOX_BYTES = 64 * 1024 * 1024
"""Most bytes of payload that wait in an `Inbox`; one message may be larger."""


class Inbox(Protocol):
    """The messages that wait for one subscription: at most so many, and `INBOX_BYTES`.

    One that arrives when it is full takes the place of the oldest. It belongs to the process
    that subscribed, where any thread may use it. Messages of one publisher come in the order in
    which it published them.
    """

    @property
    def dropped(self) -> int:
        """How many messages gave way to later ones."""
        ...

    @property
    def gaps(self) -> int:
        """How often the connection was lost, and with it whatever was published meanwhile."""
        ...

    @property
    def closed(self) -> bool:
        """Whether nothing will come any more: it was closed, or its backend was."""
        ...

    def take(self) -> tuple[bytes, bytes] | None:
        """Remove and return the oldest message (topic, payload), or None; never waits.

        Raises:
            StoreUnavailable: the store has been out of reach for longer than a call would wait.
                Raised once for each such time; the inbox goes on by itself when it can.
        """
        ...

    def fileno(self) -> int:
        """Return a descriptor to wait on: readable from when there is something to take.

        It stays readable until there is nothing to take, or until `take` has returned None, and
        for good once the inbox is closed; it is valid for as long as the inbox exists.
        """
        ...

    def close(self) -> None:
        """Unsubscribe; nothing can be taken any more. Idempotent."""
        ...


class Keyspace(Protocol):
    """The keys and values of one `Space`. Keys are 1 to 4,096 bytes of UTF-8."""

    def get(self, key: bytes) -> bytes | None:
        """Return the value, or None when the key is absent."""
        ...

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the value of each key in order, all from one moment where the backend can."""
        ...

    def put(self, key: bytes, value: bytes, ttl: float | None = None) -> None:
        """Store the value and replace the expiry."""
        ...

    def put_many(self, items: Mapping[bytes, bytes], ttl: float | None = None) -> None:
        """Store all items and replace their expiry; all or none where the backend can."""
        ...

    def add(self, key: bytes, value: bytes, ttl: float | None = None) -> bool:
        """Store the value only if the key is absent; return whether it was stored."""
        ...

    def cas(
        self, key: bytes, expected: bytes | None, value: bytes, ttl: float | None = None
    ) -> bool:
        """Store the value only if the present one equals `expected` (None: the key is absent)."""
        ...

    def incr(self, key: bytes, delta: int, ttl: float | None = None) -> int:
        """Add `delta` to a counter and return the sum; an absent key counts as 0.

        `ttl` applies only when the key is created; else the expiry stays as it is.

        Raises:
            WrongType: the value is not a counter.
            CounterOverflow: the sum would leave 64 bits; nothing was changed.
        """
        ...

    def delete(self, key: bytes) -> bool:
        """Remove the key; return whether it was there."""
        ...

    def keys(self, prefix: bytes = b"") -> list[bytes]:
        """Return the keys that start with `prefix`, sorted by their bytes."""
        ...

    def ttl(self, key: bytes) -> float | None:
        """Return the seconds left, None when the key does not expire.

        Raises:
            KeyError: no such key.
        """
        ...

    def clear(self, prefix: bytes = b"") -> int:
        """Remove the keys that start with `prefix`; return how many there were."""
        ...

    def usage(self, prefix: bytes = b"") -> Usage:
        """Return what the keys that start with `prefix` take."""
        ...

    async def aget(self, key: bytes) -> bytes | None:
        """Awaitable twin of `get`; the others follow in the same way."""
        ...

    async def aget_many(self, keys: Sequence[bytes]) -> list[bytes | None]: ...  # noqa: D102
    async def aput(  # noqa: D102
        self, key: bytes, value: bytes, ttl: float | None = None
    ) -> None: ...
    async def aput_many(  # noqa: D102
        self, items: Mapping[bytes, bytes], ttl: float | None = None
    ) -> None: ...
    async def aadd(  # noqa: D102
        self, key: bytes, value: bytes, ttl: float | None = None
    ) -> bool: ...
    async def acas(  # noqa: D102
        self, key: bytes, expected: bytes | None, value: bytes, ttl: float | None = None
    ) -> bool: ...
    async def aincr(  # noqa: D102
        self, key: bytes, delta: int, ttl: float | None = None
    ) -> int: ...
    async def adelete(self, key: bytes) -> bool: ...  # noqa: D102
    async def akeys(self, prefix: bytes = b"") -> list[bytes]: ...  # noqa: D102
    async def attl(self, key: bytes) -> float | None: ...  # noqa: D102
    async def aclear(self, prefix: bytes = b"") -> int: ...  # noqa: D102
    async def ausage(self, prefix: bytes = b"") -> Usage: ...  # noqa: D102


@runtime_checkable
class Backend(Protocol):
    """One connection to a store, made lazily and usable from any thread of its process.

    A backend that was used before a fork works in the child too: it reconnects there.
    """

    @property
    def directory(self) -> Path:
        """A directory of this machine, private to this user, for files that go with the store."""
        ...

    def keyspace(self, space: Space) -> Keyspace:
        """Return the key space; always the same object for the same name."""
        ...

    def check(self) -> None:
        """Connect, if not done yet.

        Raises:
            StoreUnavailable: the store cannot be reached or used; the message says what to do.
        """
        ...

    def try_lock(self, name: bytes, ttl: float) -> HeldLock | None:
        """Take the lock if it is free, without waiting; None when someone else holds it.

        A lock is freed when its owner dies: at once where the kernel knows (embedded, where
        `ttl` has no effect), else after at most `ttl` seconds, for which it is renewed while
        its owner lives.
        """
        ...

    async def atry_lock(self, name: bytes, ttl: float) -> HeldLock | None:
        """Awaitable twin of `try_lock`."""
        ...

    def publish(self, topic: bytes, payload: bytes) -> int:
        """Hand a message to every subscription that matches; return how many there were.

        `topic` is 1 to 4,200 bytes. Nothing is kept for those who subscribe later.
        """
        ...

    async def apublish(self, topic: bytes, payload: bytes) -> int:
        """Awaitable twin of `publish`."""
        ...

    def subscribe(self, topics: Topics, maxsize: int) -> Inbox:
        """Collect from now on the messages on these topics, at most `maxsize` at a time."""
        ...

    async def asubscribe(self, topics: Topics, maxsize: int) -> Inbox:
        """Awaitable twin of `subscribe`."""
        ...

    def close(self) -> None:
        """Release connections and files, and end subscriptions; a later call opens them again."""
        ...

    async def aclose(self) -> None:
        """Awaitable twin of `close`."""
        ...
