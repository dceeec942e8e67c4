"""The embedded store beside Redis: get, set, incr, and a multi-get of 64 keys.

python benchmarks/state.py --rounds 15

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
from common import environment, note, parser, redis_server, report, rotated, summary

from hornbeam_state import open_store

MULTI = 64
EMBEDDED, BARE, REDIS, BACKEND = "hornbeam-lmdb", "bare-lmdb", "redis-py", "hornbeam-redis"
REDIS_ON_OUR_CORE = "redis-py, server on the same core"
CORES = sorted(os.sched_getaffinity(0))


def main() -> None:
    options = parser(__doc__.partition("\n")[0])
    options.set_defaults(rounds=15)
    options.add_argument("--bytes", type=int, default=1536, help="size of a value")
    options.add_argument("--keys", type=int, default=1024, help="number of keys")
    options.add_argument("--seconds", type=float, default=0.1, help="of each turn, about")
    args = options.parse_args()

    keys = [f"doc:{number}" for number in range(args.keys)]
    value = os.urandom(args.bytes)
    machine = environment("lmdb", "redis", "hiredis")
    with contextlib.ExitStack() as stack:
        contenders = make_contenders(stack, keys, value)
        taken = measure(contenders, args.rounds, args.seconds)
    compared = ratios(taken)
    report(
        {
            "benchmark": "state",
            "options": {"rounds": args.rounds, "bytes": args.bytes, "keys": args.keys},
            "environment": machine,
            "microseconds_per_call": {
                operation: {name: summary(values) for name, values in by_name.items()}
                for operation, by_name in taken.items()
            },
            "times_as_long_as_hornbeam-lmdb": compared,
            "targets": targets(compared),
        },
        args.out,
    )


def make_contenders(stack, keys, value):
    """Return for each contender, for each operation, a function that runs it a number of times."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hb-bench-")))
    server, socket = stack.enter_context(redis_server())
    os.sched_setaffinity(server.pid, CORES[-1:])
    embedded = stack.enter_context(contextlib.closing(open_store(f"lmdb://{directory}/store")))
    backend = stack.enter_context(contextlib.closing(open_store(f"unix://{socket}")))
    plain = stack.enter_context(redis.Redis(unix_socket_path=str(socket), db=1))
    bare = stack.enter_context(
        lmdb.open(str(directory / "bare"), map_size=2**30, sync=False, metasync=False)
    )
    names = [key.encode() for key in keys]
    for name, key in zip(names, keys, strict=True):
        embedded.set(key, value)
        backend.set(key, value)
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
    operations = ("get", "set", "incr", "get_multi")
    times = {
        (operation, name): fitting_number(contenders[name][operation], seconds)
        for operation in operations
        for name in contenders
    }
    taken = {operation: {name: [] for name in contenders} for operation in operations}
    gc.disable()
    for turn in range(rounds):
        note(f"round {turn + 1} of {rounds}")
        for operation in operations:
            for name in rotated(list(contenders), turn):
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


def targets(compared):
    """Tell whether the embedded store is as many times as fast as Redis as it has to be."""
    return {
        f"{operation} at most 1/{least} of redis-py's": compared[operation][REDIS]["median"]
        >= least
        for operation, least in (("get", 15), ("incr", 5))
    }


if __name__ == "__main__":
    main()
