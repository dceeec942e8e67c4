"""What a server does when nobody asks: the CPU time of all its processes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from common import note, summary
from embedding import processes
from embedding.load import post_texts
from embedding.servers import Bench, Failed, running

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from embedding.contenders import Contender

SETTLING = 5.0  # seconds after the load
WATCHED = 10.0  # seconds; the kernel counts CPU time in ticks, of 0.1 % of that


def run(
    bench: Bench, chosen: list[Contender], args: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Return the percentage of a core that each contender uses after a load has ended."""
    results: dict[str, Any] = {}
    for contender in chosen:
        note(f"idle: {contender.name}")
        try:
            with running(bench, contender) as server:
                post_texts(
                    server.url,
                    contender.body,
                    connections=32,
                    seconds=args.warm_up,
                    seed=1,
                    folder=folder,
                )
                time.sleep(SETTLING)
                used = [watched(server.pid) for _ in range(args.rounds)]
        except (Failed, RuntimeError) as error:
            results[contender.name] = {"failure": str(error)}
        else:
            results[contender.name] = summary(used)
    return {"unit": "% of a core", "seconds": WATCHED, "results": results}


def watched(pid: int) -> float:
    begin, used = time.monotonic(), processes.cpu_seconds(pid)
    time.sleep(WATCHED)
    return 100 * (processes.cpu_seconds(pid) - used) / (time.monotonic() - begin)
