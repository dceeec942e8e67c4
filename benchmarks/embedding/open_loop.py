"""Requests that come when they come, whether or not those before are answered: Poisson arrivals."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field

from embedding.http_client import Answer, Connection, connect

PATIENCE = 30.0  # seconds for the last answers


@dataclass(frozen=True)
class Outcome:
    """One request: what came back, and how long after it was due."""

    answer: Answer
    latency_ms: float


@dataclass
class Load:
    """What an open loop did."""

    outcomes: list[Outcome] = field(default_factory=list)
    unanswered: int = 0
    connections: int = 0
    cpu_seconds: float = 0.0
    late_ms: float = 0.0

    def with_status(self, status: int) -> list[float]:
        """Return the latencies of the requests answered with a status."""
        return [each.latency_ms for each in self.outcomes if each.answer.status == status]


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Return when requests are due, from 0 on: `rate` a second, independent of each other."""
    draw = random.Random(seed)
    due, times = draw.expovariate(rate), []
    while due < seconds:
        times.append(due)
        due += draw.expovariate(rate)
    return times


async def send(port: int, requests: list[bytes], due: list[float]) -> Load:
    """Send each request when it is due, over an idle connection or a new one.

    Latency counts from when a request was due, so a slow generator makes it look worse, not better.
    """
    load = Load()
    idle: list[Connection] = []
    begin, used = time.monotonic(), time.process_time()
    tasks = set()
    for request, offset in zip(requests, due, strict=True):
        if (wait := begin + offset - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        else:
            load.late_ms = max(load.late_ms, -1000 * wait)
        task = asyncio.create_task(_one(port, request, begin + offset, idle, load))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    _, waiting = await asyncio.wait(tasks, timeout=PATIENCE) if tasks else (None, ())
    for task in waiting:
        task.cancel()
    load.unanswered = len(waiting)
    load.cpu_seconds = time.process_time() - used
    for connection in idle:
        connection.transport.abort()
    return load


async def _one(port: int, request: bytes, due: float, idle: list[Connection], load: Load) -> None:
    connection = idle.pop() if idle else await _new(port, load)
    answer = await connection.send(request)
    load.outcomes.append(Outcome(answer, 1000 * (time.monotonic() - due)))
    if not connection.transport.is_closing():
        idle.append(connection)


async def _new(port: int, load: Load) -> Connection:
    load.connections += 1
    return await connect(port)
