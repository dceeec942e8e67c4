"""Half of the clients leave before they are answered: does work still run for them?"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import statistics
import time
from typing import TYPE_CHECKING, Any

from common import note
from embedding.contenders import ALL, Contender
from embedding.http_client import connect, post
from embedding.load import texts
from embedding.servers import Bench, Failed, Server, running

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

CLIENTS = 64
GRACE_MS = (0, 5, 20, 100)  # the server learns of it some time after the client left
KINDS = 4096  # of texts: ids tell the requests apart, so texts may repeat


@dataclasses.dataclass
class Seen:
    """What clients saw, by the number of their request: when they left, how long answers took."""

    left: dict[int, float] = dataclasses.field(default_factory=dict)
    answered_ms: list[float] = dataclasses.field(default_factory=list)
    failed: int = 0
    sent: int = 0


def run(
    bench: Bench, _chosen: list[Contender], args: argparse.Namespace, _folder: Path
) -> dict[str, Any]:
    """Return how many items ran whose client had left before their batch began."""
    serving = next(each for each in ALL if each.app == "hornbeam_serving")
    contender = dataclasses.replace(serving, name="disconnects", app="hornbeam_disconnects")
    note("disconnects")
    try:
        with running(bench, contender) as server:
            seen = asyncio.run(clients(server, args.seconds))
            time.sleep(2)  # what waits still runs or is dropped
            began = server.request("GET", "/began")
    except (Failed, RuntimeError) as error:
        return {"failure": str(error)}
    return told(seen, {int(number): when for number, when in began.items()})


async def clients(server: Server, seconds: float) -> Seen:
    """Let clients send one request after the other; half of them do not wait for the answer."""
    seen, kinds = Seen(), texts(KINDS, seed=50_000_000)
    end = time.monotonic() + seconds
    await asyncio.gather(
        *(client(server, kinds, seen, end, random.Random(n)) for n in range(CLIENTS))
    )
    return seen


async def client(
    server: Server, kinds: list[str], seen: Seen, end: float, draw: random.Random
) -> None:
    connection = await connect(server.port)
    while time.monotonic() < end:
        seen.sent += 1
        number = seen.sent
        body = json.dumps({"number": number, "text": draw.choice(kinds)}).encode()
        begin = time.monotonic()
        answer = connection.send(post(server.contender.path, body))
        patience = draw.uniform(0, usual(seen)) if draw.random() < 0.5 else 60.0
        done, _ = await asyncio.wait([answer], timeout=patience)
        if not done:
            leave = (
                connection.transport.abort if draw.random() < 0.5 else connection.transport.close
            )
            leave()
            seen.left[number] = time.monotonic()
        elif answer.result().status == 200:
            seen.answered_ms.append(1000 * (time.monotonic() - begin))
        else:
            seen.failed += 1
        if connection.transport.is_closing():
            connection = await connect(server.port)
    connection.transport.abort()


def usual(seen: Seen) -> float:
    """Return how many seconds an answer usually takes: who leaves does so before that."""
    latest = seen.answered_ms[-CLIENTS:]
    return statistics.median(latest) / 1000 if latest else 0.1


def told(seen: Seen, began: dict[int, float]) -> dict[str, Any]:
    """Return the figures: of those who left, whose work ran, and by how much too late it began."""
    late_ms = [
        1000 * (began[number] - when) for number, when in seen.left.items() if number in began
    ]
    return {
        "clients": CLIENTS,
        "requests": seen.sent,
        "answered": len(seen.answered_ms),
        "failed": seen.failed,
        "left": len(seen.left),
        "left_and_never_run": len(seen.left) - len(late_ms),
        "left_after_their_batch_began": sum(late <= 0 for late in late_ms),
        "run_though_left_before": {
            f"by more than {grace} ms": sum(late > grace for late in late_ms) for grace in GRACE_MS
        },
        "latest_ms": round(max([0.0, *late_ms]), 1),
    }
