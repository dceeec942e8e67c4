"""What a model host saves and costs, against the same app with a model in each worker.

python benchmarks/host.py --rounds 3

Needs wrk. Memory is the PSS of all processes of a server after the same requests; throughput is
measured with 32 kept connections and new texts; latency with one, and a model that returns at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from common import environment, gunicorn, note, parser, poll, report, rotated, summary
from embedding.http_client import connect, post
from embedding.load import Body, post_texts
from embedding.processes import tree

APP = Path(__file__).parent / "apps" / "hosted"
WORKER = "hornbeam_ml.worker.HornbeamWorker"
HOST = {"HORNBEAM_HOST": "models"}
WARM_UP = 300  # requests


def main() -> None:
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--only", choices=["memory", "throughput", "latency"])
    options.add_argument("--backend", default="auto", help="of the embedder")
    options.add_argument("--workers", type=int, default=8, help="of the servers with many")
    options.add_argument("--seconds", type=float, default=8, help="of each turn of the throughput")
    options.add_argument("--requests", type=int, default=3000, help="of each turn of the latency")
    args = options.parse_args()
    result: dict[str, Any] = {
        "benchmark": "host",
        "options": {name: value for name, value in vars(args).items() if name != "out"},
        "environment": environment("gunicorn", "uvicorn", "torch", "openvino"),
    }
    for name, measure in (("memory", memory), ("throughput", throughput), ("latency", latency)):
        if args.only in (None, name):
            result[name] = measure(args)
    report(result, args.out)


def memory(args: Any) -> dict[str, Any]:
    """Compare the memory of many workers, by what their models run in."""
    model = {"BACKEND": args.backend}
    kinds = {"own_models": model, "host": {**model, **HOST}}
    figures = {}
    for name, variables in kinds.items():
        with server(args.workers, **variables) as (child, address):
            for _ in range(4):  # so that each worker has answered
                load(address, connections=4 * args.workers, seconds=2, seed=1)
            found = {pid: pss_mib(pid) for pid in tree(child.pid)}
            figures[name] = {
                "mib": round(sum(found.values())),
                "processes": sorted((round(each) for each in found.values()), reverse=True),
            }
            note(f"memory, {name}: {figures[name]}")
    ratio = figures["host"]["mib"] / figures["own_models"]["mib"]
    return {**figures, "ratio": round(ratio, 3)}


def throughput(args: Any) -> dict[str, Any]:
    """Compare requests a second: one worker with its model, and many with a host."""
    model = {"BACKEND": args.backend}
    kinds = {"one_own_model": (1, model), "host": (args.workers, {**model, **HOST})}
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(args.rounds):
        for name in rotated(list(kinds), turn):
            workers, variables = kinds[name]
            with server(workers, **variables) as (_, address):
                load(address, connections=32, seconds=3, seed=1000 + turn)
                done = load(address, connections=32, seconds=args.seconds, seed=turn)
                rates[name].append(done["per_second"])
                note(f"throughput, {name}: {done}")
    ratios = [
        hosted / own for hosted, own in zip(rates["host"], rates["one_own_model"], strict=True)
    ]
    return {**{name: summary(found) for name, found in rates.items()}, "ratio": summary(ratios, 3)}


def latency(args: Any) -> dict[str, Any]:
    """Compare a request with a model that returns at once, in microseconds."""
    medians: dict[str, list[float]] = {"own_model": [], "host": []}
    with contextlib.ExitStack() as stack:
        ports = {
            "own_model": urlsplit(stack.enter_context(server(1))[1]).port,
            "host": urlsplit(stack.enter_context(server(1, **HOST))[1]).port,
        }
        for turn in range(args.rounds):
            for name in rotated(list(ports), turn):
                times = asyncio.run(time_requests(ports[name], args.requests))
                medians[name].append(1e6 * statistics.median(times))
    more = [hosted - own for hosted, own in zip(medians["host"], medians["own_model"], strict=True)]
    return {
        **{name: summary(found, 0) for name, found in medians.items()},
        "more": summary(more, 0),
    }


async def time_requests(port: int, count: int) -> list[float]:
    """Return what each of some requests took, one after the other on one connection."""
    connection = await connect(port)
    request = post("/echo", Body().of("the quick brown fox jumps over the lazy dog"))
    times = []
    for number in range(WARM_UP + count):
        start = time.perf_counter()
        answer = await connection.send(request)
        if answer.status != 200:
            raise RuntimeError(f"not answered: {answer}")
        if number >= WARM_UP:
            times.append(time.perf_counter() - start)
    connection.transport.close()
    return times


@contextlib.contextmanager
def server(workers: int, **variables: str):
    """Run the app; yields its process and address when it answers."""
    with tempfile.TemporaryDirectory(prefix="hb-bench-") as name:
        variables = {"HORNBEAM_STORE": f"lmdb://{name}/store", **variables}
        options = ("-k", WORKER, "--workers", str(workers))
        with gunicorn("app:app", APP, *options, **variables) as (child, address):
            port = urlsplit(address).port
            poll(lambda: answers(port), "it answers", child, 600)
            yield child, address


def answers(port: int | None) -> bool:
    async def ask() -> int:
        connection = await connect(port)
        return (await connection.send(post("/echo", Body().of("x")))).status

    return asyncio.run(ask()) == 200


def load(address: str, *, connections: int, seconds: float, seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="hb-bench-") as name:
        done = post_texts(
            address + "/embed",
            Body(),
            connections=connections,
            seconds=seconds,
            seed=seed,
            folder=Path(name),
        )
    if done["errors"]:
        raise RuntimeError(f"not all were answered: {done}")
    return done


def pss_mib(pid: int) -> float:
    """Return the memory of a process, pages that others share counted in part."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


if __name__ == "__main__":
    main()
