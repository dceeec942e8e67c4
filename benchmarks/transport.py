"""Calls over the local transport: what one costs, and how fast large arrays move.

python benchmarks/transport.py --rounds 7

A server in a process of its own returns what it is given. A call carries one text; the time is that
of the caller, from the call to its result. "Floor" is what the same bytes cost on a socket between
two processes that do nothing else: a blocking write and read on each side.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import socket
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from common import atimed, environment, note, parser, report, run, summary, timed

from hornbeam_state.transports.base import Request
from hornbeam_state.transports.local import Server, connect

FLOOR = "floor"


def main() -> None:
    options = parser(__doc__.partition("\n")[0])
    options.set_defaults(rounds=7)
    options.add_argument("--calls", type=int, default=2000, help="calls in each turn")
    options.add_argument("--bytes", type=int, default=1500, help="length of the text")
    options.add_argument("--arrays", type=int, default=20, help="arrays echoed in each turn")
    options.add_argument("--megabytes", type=float, default=10.0, help="size of an array")
    options.add_argument("--callers", type=int, default=32, help="tasks or threads at a time")
    options.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio")
    args = options.parse_args()
    machine = environment("numpy", "uvloop")
    rounds = []
    with (
        running(echo_server, args.loop) as path,
        running(floor_server, args.bytes) as floor_path,
        contextlib.closing(connect(path, {})) as channel,
    ):
        for turn in range(args.rounds):
            note(f"round {turn + 1} of {args.rounds}")
            rounds.append(measure(channel, floor_path, args))
    report(
        {
            "benchmark": "transport",
            "options": {name: value for name, value in vars(args).items() if name != "out"},
            "environment": machine,
            **figures(rounds),
        },
        args.out,
    )


@contextlib.contextmanager
def running(serve, *arguments):
    """Run a server in a process of its own; yields where it listens."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="hb-bench-") as name:
        path = Path(name) / "own" / "host.sock"
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=serve, args=(path, theirs, *arguments), daemon=True)
        child.start()
        theirs.close()
        ours.recv()
        try:
            yield path
        finally:
            child.kill()
            child.join()


class Echo:
    def greet(self, hello):
        return hello

    async def call(self, request):
        return request.values


def echo_server(path, pipe, loop) -> None:
    async def serve():
        await Server(path, Echo()).start()
        pipe.send("ready")
        await asyncio.sleep(10**6)

    run(loop, serve())


def floor_server(path, pipe, count) -> None:
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        pipe.send("ready")
        while True:
            client, _ = listener.accept()
            while data := client.recv(count, socket.MSG_WAITALL):
                client.sendall(data)


def measure(channel, floor_path, args):
    """Return the microseconds of each call, by the way it was made, and the other figures."""
    request = Request(target="echo", values=["x" * args.bytes], timeout=60.0)
    times = {
        FLOOR: floor(floor_path, args),
        "call": timed(lambda: channel.call(request), args.calls),
        "submit": timed(lambda: channel.submit(request).result(), args.calls),
        "acall": run(args.loop, atimed(lambda: channel.acall(request), args.calls)),
    }
    return {
        "times": times,
        "MB/s": megabytes_per_second(channel, args),
        "threads": in_threads(channel, request, args),
        "tasks": run(args.loop, in_tasks(channel, request, args)),
    }


def floor(path, args):
    data = b"x" * args.bytes
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))

        def call():
            sock.sendall(data)
            sock.recv(args.bytes, socket.MSG_WAITALL)

        return timed(call, args.calls)


def megabytes_per_second(channel, args):
    """Return how fast arrays go there and back: the bytes of both ways by the time."""
    array = np.random.default_rng(0).random(int(args.megabytes * 1e6 / 8))
    request = Request(target="echo", values=[array])
    start = time.perf_counter()
    for _ in range(args.arrays):
        (result,) = channel.call(request)
    elapsed = time.perf_counter() - start
    if not np.array_equal(result, array):
        raise RuntimeError("an array came back as another")
    return 2 * args.arrays * array.nbytes / 1e6 / elapsed


def in_threads(channel, request, args):
    """Return how many calls a second threads make that each wait for their answers."""
    each = args.calls // args.callers
    start = time.perf_counter()
    with ThreadPoolExecutor(args.callers) as pool:
        for done in [
            pool.submit(timed, lambda: channel.call(request), each) for _ in range(args.callers)
        ]:
            done.result()
    return each * args.callers / (time.perf_counter() - start)


async def in_tasks(channel, request, args):
    """Return the same of tasks."""
    each = args.calls // args.callers
    start = time.perf_counter()
    await asyncio.gather(
        *(atimed(lambda: channel.acall(request), each) for _ in range(args.callers))
    )
    return each * args.callers / (time.perf_counter() - start)


def figures(rounds):
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
        "targets": {
            "median of a call under 200 microseconds": medians["call"]["median"] < 200,
            "median of an awaited call under 200 microseconds": medians["acall"]["median"] < 200,
            "200 MB/s": speed["median"] > 200,
        },
    }


if __name__ == "__main__":
    main()
