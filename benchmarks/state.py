"""The store beside bare LMDB and Redis: what a call takes, and what happens at size.

python benchmarks/state.py --rounds 15
python benchmarks/state.py --only calls --only writers

A call to Redis costs about two wake-ups of another process, and these cost several times as much
between two cores as on one, at least on a virtual machine. Left alone, the scheduler makes it now
the one, now the other. So the server has a core of its own here, as it does beside an app with
several workers, and the client is measured on another core and, in a row of its own, on the same.
"""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
import time
from pathlib import Path

import lmdb
import redis
import state_scale
from common import environment, note, parser, redis_server, report, rotated, summary

from hornbeam_state import open_store

MULTI = 64
EMBEDDED, BARE, REDIS, BACKEND = "hornbeam-lmdb", "bare-lmdb", "redis-py", "hornbeam-redis"
REDIS_ON_OUR_CORE = "redis-py, server on the same core"
NEAR = "hornbeam-redis, near cache"
OPERATIONS = ("get", "set", "incr", "get_multi")
PARTS = ("calls", "writers", "listing", "bound", "expiring")
CORES = sorted(os.sched_getaffinity(0))


def main() -> None:
    options = parser(__doc__.partition("\n")[0])
    options.set_defaults(rounds=15)
    options.add_argument("--only", action="append", choices=PARTS, help="run this part")
    options.add_argument("--bytes", type=int, default=1536, help="size of a value")
    options.add_argument("--keys", type=int, default=1024, help="number of keys")
    options.add_argument("--seconds", type=float, default=0.1, help="of each turn, about")
    options.add_argument("--inserts", type=int, default=5_000_000, help="into the full cache")
    args = options.parse_args()
    parts = {
        "calls": lambda: calls(args),
        "writers": lambda: state_scale.many_writers(args.rounds),
        "listing": lambda: state_scale.listing(args.rounds),
        "bound": lambda: state_scale.cache_bound(args.inserts),
        "expiring": state_scale.expiring,
    }
    machine = environment("lmdb", "redis", "hiredis")
    report(
        {
            "benchmark": "state",
            "options": {"rounds": args.rounds, "bytes": args.bytes, "keys": args.keys},
            "environment": machine,
            **{name: parts[name]() for name in args.only or PARTS},
        },
        args.out,
    )


def calls(args):
    """Measure single calls of every contender, in turns."""
    keys = [f"doc:{number}" for number in range(args.keys)]
    everywhere = os.sched_getaffinity(0)
    with contextlib.ExitStack() as stack:
        contenders = make_contenders(stack, keys, os.urandom(args.bytes))
        taken = measure(contenders, args.rounds, args.seconds)
    os.sched_setaffinity(0, everywhere)
    compared = ratios(taken)
    return {
        "microseconds_per_call": {
            operation: {name: summary(values) for name, values in by_name.items()}
            for operation, by_name in taken.items()
        },
        "times_as_long_as_hornbeam-lmdb": compared,
        "targets": targets(taken, compared),
    }


