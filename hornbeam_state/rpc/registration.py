"""A name in the registry, held by one process: claimed, kept by heartbeats, given up."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from hornbeam_state.errors import ConfigError, HornbeamError, StoreError
from hornbeam_state.rpc import places
from hornbeam_state.rpc.entries import PREFIX, Entry, read_entry
from hornbeam_state.rpc.names import full_name, host_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from hornbeam_state.store import Store

logger = logging.getLogger("hornbeam.rpc")

TTL_S: Final = 4.0
"""How long a node is believed to be there without a heartbeat."""

BEAT_S: Final = 1.0
_RETRY_S: Final = 0.25
_POLL_S: Final = 0.1
_GONE: Final = 0.001  # seconds that a given up entry stays: there is no compare-and-delete
_JOIN_S: Final = 5.0


class Registration:
    """This process's claim to a name. Its heartbeats come from a thread of their own.

    The store keeps the time: an entry without heartbeats is gone after `TTL_S`, whatever the
    clocks of the machines say. An entry that the store lost is written again.

    Args:
        store: Where the registry is.
        name: ``name`` or ``name@host``; None: see `full_name`.
        describe: Fills in what changes: called with the entry at each heartbeat, on that thread.
        on_lost: Called once, on that thread, when another process has the name: this one must
            stop, since calls for the name are no longer its.
    """

    def __init__(
        self,
        store: Store,
        name: str | None = None,
        *,
        describe: Callable[[Entry], Entry] = lambda entry: entry,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        pid = os.getpid()
        self._store = store.space("sys")
        self._describe = describe
        self._on_lost = on_lost
        self._entry = Entry(
            name=full_name(name),
            token=secrets.token_hex(8),
            host=host_name(),
            pid=pid,
            place=places.place(),
            started=places.started(pid) or 0,
        )
        self._key = PREFIX + self._entry.name
        self._value: dict[str, Any] = {}  # what was written last; empty: the name is not ours
        self._beating = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def name(self) -> str:
        """The full name."""
        return self._entry.name

    @property
    def token(self) -> str:
        """Which process this is, of all that ever had the name."""
        return self._entry.token

    def claim(self) -> None:
        """Take the name; blocks for up to `TTL_S` while it may still belong to a dead process.

        Raises:
            ConfigError: a living process has it.
            StoreUnavailable: the registry cannot be reached.
        """
        first, until = None, time.monotonic() + TTL_S + BEAT_S
        while not self._try_claim():
            present = self._store.get(self._key)
            owner = read_entry(present)
            if owner is not None and self._replace_dead(owner, present):
                return
            if present is None:
                continue
            first = present if first is None else first
            is_kept = present != first or time.monotonic() > until
            if is_kept or (owner is not None and owner.is_alive()):
                raise ConfigError(
                    f"the node name {self.name} is taken by {_whose(owner)}: stop it, or choose "
                    f"another name (HORNBEAM_NODE)"
                )
            time.sleep(_POLL_S)

    def keep(self) -> None:
        """Begin with the heartbeats, the first of them at once."""
        self.beat()
        self._thread = threading.Thread(
            target=self._run, name=f"hornbeam-beat-{self.name}", daemon=True
        )
        self._thread.start()

    def beat(self) -> None:
        """Write the entry anew, out of turn; unless the name was never claimed, or given up.

        Raises:
            StoreUnavailable: the registry cannot be reached.
        """
        with self._beating:
            if self._value and not self._stop.is_set():
                self._beat()

    def close(self) -> None:
        """Give the name up. Closing again does nothing; in a forked child it never does."""
        if os.getpid() != self._entry.pid or self._stop.is_set():
            return
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_S)
        try:
            with self._beating:
                if self._value:
                    self._store.cas(self._key, self._value, None, ttl=_GONE)
        except StoreError as error:
            logger.warning("the node %s leaves the registry by its expiry: %s", self.name, error)

    def _try_claim(self) -> bool:
        value = self._entry.to_value()
        claimed = self._store.add(self._key, value, ttl=TTL_S)
        if claimed:
            self._value = value
        return claimed

    def _replace_dead(self, owner: Entry, present: Any) -> bool:
        if owner.is_alive() is not False:
            return False
        value = self._entry.to_value()
        replaced = self._store.cas(self._key, present, value, ttl=TTL_S)
        if replaced:
            self._value = value
        return replaced

    def _run(self) -> None:
        pause = BEAT_S
        while not self._stop.wait(pause):
            pause = BEAT_S if self._try_beat(quietly=pause != BEAT_S) else _RETRY_S

    def _try_beat(self, *, quietly: bool) -> bool:
        """Beat; return False if the store did not take it."""
        try:
            self.beat()
        except HornbeamError as error:
            if not quietly:
                logger.warning("the heartbeat of the node %s failed: %s", self.name, error)
            return False
        except Exception:
            logger.exception("the heartbeat of the node %s failed", self.name)
            return False
        return True

    def _beat(self) -> None:
        self._entry = replace(self._describe(self._entry), beat=self._entry.beat + 1)
        value = self._entry.to_value()
        if self._write(value):
            return
        present = self._store.get(self._key)
        owner = read_entry(present)
        if owner is not None and owner.token == self.token:
            self._value = present  # a write of which we heard no more
        elif present is not None:
            self._lose(owner)
            return
        if not self._write(value, absent=present is None):
            raise StoreError("the entry changed again meanwhile")

    def _write(self, value: dict[str, Any], *, absent: bool = False) -> bool:
        if absent:
            written = self._store.add(self._key, value, ttl=TTL_S)
        else:
            written = self._store.cas(self._key, self._value, value, ttl=TTL_S)
        if written:
            self._value = value
        return written

    def _lose(self, owner: Entry | None) -> None:
        self._stop.set()
        logger.critical(
            "the node %s stops: its name belongs to %s since its heartbeats failed",
            self.name,
            _whose(owner),
        )
        self._on_lost()


def _whose(owner: Entry | None) -> str:
    if owner is None:
        return "another process, of another version of hornbeam"
    return f"process {owner.pid} on {owner.host}"
