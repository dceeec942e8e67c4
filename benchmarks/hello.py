"""Hello-world requests a second of the hornbeam worker beside the workers it builds on.

    python benchmarks/hello.py

An ASGI app under `-k hornbeam` and under `uvicorn_worker.UvicornWorker`, and a WSGI app under
`-k hornbeam` and under `gthread` with as many threads. All servers stay up; wrk drives one at a
time. A round measures a pair in the order ours, other, other, ours, so that a drift of the machine
cancels out, and yields one ratio. Printed as JSON: the median ratio of the rounds with a bootstrap
interval, and the CPU time of a request, which a busy machine disturbs less. Needs wrk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
APP = """
HEADERS = [(b"content-type", b"text/plain"), (b"content-length", b"13")]

async def asgi(scope, receive, send):
    if scope["type"] == "lifespan":
        while (await receive())["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": b"Hello, world!"})

def wsgi(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "13")])
    return [b"Hello, world!"]
"""


def main() -> None:
    args = arguments()
    if shutil.which("wrk") is None:
        sys.exit("wrk is not installed: apt-get install wrk")
    pairs = {
        "asgi": (args.worker_class, "uvicorn_worker.UvicornWorker"),
        "wsgi": (args.worker_class, "gthread"),
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "hello.py").write_text(APP)
        results = {}
        for interface in args.interfaces:
            ours, other = pairs[interface]
            servers = [
                stack.enter_context(server(worker, interface, folder, args))
                for worker in (ours, other)
            ]
            results[interface] = {"beside": other, **compare(servers, args)}
    json.dump({"machine": machine(), "settings": vars(args), **results}, sys.stdout, indent=2)
    print()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=int, default=2, help="of each measurement")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=32, help="request threads for WSGI")
    parser.add_argument("--worker-class", default="hornbeam_ml.worker.HornbeamWorker")
    parser.add_argument(
        "--interfaces", nargs="+", choices=["asgi", "wsgi"], default=["asgi", "wsgi"]
    )
    return parser.parse_args()


@contextmanager
def server(
    worker: str, interface: str, folder: Path, args: argparse.Namespace
) -> Iterator[tuple[str, int]]:
    """Run one gunicorn on a free port; yield its URL and its pid."""
    log = folder / f"{worker}-{interface}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "gunicorn", "-k", worker, "-b", "127.0.0.1:0"),
                *("-w", str(args.workers), "--threads", str(args.threads)),
                *("--no-control-socket", f"hello:{interface}"),
            ],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HORNBEAM_STORE": "memory://"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        yield wait_until_ready(process, log), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r"Listening at: (\S+)", log.read_text())
        try:
            if found and urllib.request.urlopen(found[1], timeout=1).read() == b"Hello, world!":
                return found[1]
        except OSError:
            pass
        time.sleep(0.05)
    sys.exit(f"{process.args} did not come up:\n{log.read_text()}")


def compare(servers: list[tuple[str, int]], args: argparse.Namespace) -> dict:
    """Measure both servers in turns; return what they do and the ratio of ours to the other."""
    for one in servers:
        measure(*one, args)  # warm up
    rates, costs = [], []
    for _ in range(args.rounds):
        first, second, third, fourth = (measure(*servers[side], args) for side in (0, 1, 1, 0))
        rates.append((first[0] + fourth[0], second[0] + third[0]))
        costs.append((first[1] + fourth[1], second[1] + third[1]))
    return {
        "hornbeam_per_second": round(statistics.median(ours for ours, _ in rates) / 2),
        "other_per_second": round(statistics.median(other for _, other in rates) / 2),
        "rate": ratio(rates),
        "hornbeam_cpu_us": round(statistics.median(ours for ours, _ in costs) / 2, 2),
        "other_cpu_us": round(statistics.median(other for _, other in costs) / 2, 2),
        "cpu": ratio(costs),
    }


def ratio(pairs: list[tuple[float, float]]) -> dict:
    ratios = [ours / other for ours, other in pairs]
    return {
        "median_ratio": round(statistics.median(ratios), 4),
        "interval_95": [round(bound, 4) for bound in bootstrap(ratios)],
        "ratios": [round(one, 4) for one in ratios],
    }


def measure(url: str, pid: int, args: argparse.Namespace) -> tuple[float, float]:
    """Return requests a second as wrk saw them and microseconds of CPU time for each.

    Refuses a run in which a request failed.
    """
    command = ["wrk", "-t", "1", "-c", str(args.connections), "-d", f"{args.seconds}s", url]
    before = cpu_seconds(pid)
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    spent = cpu_seconds(pid) - before
    failed = re.search(r"Socket errors: .*|Non-2xx.*", out)
    if failed:
        sys.exit(f"{' '.join(command)}: {failed[0]}")
    requests = int(re.search(r"(\d+) requests in", out)[1])
    return float(re.search(r"Requests/sec:\s+([\d.]+)", out)[1]), 1e6 * spent / requests


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of the workers so far."""
    workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ticks = 0
    for worker in workers:
        fields = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system
    return ticks / os.sysconf("SC_CLK_TCK")


def bootstrap(values: list[float], samples: int = 10_000) -> tuple[float, float]:
    """Return the 95 % interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(samples))
    return medians[int(samples * 0.025)], medians[int(samples * 0.975)]


def machine() -> dict:
    names = ("gunicorn", "uvicorn", "uvicorn-worker", "uvloop", "httptools")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


if __name__ == "__main__":
    main()
