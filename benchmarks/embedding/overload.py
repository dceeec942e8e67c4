"""Twice as many requests as the server can answer: what it still answers, and how it refuses."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from common import note
from embedding import open_loop, processes
from embedding.comparison import Seeds, wait_until_idle
from embedding.http_client import post
from embedding.load import post_texts, texts
from embedding.servers import Bench, Failed, Server, running

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from embedding.contenders import Contender

QUEUE_LIMIT = 32
CONNECTIONS = 32  # of the closed loop that finds the peak
TIMES = 2.0  # as many as the peak
SETTLED = 10.0  # seconds after which memory should not grow


def run(
    bench: Bench, chosen: list[Contender], args: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Overload each of ours; a peer without a bounded queue has nothing to refuse with."""
    results: dict[str, Any] = {}
    for contender in chosen:
        if contender.ours:
            note(f"overload: {contender.name}")
            try:
                results[contender.name] = overload(bench, contender, args, folder)
            except (Failed, RuntimeError) as error:
                results[contender.name] = {"failure": str(error)}
    return {"queue_limit": QUEUE_LIMIT, "results": results}


def overload(
    bench: Bench, contender: Contender, args: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Return what a server did under twice its peak, measured before and after."""
    seeds = Seeds()

    def peak(seconds: float) -> float:
        wait_until_idle(server)
        figures = post_texts(
            server.url,
            contender.body,
            connections=CONNECTIONS,
            seconds=seconds,
            seed=seeds.next(),
            folder=folder,
        )
        if figures["errors"]:
            raise RuntimeError(f"errors at the peak: {figures}")
        return figures["per_second"]

    with running(bench, contender, QUEUE_LIMIT=str(QUEUE_LIMIT)) as server:
        peak(args.warm_up)
        before = peak(args.seconds)
        wait_until_idle(server)
        due = open_loop.arrivals(TIMES * before, args.overload_seconds, seed=1)
        load, memory = asyncio.run(observed(server, due))
        after = peak(args.seconds)
    return {
        "peak_per_second": {"before": round(before, 1), "after": round(after, 1)},
        **told(load, len(due), args.overload_seconds, max(before, after)),
        "memory_mib": growth(memory),
    }


async def observed(server: Server, due: list[float]) -> tuple[open_loop.Load, list]:
    """Load a server; return also its memory, once a second."""
    path, body = server.contender.path, server.contender.body
    requests = [post(path, body.of(text)) for text in texts(len(due), seed=30_000_000)]
    watching = asyncio.create_task(watch(server.pid, memory := []))
    try:
        return await open_loop.send(server.port, requests, due), memory
    finally:
        watching.cancel()


async def watch(pid: int, memory: list[tuple[float, float]]) -> None:
    begin = time.monotonic()
    while True:
        memory.append((time.monotonic() - begin, processes.resident_mib(pid)))
        await asyncio.sleep(1)


def told(load: open_loop.Load, offered: int, seconds: float, peak: float) -> dict[str, Any]:
    """Return the figures of a load."""
    served, refused = load.with_status(200), load.with_status(503)
    refusals = [each.answer for each in load.outcomes if each.answer.status == 503]
    return {
        "offered_per_second": round(offered / seconds, 1),
        "goodput_per_second": round(len(served) / seconds, 1),
        "goodput_of_peak": round(len(served) / seconds / peak, 3),
        "served": {"count": len(served), **percentiles(served)},
        "refused": {
            "count": len(refused),
            **percentiles(refused),
            "with_retry_after": sum(answer.retry_after for answer in refusals),
        },
        "other_answers": len(load.outcomes) - len(served) - len(refused),
        "unanswered": load.unanswered,
        "generator": {
            "cores_used": round(load.cpu_seconds / seconds, 3),
            "latest_ms": round(load.late_ms, 1),
            "connections": load.connections,
        },
    }


def percentiles(latencies: list[float]) -> dict[str, float]:
    if not latencies:
        return {}
    p50, p99 = np.percentile(latencies, [50, 99])
    return {"p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2)}


def growth(memory: list[tuple[float, float]]) -> dict[str, Any]:
    """Return the memory over time, and how fast it grew once it had settled."""
    settled = [(second, mib) for second, mib in memory if second >= SETTLED]
    slope = np.polyfit(*zip(*settled, strict=True), 1)[0] if len(settled) > 2 else None
    return {
        "first": round(memory[0][1], 1),
        "last": round(memory[-1][1], 1),
        "most": round(max(mib for _, mib in memory), 1),
        "per_minute_once_settled": None if slope is None else round(60 * float(slope), 2),
        "each_second": [round(mib) for _, mib in memory],
    }
