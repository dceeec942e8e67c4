"""Embeddings a second over HTTP: hornbeam beside the servers that one would else use.

    python benchmarks/embed.py --rounds 5
    python benchmarks/embed.py --contenders plain mosec --connections 32 --seconds 10 --rounds 3

Every contender serves the same model on the same cores, batches of up to 32, one text per request.
One runs at a time: it is started, warmed up, loaded by wrk with texts that no one has sent before,
checked against `SentenceTransformer.encode` and stopped; then comes the next, and after the last
the next round. Needs wrk. The peers' environments are made below `--environments` when they are
first needed, which takes minutes and gigabytes.

`--only` asks for something else: `tune` tries the settings of peers, `one-connection`, `idle`,
`overload` and `disconnects` look at hornbeam more closely.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import environment, parser, report
from embedding import (
    contenders,
    disconnects,
    environments,
    idle,
    one_connection,
    overload,
    processes,
    tuning,
)
from embedding.comparison import Comparison, ratios
from embedding.servers import Bench

if TYPE_CHECKING:
    import argparse

    from embedding.contenders import Contender

MODES = {
    "tune": tuning.run,
    "one-connection": one_connection.run,
    "idle": idle.run,
    "overload": overload.run,
    "disconnects": disconnects.run,
}


def main() -> None:
    args = arguments()
    if shutil.which("wrk") is None:
        sys.exit("wrk is not installed: it is the load generator, package wrk of most systems")
    processes.adopt_orphans()
    processes.leave_on_sigterm()
    cores = sorted(os.sched_getaffinity(0))[: args.cores]
    os.sched_setaffinity(0, cores)
    machine = environment("gunicorn", "uvicorn", "fastapi", "torch", "sentence-transformers")
    bench = Bench(environments=args.environments, cores=len(cores))
    chosen = [each for each in contenders.ALL if each.name in args.contenders]
    with tempfile.TemporaryDirectory(prefix="hb-bench-") as folder:
        found = MODES.get(args.only, compare)(bench, chosen, args, Path(folder))
    report(
        {
            "benchmark": "embed",
            "command": " ".join(["python", *sys.argv]),
            "options": {
                name: str(value) if isinstance(value, Path) else value
                for name, value in vars(args).items()
                if name != "out"
            },
            "environment": machine,
            **found,
        },
        args.out,
    )


def arguments() -> argparse.Namespace:
    options = parser(__doc__.partition("\n")[0])
    options.add_argument(
        "--contenders", type=listed(contenders.NAMES), default=list(contenders.NAMES), metavar="A,B"
    )
    options.add_argument(
        "--connections", type=numbers, default=[1, 8, 32, 64], metavar="N,M", help="kept busy"
    )
    options.add_argument("--seconds", type=float, default=10, help="of each measurement")
    options.add_argument("--warm-up", type=float, default=5, help="seconds of load before")
    options.add_argument("--cores", type=int, default=2, help="that everything runs on")
    options.add_argument("--only", choices=MODES, help="measure this instead")
    options.add_argument(
        "--environments",
        type=Path,
        default=environments.default_folder(),
        help="where the peers' virtual environments are",
    )
    options.add_argument(
        "--overload-seconds", type=float, default=60, help="of requests that come anyway"
    )
    options.add_argument(
        "--others",
        type=float,
        default=0.25,
        help="repeat a measurement in which other programs kept more cores than this busy",
    )
    options.add_argument("--again", type=int, default=3, help="repetitions of one, at most")
    options.add_argument(
        "--no-check", dest="check", action="store_false", help="do not compare the vectors"
    )
    return options.parse_args()


def listed(names: tuple[str, ...]):
    """Return a type of option: some of the names, between commas."""

    def names_in(text: str) -> list[str]:
        asked = text.split(",")
        if unknown := set(asked) - set(names):
            raise ValueError(f"no such contender: {', '.join(sorted(unknown))}")
        return asked

    names_in.__name__ = f"list of {', '.join(names)}"
    return names_in


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def compare(
    bench: Bench, chosen: list[Contender], args: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Measure the contenders with their chosen settings."""
    comparison = Comparison(bench, args, folder)
    comparison.run({each.name: (each, each.chosen) for each in chosen})
    return {
        "contenders": {each.name: described(bench, each) for each in chosen},
        "results": {each.name: comparison.results(each.name) for each in chosen},
        "least_cosine": comparison.cosines,
        "ratios": ratios(comparison, [(each.name, each) for each in chosen]),
        "failures": comparison.failures,
    }


def described(bench: Bench, contender: Contender) -> dict[str, Any]:
    """Say what a contender ran as: its settings, its thread budget, its pins."""
    pins = contender.folder / "requirements.txt"
    return {
        "settings": contender.chosen,
        "processes": contender.chosen["WORKERS"],
        "threads_each": contenders.threads(contender.chosen, bench.cores),
        "batch_size": 1 if contender.app == "plain" else contenders.BATCH_SIZE,
        "command": " ".join(contender.command),
        "requirements": pins.read_text().splitlines() if pins.exists() else "those of hornbeam",
    }


if __name__ == "__main__":
    main()