def make_contenders(stack, keys, value):
    """Return for each contender, for each operation, a function that runs it a number of times."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hb-bench-")))
    server, socket = stack.enter_context(redis_server())
    os.sched_setaffinity(server.pid, CORES[-1:])
    embedded = stack.enter_context(contextlib.closing(open_store(f"lmdb://{directory}/store")))
    backend = stack.enter_context(contextlib.closing(open_store(f"unix://{socket}")))
    near = backend.space("cache")
    plain = stack.enter_context(redis.Redis(unix_socket_path=str(socket), db=1))
    bare = stack.enter_context(
        lmdb.open(str(directory / "bare"), map_size=2**30, sync=False, metasync=False)
    )
    names = [key.encode() for key in keys]
    for name, key in zip(names, keys, strict=True):
        embedded.set(key, value)
        backend.set(key, value)
        near.set(key, value)
        plain.set(key, value)
        with bare.begin(write=True) as txn:
            txn.put(name, value)
    through_redis_py = {
        "get": over(keys, plain.get),
        "set": over(keys, lambda key: plain.set(key, value)),
        "incr": over(["counter"], plain.incr),
        "get_multi": over(groups(keys), plain.mget),
    }
    return {
        EMBEDDED: store_operations(embedded, keys, value),
        BARE: {
            "get": over(names, lambda key: bare_get(bare, key)),
            "set": over(names, lambda key: bare_set(bare, key, value)),
            "incr": over([b"counter"], lambda key: bare_incr(bare, key)),
            "get_multi": over(groups(names), lambda group: bare_get_multi(bare, group)),
        },
        REDIS: through_redis_py,
        REDIS_ON_OUR_CORE: through_redis_py,
        BACKEND: store_operations(backend, keys, value),
        NEAR: {"get": over(keys, near.get), "get_multi": over(groups(keys), near.get_multi)},
    }


def store_operations(store, keys, value):
    return {
        "get": over(keys, store.get),
        "set": over(keys, lambda key: store.set(key, value)),
        "incr": over(["counter"], store.incr),
        "get_multi": over(groups(keys), store.get_multi),
    }


def bare_get(bare, key):
    with bare.begin() as txn:
        return txn.get(key)


def bare_set(bare, key, value):
    with bare.begin(write=True) as txn:
        txn.put(key, value)


def bare_incr(bare, key):
    with bare.begin(write=True) as txn:
        txn.put(key, b"%d" % (int(txn.get(key, b"0")) + 1))


def bare_get_multi(bare, keys):
    with bare.begin() as txn:
        return [txn.get(key) for key in keys]


def groups(keys):
    return [keys[start : start + MULTI] for start in range(0, len(keys) - MULTI + 1, MULTI)]


def over(inputs, call):
    """Return a function that makes a number of calls, over the inputs again and again."""

    def run(times):
        sequence = (inputs * (times // len(inputs) + 1))[:times]
        start = time.perf_counter()
        for each in sequence:
            call(each)
        return time.perf_counter() - start

    return run


def measure(contenders, rounds, seconds):
    """Let the contenders take turns; return the microseconds per call of each round."""
    times = {
        (operation, name): fitting_number(run, seconds)
        for name, operations in contenders.items()
        for operation, run in operations.items()
    }
    taken = {
        operation: {name: [] for name in contenders if operation in contenders[name]}
        for operation in OPERATIONS
    }
    gc.disable()
    for turn in range(rounds):
        note(f"calls, round {turn + 1} of {rounds}")
        for operation in OPERATIONS:
            for name in rotated(list(taken[operation]), turn):
                number = times[operation, name]
                move_to_core(name)
                elapsed = contenders[name][operation](number)
                taken[operation][name].append(elapsed / number * 1e6)
        gc.collect()
    gc.enable()
    return taken


def move_to_core(name):
    """Run on the first core, away from the server; on its core where that is the question."""
    os.sched_setaffinity(0, CORES[-1:] if name == REDIS_ON_OUR_CORE else CORES[:1])


def fitting_number(run, seconds):
    """Return how many calls take about that long, after warming up."""
    number = 64
    while (elapsed := run(number)) < seconds / 4:
        number *= 2
    return max(1, int(number * seconds / elapsed))


def ratios(taken):
    """Compare turns of the same round, since the machine may be faster in one than in another."""
    return {
        operation: {
            name: summary(
                [other / ours for ours, other in zip(by_name[EMBEDDED], values, strict=True)]
            )
            for name, values in by_name.items()
            if name != EMBEDDED
        }
        for operation, by_name in taken.items()
    }


def targets(taken, compared):
    """Tell what is as fast as it has to be."""
    near = summary(taken["get"][NEAR])["median"]
    return {
        **{
            f"{operation} at most 1/{least} of redis-py's": median(compared, operation, REDIS)
            >= least
            for operation, least in (("get", 15), ("incr", 5))
        },
        **{
            f"{operation} at most {most} times bare LMDB's": 1 / median(compared, operation, BARE)
            <= most
            for operation, most in (("get", 5), ("incr", 2.5))
        },
        "near cache: at most 3 us": near <= 3,
    }


def median(compared, operation, name):
    return compared[operation][name]["median"]


if __name__ == "__main__":
    main()
