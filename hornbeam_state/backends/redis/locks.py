"""Locks on Redis: a key with a random token, renewed while its owner lives."""

from __future__ import annotations

import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from hornbeam_state.backends.redis import scripts
from hornbeam_state.backends.redis.batches import Steps, ask, ask_independently, call
from hornbeam_state.backends.redis.steps import bucket_of, milliseconds, names
from hornbeam_state.errors import HornbeamError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from hornbeam_state.backends.redis.batches import Command
    from hornbeam_state.backends.redis.scripts import Script

_NAMES: Final = names(b"l:")
_LINGER: Final = 10.0


@dataclass(slots=True)
class Lease:
    """One acquisition of a lock.

    Attributes:
        name: The lock's Redis key.
        bucket: The bucket it lives in.
        ttl: Seconds after which the server frees it unless it is renewed.
        expires: When the server frees it at the earliest, by the monotonic clock.
        due: When to renew it next, by the same clock.
        abandoned: Whether nobody holds it any more, though it may still exist.
        token: What makes it this acquisition's own.
    """

    name: bytes
    bucket: int
    ttl: float
    expires: float
    due: float
    abandoned: bool = False
    token: bytes = field(default_factory=lambda: secrets.token_bytes(16))

    @classmethod
    def of(cls, name: bytes, ttl: float, now: float) -> Lease:
        """Describe an acquisition that is about to be asked for."""
        bucket = bucket_of(name)
        return cls(_NAMES[bucket] + name, bucket, ttl, now + ttl, now + ttl / 3)

    @property
    def _ttl_ms(self) -> bytes:
        return b"%d" % milliseconds(self.ttl)

    def acquire(self) -> Steps[bool]:
        """Take the lock if it is free."""
        command = self._call(scripts.ACQUIRE, self._ttl_ms)
        [taken] = yield from ask(command, repeatable=True)
        return bool(taken)

    def release(self) -> Steps[bool]:
        """Free the lock if it is still this acquisition's."""
        [freed] = yield from ask(self._call(scripts.RELEASE))
        return bool(freed)

    def upkeep(self) -> Command:
        """Return the command that renews the lease, or frees it once it is abandoned."""
        if self.abandoned:
            return self._call(scripts.RELEASE)
        return self._call(scripts.RENEW, self._ttl_ms)

    def _call(self, script: Script, *args: bytes) -> Command:
        return call(script, self.bucket, (self.name,), self.token, *args)


def upkeep(leases: Iterable[Lease]) -> Steps[list[Any]]:
    """Renew or free leases together; return for each whether it was still there, or an error."""
    return (yield from ask_independently([lease.upkeep() for lease in leases]))


class Keeper:
    """Renews all leases of a backend from one thread, each after a third of its ttl.

    The thread starts with the first lease and ends when there have been none for a while.

    Args:
        maintain: Renews or frees leases, and says of each whether it was still there; or gives
            an error for it, when its server could not be asked.
    """

    def __init__(self, maintain: Callable[[Sequence[Lease]], list[Any]]) -> None:
        self._maintain = maintain
        self._changed = threading.Condition()
        self._leases: dict[bytes, Lease] = {}
        self._thread: threading.Thread | None = None
        self._resting = False

    def keep(self, lease: Lease) -> None:
        """Renew a lease from now on."""
        with self._changed:
            self._leases[lease.token] = lease
            self._resting = False
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=self._work, name="hornbeam-locks", daemon=True
                )
                self._thread.start()
            self._changed.notify()

    def drop(self, lease: Lease) -> bool:
        """Renew a lease no more; return False if it was lost or dropped before."""
        with self._changed:
            return self._leases.pop(lease.token, None) is not None

    def abandon(self, lease: Lease) -> None:
        """Free soon what nobody waits for: its caller left before the server answered."""
        lease.abandoned = True
        lease.due = time.monotonic()
        self.keep(lease)

    def rest(self) -> None:
        """End the thread as soon as there are no leases, until there are some again."""
        with self._changed:
            self._resting = True
            self._changed.notify()

    def _work(self) -> None:
        while due := self._next():
            self._serve(due)

    def _next(self) -> list[Lease]:
        """Wait for leases that are due; return none when the thread is to end."""
        with self._changed:
            while True:
                if not self._leases:
                    woken = not self._resting and self._changed.wait(_LINGER)
                    if not woken and not self._leases:
                        self._thread = None
                        return []
                now = time.monotonic()
                if due := [lease for lease in self._leases.values() if lease.due <= now]:
                    return due
                if self._leases:
                    self._changed.wait(min(lease.due for lease in self._leases.values()) - now)

    def _serve(self, due: list[Lease]) -> None:
        now = time.monotonic()
        try:
            present = self._maintain(due)
        except HornbeamError as error:
            present = [error] * len(due)
        for lease, still_there in zip(due, present, strict=True):
            if isinstance(still_there, Exception):  # the lease runs on until it expires
                lease.due = now + min(lease.ttl / 10, 1.0)
                if lease.expires <= time.monotonic():
                    self.drop(lease)
            elif still_there and not lease.abandoned:
                lease.expires, lease.due = now + lease.ttl, now + lease.ttl / 3
            else:
                self.drop(lease)
