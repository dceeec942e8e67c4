"""Cached inference: one computation per cold key over all processes, never a wrong answer.

The way of a call: its key (`keys`), a look into the shared cache, and on a miss a *flight*. Of the
callers in this process one leads and the others wait for it (`flights`). The leader takes a lock
that all processes share, looks again, computes, stores, and hands out the stored bytes, which each
waiter decodes for itself. When the store is down, calls compute and say so in the statistics.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import threading
import warnings
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from hornbeam_ml.errors import ClientDisconnected
from hornbeam_ml.flights import ABANDONED, UNSHARED, Flight, Flights
from hornbeam_ml.functions import is_coroutine_function
from hornbeam_ml.keys import call_key, prefix_of_keys
from hornbeam_ml.metrics import Metrics
from hornbeam_ml.request import check_request, seconds_left
from hornbeam_state.codec import decode, encode
from hornbeam_state.default import default_store
from hornbeam_state.errors import (
    MISSING,
    CodecError,
    DeadlineExceeded,
    LockLost,
    LockTimeout,
    StoreError,
    StoreUnavailable,
)
from hornbeam_state.locks import Lock
from hornbeam_state.store import check_ttl

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from hornbeam_state.store import Store

_METRIC: Final = "cache/"
_LONGEST_WAIT: Final = 600.0
"""Seconds after which a caller computes what another process has been computing for so long."""

_LEADERS_OWN: Final = (DeadlineExceeded, ClientDisconnected)
"""Errors that are about the caller who computed, not about those who wait for it."""

T = TypeVar("T")


@dataclass
class CacheScope:
    """What happened to the cached calls inside a `cache_scope` block."""

    hits: int = 0
    misses: int = 0
    coalesced: int = 0
    errors: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """One cached call on its way."""

    key: str
    prefix: str
    ttl: float | None
    key_now: Callable[[], str]


class Cache:
    """Results of calls, shared by all processes that share the store.

    Args:
        store: Its ``cache`` space holds the results; its locks choose who computes.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._results = store.backend.keyspace("cache")
        self._flights = Flights()
        self._metrics = Metrics(_metrics_directory(store))
        self._unstorable: set[str] = set()

    def run(self, call: _Call, compute: Callable[[], Any]) -> Any:
        """Return the cached result of a call, computing it if need be."""
        found = self._look(call)
        if found is not MISSING:
            return self._counted(call, "hits", found)
        while True:
            flight, leading = self._flights.join(call.key)
            if leading:
                return self._lead(call, flight, compute)
            if flight.would_wait_for_itself():
                return self._compute_alone(call, compute, "misses")
            with self._counting_errors(call):
                outcome = flight.result()
            landed, result = self._land(call, outcome)
            if landed:
                return result
            if result is UNSHARED:
                return self._compute_alone(call, compute, "errors")

    async def arun(self, call: _Call, compute: Callable[[], Any], *, is_async: bool) -> Any:
        """Awaitable twin of `run`; a plain function computes in a thread."""
        found = await self._alook(call)
        if found is not MISSING:
            return self._counted(call, "hits", found)
        while True:
            flight, leading = self._flights.join(call.key)
            if leading and is_async:
                return await self._alead(call, flight, compute)
            if leading:
                return await _in_thread(self._lead, call, flight, compute)
            if flight.task is not None and flight.task is asyncio.current_task():
                return await self._acompute_alone(call, compute, "misses", is_async=is_async)
            with self._counting_errors(call):
                outcome = await flight.aresult()
            landed, result = self._land(call, outcome)
            if landed:
                return result
            if result is UNSHARED:
                return await self._acompute_alone(call, compute, "errors", is_async=is_async)

    # Leading a flight.

    def _lead(self, call: _Call, flight: Flight, compute: Callable[[], Any]) -> Any:
        flight.thread = threading.get_ident()
        outcome: Any = ABANDONED
        try:
            with self._only_computer(call):
                found = self._look(call, raw=True)
                if found is not MISSING:
                    outcome = found
                    return self._counted(call, "coalesced", decode(found))
                result = compute()
                outcome = self._encoded(call, result)
                if call.key_now() == call.key:
                    self._keep(call, outcome)
                else:  # what computes has changed meanwhile: nobody knows which of the two did
                    self.count(call.prefix, "misses")
                return result
        except Exception as error:
            outcome = ABANDONED if isinstance(error, _LEADERS_OWN) else error
            self.count(call.prefix, "errors")
            raise
        finally:
            self._flights.end(call.key, flight, outcome)

    async def _alead(
        self, call: _Call, flight: Flight, compute: Callable[[], Awaitable[Any]]
    ) -> Any:
        flight.task = asyncio.current_task()
        outcome: Any = ABANDONED
        try:
            async with self._aonly_computer(call):
                found = await self._alook(call, raw=True)
                if found is not MISSING:
                    outcome = found
                    return self._counted(call, "coalesced", decode(found))
                result = await compute()
                outcome = self._encoded(call, result)
                if call.key_now() == call.key:
                    await self._akeep(call, outcome)
                else:
                    self.count(call.prefix, "misses")
                return result
        except Exception as error:
            outcome = ABANDONED if isinstance(error, _LEADERS_OWN) else error
            self.count(call.prefix, "errors")
            raise
        finally:
            self._flights.end(call.key, flight, outcome)

    def _lock(self, call: _Call) -> Lock:
        left = seconds_left()
        timeout = _LONGEST_WAIT if left is None else min(left, _LONGEST_WAIT)
        return Lock(self.store.backend, b"flight:" + call.key.encode(), timeout=timeout)

    @contextlib.contextmanager
    def _only_computer(self, call: _Call) -> Iterator[None]:
        """Keep other processes from computing the same; without a store, go ahead."""
        lock = self._lock(call)
        try:
            lock.__enter__()
        except (StoreError, LockTimeout):
            check_request()
            yield
            return
        try:
            yield
        finally:
            with contextlib.suppress(StoreError, LockLost):
                lock.__exit__(None, None, None)

    @contextlib.asynccontextmanager
    async def _aonly_computer(self, call: _Call) -> AsyncIterator[None]:
        lock = self._lock(call)
        try:
            await lock.__aenter__()
        except (StoreError, LockTimeout):
            check_request()
            yield
            return
        try:
            yield
        finally:
            with contextlib.suppress(StoreError, LockLost):
                await lock.__aexit__(None, None, None)

    @contextlib.contextmanager
    def _counting_errors(self, call: _Call) -> Iterator[None]:
        try:
            yield
        except Exception:
            self.count(call.prefix, "errors")
            raise

    def _land(self, call: _Call, outcome: Any) -> tuple[bool, Any]:
        """Return what a waiter makes of a flight's outcome: whether it is its own, and the result.

        Raises:
            Exception: the one the leader met.
        """
        if outcome is ABANDONED or outcome is UNSHARED:
            return False, outcome
        if isinstance(outcome, Exception):
            self.count(call.prefix, "errors")
            raise outcome
        return True, self._counted(call, "coalesced", decode(outcome))

    def _compute_alone(self, call: _Call, compute: Callable[[], Any], outcome: str) -> Any:
        """Compute without sharing: inside the computation of the same key, or unstorable."""
        try:
            result = compute()
        except Exception:
            self.count(call.prefix, "errors")
            raise
        return self._counted(call, outcome, result)

    async def _acompute_alone(
        self,
        call: _Call,
        compute: Callable[[], Any],
        outcome: str,
        *,
        is_async: bool,
    ) -> Any:
        try:
            result = await (compute() if is_async else _in_thread(compute))
        except Exception:
            self.count(call.prefix, "errors")
            raise
        return self._counted(call, outcome, result)

    # The store.

    def _look(self, call: _Call, *, raw: bool = False) -> Any:
        try:
            return _opened(self._results.get(call.key.encode()), raw=raw)
        except StoreUnavailable:
            return MISSING

    async def _alook(self, call: _Call, *, raw: bool = False) -> Any:
        try:
            return _opened(await self._results.aget(call.key.encode()), raw=raw)
        except StoreUnavailable:
            return MISSING

    def _encoded(self, call: _Call, result: Any) -> Any:
        """Return the bytes to share, or `UNSHARED` when the codec does not know the type."""
        try:
            return encode(result)
        except CodecError as error:
            if call.prefix not in self._unstorable:
                self._unstorable.add(call.prefix)
                warnings.warn(
                    f"results under cache prefix {call.prefix!r} cannot be cached: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return UNSHARED

    def _keep(self, call: _Call, data: Any) -> None:
        if data is not UNSHARED:
            with contextlib.suppress(StoreError):
                self._results.put(call.key.encode(), data, call.ttl)
                self.count(call.prefix, "misses")
                return
        self.count(call.prefix, "errors")

    async def _akeep(self, call: _Call, data: Any) -> None:
        if data is not UNSHARED:
            with contextlib.suppress(StoreError):
                await self._results.aput(call.key.encode(), data, call.ttl)
                self.count(call.prefix, "misses")
                return
        self.count(call.prefix, "errors")

    # Counting.

    def count(self, prefix: str, outcome: str) -> None:
        """Count one call as one of hits, misses, coalesced and errors."""
        deltas = [int(name == outcome) for name in _OUTCOMES]
        self._metrics.add(_METRIC + prefix, *deltas)
        for scope in _scopes.get():
            with _scope_lock:
                setattr(scope, outcome, getattr(scope, outcome) + 1)

    def _counted(self, call: _Call, outcome: str, result: Any) -> Any:
        self.count(call.prefix, outcome)
        return result

    def stats(self, prefix: str | None) -> dict[str, Any]:
        """Return the counts of all processes; see `cache_stats`."""
        sums = [0] * len(_OUTCOMES)
        for name, cells in self._metrics.totals().items():
            if name.startswith(_METRIC) and prefix in (None, name.removeprefix(_METRIC)):
                sums = [total + cell for total, cell in zip(sums, cells, strict=True)]
        counts: dict[str, Any] = dict(zip(_OUTCOMES, sums, strict=True))
        calls = sum(sums)
        counts["hit_rate"] = (counts["hits"] + counts["coalesced"]) / calls if calls else 0.0
        usage = self._results.usage(prefix_of_keys(prefix).encode() if prefix else b"")
        return counts | {
            "entries": usage.entries,
            "bytes": usage.bytes,
            "evictions": usage.evictions,
        }

    def clear(self, prefix: str | None) -> int:
        """Remove results; see `cache_clear`."""
        return self._results.clear(prefix_of_keys(prefix).encode() if prefix else b"")


_OUTCOMES: Final = ("hits", "misses", "coalesced", "errors")
_scopes: ContextVar[tuple[CacheScope, ...]] = ContextVar("hornbeam_cache_scopes", default=())
_scope_lock = threading.Lock()
_cache: Cache | None = None  # over the process default store
_cache_lock = threading.Lock()


def cached_inference(
    fn: Callable[[Any], T],
    input: Any,
    *,
    cache_key: Any = None,
    cache_prefix: str = "ml",
    ttl: float | None = None,
    version: Any = None,
) -> T:
    """Return ``fn(input)``, computed once for all workers and then remembered.

    Concurrent callers of one cold key, in any process, cause one computation. A hit has the type,
    dtype, shape and values of the result that was computed, and is the caller's own to change.
    Exceptions are not cached. Blocks while computing.

    Args:
        fn: A function or a model's method. It is recognised by its code, what it captures and,
            for a model, its weights and settings, not by its name.
        input: Its argument: any value that the store takes.
        cache_key: When given, the call is known by `cache_prefix` and this value alone.
        cache_prefix: Groups results for `cache_stats` and `cache_clear`.
        ttl: Seconds to remember the result; None: until it is evicted.
        version: Anything else that makes a difference; another version is another call.

    Returns:
        The result. One that cannot be stored is returned all the same, and counted as an error.

    Raises:
        CodecError: the input cannot be made into a key.
        Exception: whatever `fn` raises; waiters in the same process get the same exception,
            but for `DeadlineExceeded` and `ClientDisconnected`, after which they try in turn.

    Example:
        >>> cached_inference(model.encode, "the cat sat on the mat")  # doctest: +SKIP
    """

    def key_now() -> str:
        return call_key(fn, input, prefix=cache_prefix, cache_key=cache_key, version=version)

    key = key_now()
    call = _Call(key=key, prefix=cache_prefix, ttl=check_ttl(ttl), key_now=key_now)
    result: T = _default_cache().run(call, lambda: fn(input))
    return result


async def acached_inference(
    fn: Callable[[Any], T | Awaitable[T]],
    input: Any,
    *,
    cache_key: Any = None,
    cache_prefix: str = "ml",
    ttl: float | None = None,
    version: Any = None,
) -> T:
    """Awaitable twin of `cached_inference`: awaits a coroutine function, runs another in a thread.

    A computation in a thread goes on when its caller is cancelled, and its result is kept.
    """

    def key_now() -> str:
        return call_key(fn, input, prefix=cache_prefix, cache_key=cache_key, version=version)

    key = key_now()
    call = _Call(key=key, prefix=cache_prefix, ttl=check_ttl(ttl), key_now=key_now)
    result: T = await _default_cache().arun(
        call, lambda: fn(input), is_async=is_coroutine_function(fn)
    )
    return result


@contextlib.contextmanager
def cache_scope() -> Iterator[CacheScope]:
    """Count the cached calls of this thread or task, and of what it starts, in a block.

    Example:
        >>> with cache_scope() as scope:
        ...     pass
        >>> (scope.hits, scope.misses, scope.coalesced)
        (0, 0, 0)
    """
    scope = CacheScope()
    token = _scopes.set((*_scopes.get(), scope))
    try:
        yield scope
    finally:
        _scopes.reset(token)


def cache_stats(prefix: str | None = None) -> dict[str, Any]:
    """Return the figures of all workers together, since the store was created.

    Args:
        prefix: Only calls with this `cache_prefix`.

    Returns:
        ``hits``, ``misses``, ``coalesced`` (waited for another's computation) and ``errors``;
        each call is exactly one of them. ``hit_rate``: (hits + coalesced) / calls, 0.0 before the
        first call. ``entries``, ``bytes`` and ``evictions`` of the cache now (None where the
        store does not know them).
    """
    return _default_cache().stats(prefix)


async def acache_stats(prefix: str | None = None) -> dict[str, Any]:
    """Awaitable twin of `cache_stats`."""
    return await asyncio.to_thread(cache_stats, prefix)


def cache_clear(prefix: str | None = None) -> int:
    """Forget the results under a prefix, or all; return how many there were."""
    return _default_cache().clear(prefix)


async def acache_clear(prefix: str | None = None) -> int:
    """Awaitable twin of `cache_clear`."""
    return await asyncio.to_thread(cache_clear, prefix)


def _default_cache() -> Cache:
    global _cache  # noqa: PLW0603 - follows the process default store
    store = default_store()
    cache = _cache
    if cache is None or cache.store is not store:
        with _cache_lock:
            cache = _cache
            if cache is None or cache.store is not store:
                cache = _cache = Cache(store)
    return cache


def _forget_after_fork() -> None:
    """Drop, in a forked child, flights whose leaders are threads of the parent."""
    global _cache, _cache_lock, _scope_lock
    _cache, _cache_lock, _scope_lock = None, threading.Lock(), threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)


def _metrics_directory(store: Store) -> Any:
    try:
        return store.backend.directory / "metrics"
    except StoreUnavailable:
        return None


def _opened(data: bytes | None, *, raw: bool) -> Any:
    """Return a stored result, or MISSING; one that this process cannot read is computed anew."""
    if data is None:
        return MISSING
    try:
        result = decode(data)
    except CodecError:
        return MISSING
    return data if raw else result


async def _in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Run a function in a thread, to its end even when the caller is cancelled.

    `asyncio.to_thread` would take work that has not started out of the queue again, and with it
    the promise to end a flight.
    """
    context = contextvars.copy_context()
    running = asyncio.get_running_loop().run_in_executor(None, context.run, function, *arguments)
    return await asyncio.shield(running)
