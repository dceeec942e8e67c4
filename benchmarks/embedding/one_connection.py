"""What hornbeam adds to a call when nobody else asks: one connection against a direct call."""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING, Any

from common import note, summary
from embedding.comparison import Seeds, wait_until_idle
from embedding.load import get, post_texts, texts
from embedding.servers import Bench, Failed, Server, running

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from embedding.contenders import Contender

DIRECT_CALLS = 300


def run(
    bench: Bench, chosen: list[Contender], args: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Compare the median latency at one connection to a direct call and a hello world.

    Both are of the same process. The texts of all are of the same kind and none comes twice.
    """
    results: dict[str, Any] = {}
    for contender in chosen:
        if contender.ours:
            note(f"one connection: {contender.name}")
            try:
                with running(bench, contender) as server:
                    results[contender.name] = compared(server, args, folder)
            except (Failed, RuntimeError) as error:
                results[contender.name] = {"failure": str(error)}
    return {"unit": "ms", "results": results}


def compared(server: Server, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    seeds = Seeds()

    def embed(seconds: float) -> float:
        figures = post_texts(
            server.url,
            server.contender.body,
            connections=1,
            seconds=seconds,
            seed=seeds.next(),
            folder=folder,
        )
        return median_of(figures)

    embed(args.warm_up)
    turns: dict[str, list[float]] = {"embed": [], "direct": [], "hello": [], "ratio": []}
    for _ in range(args.rounds):
        wait_until_idle(server)
        turns["embed"].append(embed(args.seconds))
        turns["direct"].append(direct(server, seeds.next()))
        hello = get(server.at("/hello"), connections=1, seconds=min(2.0, args.seconds))
        turns["hello"].append(median_of(hello))
        floor = turns["direct"][-1] + turns["hello"][-1]
        turns["ratio"].append(turns["embed"][-1] / floor)
    return {name: summary(values, 3) for name, values in turns.items()}


def median_of(figures: dict[str, float]) -> float:
    if figures["errors"]:
        raise RuntimeError(f"errors at one connection: {figures}")
    return figures["p50_ms"]


def direct(server: Server, seed: int) -> float:
    """Return the median of calls that the server's own process makes, one after the other."""
    body = json.dumps({"texts": texts(DIRECT_CALLS, 40_000_000 + seed)}).encode()
    return statistics.median(server.request("POST", "/direct", body))
