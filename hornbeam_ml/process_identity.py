"""Identities of objects that only this process can tell apart."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import threading
import warnings
import weakref
from typing import Any


class ProcessIdentities:
    """Numbers for objects, valid in the process that gave them out.

    An object keeps its number for as long as it lives, and no other object ever gets it. One that
    cannot be weakly referenced gets another number each time. Safe to use from any thread.
    """

    def __init__(self) -> None:
        self._process = secrets.token_hex(16)
        self._pid = os.getpid()
        self._numbers = itertools.count()
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._warned: set[str] = set()
        self._lock = threading.Lock()

    def find(self, value: Any) -> tuple[Any, ...] | None:
        """Return the identity of an object that has one already."""
        known = self._known.get(id(value))
        if known is not None and known[0]() is value and self._pid == os.getpid():
            return ("process", self._process, known[1])
        return None

    def of(self, value: Any) -> tuple[Any, ...]:
        """Return an object's identity, and warn once about the first of its type."""
        if self._pid != os.getpid():
            self.__init__()  # type: ignore[misc] # the parent may have shared results by its numbers
        with self._lock:
            found = self.find(value)
            if found is not None:
                return found
            number = next(self._numbers)
            with contextlib.suppress(TypeError):
                self._known[id(value)] = (weakref.ref(value), number)
            self._warn_once(type(value))
            return ("process", self._process, number)

    def _warn_once(self, class_: type) -> None:
        name = f"{class_.__module__}.{class_.__qualname__}"
        if name in self._warned or class_.__module__ == "unittest.mock":
            return
        self._warned.add(name)
        warnings.warn(
            f"results of cached calls that use a {name} are shared within this process only, and "
            f"changes of it are not noticed, since its content cannot be read. Say what identifies "
            f"it with register_fingerprint(), or pass cache_key= to cached_inference",
            RuntimeWarning,
            stacklevel=2,
        )
