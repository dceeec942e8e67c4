"""A backend that fails where a test says so."""

from __future__ import annotations

import contextlib
import inspect
import os
import select
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from hornbeam_state.backends.base import SPACES, Backend, HeldLock, Inbox, Keyspace, Space, Topics
from hornbeam_state.errors import StoreError, StoreUnavailable
from hornbeam_state.faults import (
    KEYSPACE_OPERATIONS,
    OPERATIONS,
    Call,
    Delay,
    Failure,
    Fault,
    Faults,
    Hold,
    Moment,
    Outage,
    Where,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Container
    from pathlib import Path

_PATIENCE: Final = 30.0


class FaultyBackend:
    """Any backend, made to fail, to take long or to hang where a test says so.

    Without faults it is the backend it wraps. Sync methods and their awaitable twins are one
    operation, under the name of the sync one: those of `backends.base.Keyspace`, and ``check``,
    ``try_lock``, ``release``, ``publish``, ``subscribe`` and ``take``. A store asks it for
    ``get`` and ``cas`` when it does an `update`, for ``put`` when it does a `set`.

    A lock that the caller was not told of, or that could not be released, stays taken until
    `heal` or `close`.

    Args:
        backend: The backend to do the work.

    Attributes:
        calls: What was called in this process so far, in order. Clear it at will.

    Example:
        >>> from hornbeam_state import Store, open_store
        >>> from hornbeam_state.testing import FaultyBackend
        >>> real = open_store("memory://")
        >>> faulty = FaultyBackend(real.backend)
        >>> store = Store(real.config, backend=faulty)  # hand it to set_default_store
        >>> _ = faulty.after("incr", nth=2).fail()
        >>> store.incr("n")
        1
        >>> store.incr("n")
        Traceback (most recent call last):
        hornbeam_state.errors.StoreUnavailable: a test lets 'incr' fail: the outcome is unknown
        >>> store.incr("n")
        3
        >>> store.close()
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._faults = Faults(began=self._ring)
        self.calls = self._faults.calls
        self._inboxes: weakref.WeakSet[_FaultyInbox] = weakref.WeakSet()
        self._orphans: list[HeldLock] = []
        self._keyspaces = {
            space: cast("Keyspace", _FaultyKeyspace(backend.keyspace(space), self._faults, space))
            for space in SPACES
        }

    # Faults.

    def before(
        self,
        *operations: str,
        space: Space | None = None,
        nth: int | Container[int] | None = None,
        when: Callable[[Call], bool] | None = None,
    ) -> Target:
        """Choose calls, to be struck before anything is done.

        Args:
            *operations: Their names; none for all.
            space: The key space, where it matters.
            nth: Which of these calls, counted from 1 from now on, such as ``2``, ``{1, 4}`` or
                ``range(3, 6)``; None for all of them.
            when: Anything else that makes a difference.

        Raises:
            ValueError: there is no operation of that name.
        """
        return self._target("before", operations, space, nth, when)

    def after(
        self,
        *operations: str,
        space: Space | None = None,
        nth: int | Container[int] | None = None,
        when: Callable[[Call], bool] | None = None,
    ) -> Target:
        """Choose calls as `before` does, to be struck when the work is done but not told."""
        return self._target("after", operations, space, nth, when)

    def outage(self) -> Fault:
        """Let everything fail before it is done, until the fault is ended.

        A subscription is told once, and goes on with what others publish meanwhile.
        """
        return Outage(self._faults, self.before(*OPERATIONS - {"take"}).where, StoreUnavailable)

    def heal(self) -> None:
        """End all faults, and free the locks that they left behind."""
        self._faults.end_all()
        self._free_orphans()

    def count(self, *operations: str, space: Space | None = None) -> int:
        """Return how many of `calls` were of these operations."""
        where = self.before(*operations, space=space).where
        return sum(where.matches(call) for call in list(self.calls))

    def _target(
        self,
        moment: Moment,
        operations: tuple[str, ...],
        space: Space | None,
        nth: int | Container[int] | None,
        when: Callable[[Call], bool] | None,
    ) -> Target:
        unknown = set(operations) - OPERATIONS
        if unknown:
            raise ValueError(f"no operations {sorted(unknown)}: there are {sorted(OPERATIONS)}")
        where = Where(
            moment=moment,
            operations=frozenset(operations) or OPERATIONS,
            space=space,
            nth=nth,
            when=when,
        )
        return Target(self._faults, where)

    def _ring(self) -> None:
        for inbox in list(self._inboxes):
            inbox.ring()

    # The backend.

    @property
    def directory(self) -> Path:
        """The directory of the backend."""
        return self._backend.directory

    def keyspace(self, space: Space) -> Keyspace:
        """Return the key space."""
        return self._keyspaces[space]

    def check(self) -> None:
        """Connect, if not done yet."""
        self._faults.run(Call("check", None, ()), self._backend.check)

    def try_lock(self, name: bytes, ttl: float) -> HeldLock | None:
        """Take the lock if it is free."""
        call = Call("try_lock", None, (name,))
        take = self._backend.try_lock
        return self._watched(name, self._faults.run(call, take, name, ttl, lost=self._orphan))

    async def atry_lock(self, name: bytes, ttl: float) -> HeldLock | None:
        """Awaitable twin of `try_lock`."""
        call = Call("try_lock", None, (name,))
        take = self._backend.atry_lock
        held = await self._faults.arun(call, take, name, ttl, lost=self._orphan)
        return self._watched(name, held)

    def _watched(self, name: bytes, held: HeldLock | None) -> HeldLock | None:
        return None if held is None else _FaultyLock(held, name, self._faults, self._orphan)

    def _orphan(self, held: HeldLock | None) -> None:
        if held is not None:
            self._orphans.append(held)

    def publish(self, topic: bytes, payload: bytes) -> int:
        """Hand out a message."""
        call = Call("publish", None, (topic,))
        return self._faults.run(call, self._backend.publish, topic, payload)

    async def apublish(self, topic: bytes, payload: bytes) -> int:
        """Awaitable twin of `publish`."""
        call = Call("publish", None, (topic,))
        return await self._faults.arun(call, self._backend.apublish, topic, payload)

    def subscribe(self, topics: Topics, maxsize: int) -> Inbox:
        """Collect messages."""
        call = Call("subscribe", None, topics.names + topics.prefixes)
        begin = self._backend.subscribe
        return self._read(topics, self._faults.run(call, begin, topics, maxsize, lost=_close))

    async def asubscribe(self, topics: Topics, maxsize: int) -> Inbox:
        """Awaitable twin of `subscribe`."""
        call = Call("subscribe", None, topics.names + topics.prefixes)
        begin = self._backend.asubscribe
        inbox = await self._faults.arun(call, begin, topics, maxsize, lost=_close)
        return self._read(topics, inbox)

    def _read(self, topics: Topics, inbox: Inbox) -> Inbox:
        faulty = _FaultyInbox(inbox, topics, self._faults)
        self._inboxes.add(faulty)
        return faulty

    def close(self) -> None:
        """Close the backend. Faults stay; the locks that they left behind are freed."""
        self._free_orphans()
        self._backend.close()

    async def aclose(self) -> None:
        """Awaitable twin of `close`."""
        while self._orphans:
            with contextlib.suppress(StoreError):
                await self._orphans.pop().arelease()
        await self._backend.aclose()

    def _free_orphans(self) -> None:
        while self._orphans:
            with contextlib.suppress(StoreError):
                self._orphans.pop().release()


class Target:
    """The calls that were chosen, and what may happen to them.

    Faults that strike one call do so in the order in which they were made.
    """

    def __init__(self, faults: Faults, where: Where) -> None:
        self.where = where
        self._faults = faults

    def fail(self, error: Callable[[str], Exception] = StoreUnavailable) -> Fault:
        """Let them raise an error, such as `StoreFull`; it is made of a message."""
        return Failure(self._faults, self.where, error)

    def delay(self, seconds: float) -> Fault:
        """Let them take so many seconds more. An event loop goes on meanwhile."""
        return Delay(self._faults, self.where, seconds)

    def hold(self, patience: float = _PATIENCE) -> Hold:
        """Let them wait until the hold is ended, or `patience` seconds and then TimeoutError."""
        return Hold(self._faults, self.where, patience)


class _FaultyKeyspace:
    """A key space; its operations and their twins go through the faults."""

    def __init__(self, keyspace: Keyspace, faults: Faults, space: Space) -> None:
        self._keyspace = keyspace
        self._faults = faults
        self._space: Space = space

    def __getattr__(self, method: str) -> Any:
        action = getattr(self._keyspace, method)
        if method in KEYSPACE_OPERATIONS:
            return partial(self._run, self._faults.run, method, action)
        if method[:1] == "a" and method[1:] in KEYSPACE_OPERATIONS:
            return partial(self._run, self._faults.arun, method[1:], action)
        return action

    def _run(self, run: Any, operation: str, action: Any, *args: Any, **options: Any) -> Any:
        given = inspect.signature(action).bind(*args, **options)
        given.apply_defaults()
        about = next(iter(given.arguments.values()))  # a key, a prefix, or several keys
        names = (about,) if isinstance(about, bytes) else tuple(about)
        return run(Call(operation, self._space, names), action, *given.args, **given.kwargs)


class _FaultyLock:
    """A lock whose release may fail; then it is an orphan."""

    def __init__(
        self, held: HeldLock, name: bytes, faults: Faults, orphan: Callable[[HeldLock], None]
    ) -> None:
        self._held = held
        self._call = Call("release", None, (name,))
        self._faults = faults
        self._orphan = orphan

    def release(self) -> bool:
        try:
            return self._faults.run(self._call, self._held.release)
        except BaseException:
            self._orphan(self._held)
            raise

    async def arelease(self) -> bool:
        try:
            return await self._faults.arun(self._call, self._held.arelease)
        except BaseException:
            self._orphan(self._held)
            raise


class _FaultyInbox:
    """An inbox with a bell beside it: who waits for a message hears of a new fault."""

    def __init__(self, inbox: Inbox, topics: Topics, faults: Faults) -> None:
        self._inbox = inbox
        self._call = Call("take", None, topics.names + topics.prefixes)
        self._faults = faults
        self._told: Outage | None = None
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self._bell)
        self._either = select.epoll()
        for descriptor in (inbox.fileno(), self._bell):
            self._either.register(descriptor, select.EPOLLIN)

    @property
    def dropped(self) -> int:
        return self._inbox.dropped

    @property
    def gaps(self) -> int:
        return self._inbox.gaps

    @property
    def closed(self) -> bool:
        return self._inbox.closed

    def ring(self) -> None:
        os.eventfd_write(self._bell, 1)

    def take(self) -> tuple[bytes, bytes] | None:
        self._silence()
        return self._faults.run(self._call, self._take)

    def _take(self) -> tuple[bytes, bytes] | None:
        outage = self._faults.outage
        if outage is not None and outage is not self._told:
            self._told = outage
            outage.strike(self._call)
        return self._inbox.take()

    def _silence(self) -> None:
        try:
            os.eventfd_read(self._bell)
        except BlockingIOError:
            return

    def fileno(self) -> int:
        return self._either.fileno()

    def close(self) -> None:
        self._inbox.close()


def _close(inbox: Inbox) -> None:
    inbox.close()
