"""Running one call on a node, without a server."""

from __future__ import annotations

import asyncio

import pytest
from transport_helpers import Answers, eventually

from hornbeam_state.transports.redis import runs
from hornbeam_state.transports.redis.bodies import Body
from hornbeam_state.transports.redis.envelope import Envelope, Kind
from hornbeam_state.transports.redis.intake import Work
from hornbeam_state.transports.redis.keys import NodeKeys
from hornbeam_state.transports.redis.places import CountedPlaces
from hornbeam_state.transports.redis.station import Station


class Away:
    """A writer whose server never answers."""

    async def write(self, command):
        await asyncio.Event().wait()


async def test_a_call_that_is_cancelled_ends_so_though_its_caller_cannot_be_told(monkeypatch):
    """At the end of a node, as if the server were away."""
    monkeypatch.setattr(runs, "_LAST_WORD_S", 0.01)
    keys, handler, body = NodeKeys("gpu@ml-1"), Answers(), Body([]).joined()
    station = Station(backend=None, node="gpu@ml-1", keys=keys, secret=None, most_bytes=2**20)
    runner = runs.Runner(station, handler, Away())
    envelope = Envelope(
        kind=Kind.CALL,
        id=bytes(16),
        node="gpu@ml-1",
        inbox=bytes(16),
        target="test",
        method="hang",
        options={"label": "call"},
        timeout=60.0,
        size=len(body),
    )
    [place] = await CountedPlaces(1).take(1, 0.0)
    running = asyncio.create_task(runner.run(Work(b"1-0", envelope, body, 60.0, place)))
    await asyncio.to_thread(eventually, lambda: handler.events)
    runner.closing = True
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert running.cancelled()
