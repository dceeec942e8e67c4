"""Waiting for a lock, and noticing that it was lost."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from typing import TYPE_CHECKING, Final, Self

from hornbeam_state.errors import LockLost, LockTimeout

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from hornbeam_state.backends.base import Backend, HeldLock

_FIRST_PAUSE: Final = 0.0005
_LONGEST_PAUSE: Final = 0.02
_LONGEST_TTL: Final = 10**10  # beyond it Redis refuses


class Lock:
    """A named lock over all threads, processes and machines that share the store.

    A context manager, sync and async, that any number of threads and tasks may share. Waiters are
    not queued; whoever asks first after it is freed gets it.

    It may be left in another thread or task than the one that entered. A forked child is not the
    holder of what its parent entered: it waits like anyone else, and leaving there frees nothing.

    Args:
        backend: Where the lock lives.
        name: Its name.
        ttl: Seconds after which a lost owner's lock is free again. It is renewed while it is
            held, and has no effect on the embedded store, where the kernel frees a dead owner's.
        timeout: Most seconds to wait, or None to wait without bound.

    Raises:
        LockTimeout: on entering: someone else held it for the whole timeout.
        RuntimeError: on entering: this thread or task holds it already (it is not reentrant); on
            leaving: nobody entered.
        LockLost: on leaving: it expired and may have passed to someone else meanwhile.
    """

    def __init__(
        self, backend: Backend, name: bytes, *, ttl: float = 30.0, timeout: float | None = None
    ) -> None:
        if not 0 < ttl <= _LONGEST_TTL:
            raise ValueError(f"lock ttl={ttl}: give seconds above 0, at most {_LONGEST_TTL:,}")
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"lock timeout={timeout}: give seconds, 0 or more, or None")
        self._backend = backend
        self._name = name
        self._ttl = ttl
        self._timeout = timeout
        self._held: dict[tuple[int, object], HeldLock] = {}

    def __enter__(self) -> Self:
        for pause in self._pauses():
            held = self._backend.try_lock(self._name, self._ttl)
            if held is not None:
                self._held[_me()] = held
                break
            time.sleep(pause)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        held = self._left()
        if held is not None:
            self._check_still_held(held.release(), error)

    async def __aenter__(self) -> Self:
        for pause in self._pauses():
            held = await self._backend.atry_lock(self._name, self._ttl)
            if held is not None:
                self._held[_me()] = held
                break
            await asyncio.sleep(pause)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        held = self._left()
        if held is not None:
            self._check_still_held(await held.arelease(), error)

    def _left(self) -> HeldLock | None:
        """Return what to release on leaving, or None where only the parent process holds it."""
        # Frameworks enter and leave in different threads: then it is the longest held one. Each
        # `pop` is atomic, so that two who leave at once never get the same.
        holders = list(self._held)
        for who in (_me(), *holders):
            if who[0] == os.getpid() and (held := self._held.pop(who, None)) is not None:
                return held
        if any(process != os.getpid() for process, _ in holders):
            return None
        raise RuntimeError("the lock is not held: enter it before leaving it")

    def _pauses(self) -> Iterator[float]:
        """Yield how long to wait after each attempt; the last attempt is at the timeout."""
        if _me() in self._held:
            raise RuntimeError("this thread or task holds the lock already: it is not reentrant")
        start = time.monotonic()
        pause = _FIRST_PAUSE
        while True:
            left = None if self._timeout is None else start + self._timeout - time.monotonic()
            if left is not None and left <= 0:
                yield 0.0
                raise LockTimeout(
                    f"lock {self._name.decode('utf-8', 'replace')!r} was held by someone else for "
                    f"{self._timeout} s"
                )
            # Spread out, so that many waiters do not ask at the same moment.
            wait = pause * random.uniform(0.5, 1.0)  # noqa: S311 - not a secret
            yield wait if left is None else min(wait, left)
            pause = min(pause * 2, _LONGEST_PAUSE)

    def _check_still_held(self, still_held: bool, error: BaseException | None) -> None:  # noqa: FBT001
        if not still_held and error is None:
            raise LockLost(
                f"lock {self._name.decode('utf-8', 'replace')!r} expired while it was held: "
                f"someone else may have held it at the same time"
            )


def _me() -> tuple[int, object]:
    """Return the process, and the running task, or the thread where there is none."""
    try:
        return os.getpid(), asyncio.current_task() or threading.get_ident()
    except RuntimeError:
        return os.getpid(), threading.get_ident()
