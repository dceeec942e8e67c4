"""The connection that a node waits on."""

from __future__ import annotations

import asyncio

from rpc_helpers import a_backend

from hornbeam_state.backends.redis.batches import Command
from hornbeam_state.transports.redis.aline import AsyncLine


async def test_a_line_that_is_opened_again_lets_go_of_what_it_had(valkey):
    """Else the loop would watch a closed descriptor, and refuse the next that has its number."""
    backend, loop = a_backend(valkey.url), asyncio.get_running_loop()
    line = AsyncLine(backend.link, 0, 5.0)
    await line.open()
    watched = len(loop._selector.get_map())
    for _ in range(3):
        await line.open()
        assert len(loop._selector.get_map()) == watched
    assert await line.ask(Command((b"PING",), 0)) == [b"PONG"]
    line.close()
    assert len(loop._selector.get_map()) == watched - 1
    await backend.aclose()
