"""Uncached embeddings a second, with one and two workers, under hornbeam and under uvicorn-worker.

python benchmarks/workers.py --rounds 5

Needs wrk. The same app (apps/embed.py) runs under both worker classes with their stock settings.
"""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.request import urlopen

from common import (
    busy_seconds,
    cpu_seconds,
    environment,
    gunicorn,
    note,
    parser,
    poll,
    report,
    rotated,
    summary,
    wait_until_idle,
)

APPS = Path(__file__).parent / "apps"
CLASSES = {
    "hornbeam": "hornbeam_ml.worker.HornbeamWorker",  # what `-k hornbeam` stands for
    "uvicorn-worker": "uvicorn_worker.UvicornWorker",
}


def main() -> None:
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of them")
    options.add_argument("--connections", type=int, default=32, help="that wrk keeps busy")
    options.add_argument("--seconds", type=int, default=10, help="of each turn")
    options.add_argument("--path", default="/embed", help="endpoint of the app: see apps/embed.py")
    options.add_argument(
        "--keep-alive",
        action="store_true",
        help="keep connections: one worker may then accept them all, for the whole turn",
    )
    options.add_argument(
        "--others",
        type=float,
        default=0.25,
        help="repeat a turn in which other programs kept more cores than this busy",
    )
    options.add_argument("--again", type=int, default=3, help="repetitions of a turn, at most")
    args = options.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("wrk is not installed: it is the load generator, package wrk of most systems")

    machine = environment("gunicorn", "uvicorn", "uvicorn-worker", "torch", "sentence-transformers")
    with contextlib.ExitStack() as stack:
        servers = {
            (name, workers): start(stack, name, workers)
            for workers in args.workers
            for name in CLASSES
        }
        threads = {label(*key): thread_settings(*server) for key, server in servers.items()}
        turns = measure(servers, args)
    report(
        {
            "benchmark": "workers",
            "options": {name: value for name, value in vars(args).items() if name != "out"},
            "environment": machine,
            "threads": threads,
            "requests_per_second": {
                label(*key): summary([rate(turn) for turn in turns[key]]) for key in turns
            },
            "latency_ms": {label(*key): latency(turns[key]) for key in turns},
            "cores_used_by_other_programs": {
                label(*key): summary([turn["others"] for turn in turns[key]]) for key in turns
            },
            "errors": {label(*key): sum(turn["errors"] for turn in turns[key]) for key in turns},
            "ratios": ratios(turns),
        },
        args.out,
    )


def label(name, workers):
    return f"{name}, {workers} {'worker' if workers == 1 else 'workers'}"


def start(stack, name, workers):
    """Start a server; return its process and address once all its workers answer."""
    note(f"starting {label(name, workers)}")
    directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="hb-bench-"))
    child, address = stack.enter_context(
        gunicorn(
            "embed:app",
            APPS,
            *("--worker-class", CLASSES[name], "--workers", str(workers)),
            HORNBEAM_STORE=f"lmdb://{directory}/store",
        )
    )
    poll(lambda: len(thread_settings(child, address)) == workers, "all workers answer", child)
    return child, address


def thread_settings(_child, address):
    """Ask the workers what their libraries use; each new connection may reach another one."""
    found = {}
    for _ in range(40):
        with contextlib.suppress(OSError), urlopen(f"{address}/threads", timeout=60) as response:
            settings = json.load(response)
            found[settings.pop("pid")] = settings
    return list(found.values())


def measure(servers, args):
    """Load one server after the other, round by round; one short turn of each is not counted."""
    for child, address in servers.values():
        load(address, args, seed=0, seconds=2)
        wait_until_idle(child)
    turns = {key: [] for key in servers}
    for turn in range(args.rounds):
        for place, key in enumerate(rotated(list(servers), turn)):
            child, address = servers[key]
            seed = 1 + turn * len(servers) + place
            for attempt in range(1 + args.again):
                figures = observed_load(child, address, args, seed + 1000 * attempt)
                note(
                    f"round {turn + 1}: {label(*key)}: {rate(figures):.1f} requests a second, "
                    f"other programs kept {figures['others']:.2f} cores busy"
                )
                wait_until_idle(child)
                if figures["others"] <= args.others:
                    break
            turns[key].append(figures)
    return turns


def observed_load(child, address, args, seed):
    """Load a server; add how many cores other programs kept busy meanwhile."""
    used = used_by_others(child)
    figures = load(address, args, seed, args.seconds)
    return {**figures, "others": (used_by_others(child) - used) / figures["seconds"]}


def used_by_others(child):
    """Return the CPU seconds used by whatever is neither this server nor the load generator."""
    ours = resource.getrusage(resource.RUSAGE_CHILDREN)  # wrk, once it has ended
    return busy_seconds() - cpu_seconds(child.pid) - ours.ru_utime - ours.ru_stime


def load(address, args, seed, seconds):
    """Let wrk post texts; no two turns post the same one."""
    command = [
        *("wrk", "-t", "1", "-c", str(args.connections), "-d", f"{seconds}s", "--timeout", "60s"),
        *("-s", str(APPS / "texts.lua"), address + args.path, "--", str(seed)),
        *(() if args.keep_alive else ("close",)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.rpartition("JSON ")[2])


def rate(turn):
    return turn["requests"] / turn["seconds"]


def latency(turns):
    return {name: statistics.median(turn[name] for turn in turns) for name in ("p50_ms", "p99_ms")}


def ratios(turns):
    """Compare turns of the same round, since the machine may be faster in one than in another."""
    compared = {}
    for name, workers in turns:
        ours = turns["hornbeam", workers]
        if name != "hornbeam":
            compared[f"hornbeam / {name}, {workers} workers"] = paired(ours, turns[name, workers])
        elif workers > 1 and ("hornbeam", 1) in turns:
            compared[f"hornbeam, {workers} workers / 1 worker"] = paired(ours, turns["hornbeam", 1])
    return compared


def paired(ones, others):
    return summary([rate(one) / rate(other) for one, other in zip(ones, others, strict=True)])


if __name__ == "__main__":
    main()
