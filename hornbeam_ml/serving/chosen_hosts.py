"""Which model host this process uses: found when it is first needed."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING

from hornbeam_ml.host.spec import default_directory, wanted_spec
from hornbeam_ml.readiness import register as register_check
from hornbeam_ml.serving.hosts import FIRST_CONTACT_S, Hosts
from hornbeam_state.transports import local

if TYPE_CHECKING:
    from collections.abc import Callable


def from_environment() -> Hosts | None:
    """Return the hosts that ``HORNBEAM_HOST`` asks for, if it does.

    Raises:
        ConfigError: it makes no sense.
    """
    spec = wanted_spec()
    return None if spec is None else Hosts(default_directory(spec), spec, local.connect)


class _Choice:
    """The hosts of this process, and how they are found when first needed."""

    def __init__(self) -> None:
        self.find: Callable[[], Hosts | None] = from_environment
        self.found: Hosts | None = None
        self.looked = False
        self.lock = threading.Lock()


_choice = _Choice()


def use(find: Callable[[], Hosts | None]) -> None:
    """Say how this process finds its hosts, instead of by the environment."""
    with _choice.lock:
        _choice.find, _choice.looked = find, False
        hosts, _choice.found = _choice.found, None
    if hosts is not None:
        hosts.close()


def current() -> Hosts | None:
    """Return the hosts that this process uses, if any.

    Raises:
        ConfigError: what is asked for makes no sense.
    """
    with _choice.lock:
        if not _choice.looked:
            _choice.found = _choice.find()
            _choice.looked = True
        return _choice.found


def serving(target: str | None) -> Hosts | None:
    """Return the hosts that serve something; blocks until they have said so.

    Raises:
        NodeDown: they said nothing for `FIRST_CONTACT_S`.
        ModelError: they refused this process, or failed to load.
    """
    if target is None or (hosts := current()) is None:
        return None
    if hosts.serves(target) is None:
        hosts.wait_told(FIRST_CONTACT_S)
    return hosts if hosts.serves(target) else None


async def aserving(target: str | None) -> Hosts | None:
    """Awaitable twin of `serving`."""
    if target is None or (hosts := current()) is None:
        return None
    if hosts.serves(target) is None:
        return await asyncio.to_thread(serving, target)
    return hosts if hosts.serves(target) else None


def _why_not_ready() -> str | None:
    hosts = _choice.found
    return None if hosts is None else hosts.problem()


def _forget_after_fork() -> None:
    _choice.lock = threading.Lock()
    hosts, _choice.found = _choice.found, None
    _choice.looked = False
    if hosts is not None:
        hosts.forget_after_fork()


os.register_at_fork(after_in_child=_forget_after_fork)
register_check("model host", _why_not_ready)
