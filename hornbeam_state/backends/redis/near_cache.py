"""Values of a server that are kept in this process for a moment: which, and until when.

Nothing here reads a clock or talks to anyone. Whoever asks the server takes a token before, and
hands it in with the answer; whoever hears of a change says so. An answer is kept only if nothing
was heard of its key in between: a change, or another answer, since of two answers that were on
their way together nobody knows which is the later one. So a process that has seen a value never
sees an earlier one after it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

LONGEST: Final = 5.0
"""Seconds after which the server is asked anew, whatever was heard or not heard from it."""

ENTRY_BYTES: Final = 320
"""What an entry takes in memory beside the bytes of its key and value: measured, rounded up."""

_STRIPES: Final = 4096  # a power of two

Answer: TypeAlias = tuple[bytes, bytes | None, int, float | None]
"""A key; its value, None for an absent key, which is not kept; what `NearCache.token` returned
before the server was asked; and the seconds that the value had left then or later, none if it is
below zero, None for no expiry."""


class NearCache:
    """Values by key, least recently used first to go. Thread-safe.

    Holds nothing until it is enabled. A reader who gives up leaves nothing behind: its token is
    a number, not an entry in a table.

    Args:
        size: Most bytes that keys, values and what they are kept in may take.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: OrderedDict[bytes, tuple[bytes, float]] = OrderedDict()
        self._used = 0
        # What was heard of all keys, and of those of each stripe. The numbers only ever grow, so
        # that their sum is the same exactly when neither has changed.
        self._flushes = 0
        self._news = [0] * _STRIPES
        self._enabled = False
        self._changes = 0  # how often it was told that keys have changed
        # A finalizer may come in between and need it too.
        self._lock = threading.RLock()

    @property
    def enabled(self) -> bool:
        """Whether answers are kept."""
        return self._enabled

    @property
    def used(self) -> int:
        """Bytes that the entries take, by the same measure as the size."""
        return self._used

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes, now: float) -> bytes | None:
        """Return the value if it is here and may still be used."""
        # Without the lock: each of the two calls is one step to the interpreter.
        entry = self._entries.get(key)
        if entry is None or now >= entry[1]:
            return None
        try:
            self._entries.move_to_end(key)
        except KeyError:  # it went in between
            return None
        return entry[0]

    def token(self, key: bytes) -> int:
        """Return what to hand in with the answer to a question that is put after this call."""
        return self._flushes + self._news[hash(key) % _STRIPES]

    def keep(
        self, key: bytes, value: bytes | None, token: int, asked: float, left: float | None
    ) -> None:
        """Take note of one answer of the server; see `keep_all`."""
        self.keep_all([(key, value, token, left)], asked)

    def keep_all(self, answers: Sequence[Answer], asked: float) -> None:
        """Take note of what the server answered together, and keep what can be trusted.

        Args:
            answers: For each key what the server said of it.
            asked: When it was asked.
        """
        with self._lock:
            changes = self._changes
            # Before any is noted: answers to one question do not speak against each other,
            # though their keys may share a stripe.
            trusted = [self._enabled and token == self.token(key) for key, _, token, _ in answers]
            for (key, value, _, left), is_trusted in zip(answers, trusted, strict=True):
                until = asked + (LONGEST if left is None else min(left, LONGEST))
                self._news[hash(key) % _STRIPES] += 1
                if is_trusted and value is not None and until > asked:
                    self._put(key, value, until)
                    if self._changes != changes:  # by a finalizer, amid this
                        self._drop(key)
                elif (entry := self._entries.get(key)) is not None and entry[0] != value:
                    self._drop(key)

    def forget(self, keys: Iterable[bytes]) -> None:
        """Drop what is known of these keys: they have changed, or may have."""
        with self._lock:
            self._changes += 1
            for key in keys:
                self._news[hash(key) % _STRIPES] += 1
                self._drop(key)

    def flush(self) -> None:
        """Drop everything."""
        with self._lock:
            self._changes += 1
            self._flushes += 1
            self._entries.clear()
            self._used = 0

    def enable(self) -> None:
        """Keep answers to questions that are put from now on."""
        with self._lock:
            self.flush()
            self._enabled = True

    def disable(self) -> None:
        """Drop everything, and keep nothing more."""
        with self._lock:
            self._enabled = False
            self.flush()

    def after_fork(self) -> None:
        """Begin anew, disabled: a thread that is not in the child may have held the lock."""
        self._lock = threading.RLock()
        self.disable()

    def _put(self, key: bytes, value: bytes, until: float) -> None:
        self._drop(key)
        cost = _cost(key, value)
        if cost > self._size:
            return
        self._entries[key] = value, until
        self._used += cost
        while self._used > self._size:
            oldest, (gone, _) = self._entries.popitem(last=False)
            self._used -= _cost(oldest, gone)

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._used -= _cost(key, entry[0])


def _cost(key: bytes, value: bytes) -> int:
    return ENTRY_BYTES + len(key) + len(value)
