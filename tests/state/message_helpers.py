"""What tests of messages share: subscribing, waiting, looking behind the backend's back."""

from __future__ import annotations

import select
import threading
import time
from pathlib import Path

import pytest
from redis_servers import wait_until

from hornbeam_state.backends.base import Topics
from hornbeam_state.errors import StoreUnavailable

TOPIC = Topics((b"t",), ())


def is_readable(inbox, timeout_ms=0):
    poller = select.poll()
    poller.register(inbox.fileno(), select.POLLIN)
    return bool(poller.poll(timeout_ms))


def next_of(inbox):
    """Return the next message, waiting for it; what `take` raises is passed on."""
    while (message := inbox.take()) is None:
        assert is_readable(inbox, 10_000), "nothing came"
    return message


def failure_of(call, *args):
    started = time.monotonic()
    with pytest.raises(StoreUnavailable) as caught:
        call(*args)
    return str(caught.value), time.monotonic() - started


def published(backend, payload, count=1):
    """Publish until as many subscriptions as that get it."""

    def attempt():
        try:
            return backend.publish(b"t", payload) == count
        except StoreUnavailable:
            return False

    wait_until(attempt, f"{count} get {payload!r}")


def reached(backend, inbox, payload):
    """Publish until it arrives: a server may count a connection whose end it has not seen yet."""

    def attempt():
        try:
            backend.publish(b"t", payload)
        except StoreUnavailable:
            return False
        return is_readable(inbox, 50) and next_of(inbox) == (b"t", payload)

    wait_until(attempt, f"{payload!r} arrives")


def listeners(server):
    """Return the connections that are subscribed to something, as the server sees them."""
    with server.admin() as admin:
        return [client for client in admin.client_list() if "P" in client["flags"]]


def subscriptions(server):
    return sum(int(client["sub"]) + int(client["psub"]) for client in listeners(server))


def threads():
    return [one.name for one in threading.enumerate() if one.name.startswith("hornbeam-messages")]


def descriptors():
    """Return what this process has open."""
    return {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}
