"""The store a process uses when it names none, and the functions over it.

The default store is the only state these functions have: it is what ``HORNBEAM_STORE`` names when
the first of them is called, or an embedded store in ``.hornbeam/`` of the working directory. Each
function means what the `Store` method of its name means.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from hornbeam_state.config import StoreConfig
from hornbeam_state.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from hornbeam_state.locks import Lock
    from hornbeam_state.pubsub import Subscription

_default: Store | None = None
_default_lock = threading.Lock()


def default_store() -> Store:
    """Return the process default store, made at the first call.

    Raises:
        ConfigError: ``HORNBEAM_STORE`` is not a store URL.
    """
    return _default if _default is not None else _make_default()


def set_default_store(store: Store | None) -> Store | None:
    """Replace the process default store; None: make it from the environment when next used.

    Returns:
        The previous one, which stays open.
    """
    global _default
    with _default_lock:
        previous, _default = _default, store
    return previous


def _make_default() -> Store:
    global _default  # noqa: PLW0603 - the one process default
    with _default_lock:
        if _default is None:
            _default = Store(StoreConfig.from_env())
        return _default


def state_get(key: str, default: Any = None) -> Any:
    """Return the value of a key exactly as it was set, or the default."""
    return default_store().get(key, default)


async def astate_get(key: str, default: Any = None) -> Any:
    """Awaitable twin of `state_get`."""
    return await default_store().aget(key, default)


def state_set(key: str, value: Any, *, ttl: float | None = None) -> None:
    """Store a value for all workers and machines; without `ttl` (seconds) it never expires."""
    default_store().set(key, value, ttl=ttl)


async def astate_set(key: str, value: Any, *, ttl: float | None = None) -> None:
    """Awaitable twin of `state_set`."""
    await default_store().aset(key, value, ttl=ttl)


def state_add(key: str, value: Any, *, ttl: float | None = None) -> bool:
    """Store a value only if the key is absent; return whether it was."""
    return default_store().add(key, value, ttl=ttl)


async def astate_add(key: str, value: Any, *, ttl: float | None = None) -> bool:
    """Awaitable twin of `state_add`."""
    return await default_store().aadd(key, value, ttl=ttl)


def state_cas(key: str, expected: Any, value: Any, *, ttl: float | None = None) -> bool:
    """Store `value` if the key now holds `expected` (`MISSING`: is absent); see `Store.cas`."""
    return default_store().cas(key, expected, value, ttl=ttl)


async def astate_cas(key: str, expected: Any, value: Any, *, ttl: float | None = None) -> bool:
    """Awaitable twin of `state_cas`."""
    return await default_store().acas(key, expected, value, ttl=ttl)


def state_update(
    key: str, fn: Callable[[Any], Any], default: Any = None, *, ttl: float | None = None
) -> Any:
    """Replace the value by ``fn(value)`` atomically and return it; see `Store.update`."""
    return default_store().update(key, fn, default, ttl=ttl)


async def astate_update(
    key: str, fn: Callable[[Any], Any], default: Any = None, *, ttl: float | None = None
) -> Any:
    """Awaitable twin of `state_update`."""
    return await default_store().aupdate(key, fn, default, ttl=ttl)


def state_delete(key: str) -> bool:
    """Remove a key; return whether it was there."""
    return default_store().delete(key)


async def astate_delete(key: str) -> bool:
    """Awaitable twin of `state_delete`."""
    return await default_store().adelete(key)


def state_incr(key: str, delta: int = 1, *, ttl: float | None = None) -> int:
    """Add to a counter, atomically over all processes and machines, and return the new value."""
    return default_store().incr(key, delta, ttl=ttl)


async def astate_incr(key: str, delta: int = 1, *, ttl: float | None = None) -> int:
    """Awaitable twin of `state_incr`."""
    return await default_store().aincr(key, delta, ttl=ttl)


def state_decr(key: str, delta: int = 1, *, ttl: float | None = None) -> int:
    """Subtract from a counter and return the new value; see `state_incr`."""
    return default_store().decr(key, delta, ttl=ttl)


async def astate_decr(key: str, delta: int = 1, *, ttl: float | None = None) -> int:
    """Awaitable twin of `state_decr`."""
    return await default_store().adecr(key, delta, ttl=ttl)


def state_get_multi(keys: Iterable[str]) -> dict[str, Any]:
    """Return every asked key with its value, a missing one with None."""
    return default_store().get_multi(keys)


async def astate_get_multi(keys: Iterable[str]) -> dict[str, Any]:
    """Awaitable twin of `state_get_multi`."""
    return await default_store().aget_multi(keys)


def state_set_multi(mapping: Mapping[str, Any], *, ttl: float | None = None) -> None:
    """Store all values of a mapping."""
    default_store().set_multi(mapping, ttl=ttl)


async def astate_set_multi(mapping: Mapping[str, Any], *, ttl: float | None = None) -> None:
    """Awaitable twin of `state_set_multi`."""
    await default_store().aset_multi(mapping, ttl=ttl)


def state_keys(prefix: str = "") -> list[str]:
    """Return the keys that start with the prefix, sorted."""
    return default_store().keys(prefix)


async def astate_keys(prefix: str = "") -> list[str]:
    """Awaitable twin of `state_keys`."""
    return await default_store().akeys(prefix)


def state_ttl(key: str) -> float | None:
    """Return the seconds a key has left, None when it does not expire; KeyError when absent."""
    return default_store().ttl(key)


async def astate_ttl(key: str) -> float | None:
    """Awaitable twin of `state_ttl`."""
    return await default_store().attl(key)


def state_clear(prefix: str = "") -> int:
    """Remove the app's keys that start with the prefix; return how many there were."""
    return default_store().clear(prefix)


async def astate_clear(prefix: str = "") -> int:
    """Awaitable twin of `state_clear`."""
    return await default_store().aclear(prefix)


def lock(name: str, *, ttl: float = 30.0, timeout: float | None = None) -> Lock:
    """Return a lock over all workers and machines, for a `with` or `async with` statement.

    It is freed when its owner dies.

    Args:
        name: Its name.
        ttl: Seconds until a lost owner's lock is free on Redis, where it is renewed while held;
            without effect on the embedded store.
        timeout: Most seconds to wait, None for no bound.

    Raises:
        LockTimeout: on entering: someone else held it for the whole timeout.
        LockLost: on leaving: it expired while it was held (Redis only).
    """
    return default_store().lock(name, ttl=ttl, timeout=timeout)


def publish(topic: str, message: Any) -> int:
    """Hand a message to everyone who is subscribed to the topic, in any worker on any machine.

    Returns:
        The number of subscriptions it was handed to.
    """
    return default_store().publish(topic, message)


async def apublish(topic: str, message: Any) -> int:
    """Awaitable twin of `publish`."""
    return await default_store().apublish(topic, message)


def subscribe(*topics: str, maxsize: int = 1000) -> Subscription:
    """Receive what is published on the topics from now on: a context manager and an iterator.

    Args:
        *topics: One or more; one that ends in ``*`` stands for all that begin with the rest.
        maxsize: How many messages may wait before the oldest are dropped, and counted.
    """
    return default_store().subscribe(*topics, maxsize=maxsize)


def asubscribe(*topics: str, maxsize: int = 1000) -> Subscription:
    """Awaitable twin of `subscribe`, for ``async with``, ``async for`` or ``await``."""
    return default_store().asubscribe(*topics, maxsize=maxsize)
