"""What the store does at size: several writers, a million keys, a cache that is full for long."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import lmdb
import redis
from common import note, redis_server, summary

from hornbeam_state import open_store

BATCH = 1000
fork = multiprocessing.get_context("fork")


def many_writers(rounds, processes=4, increments=20_000):
    """Let processes increment one counter together; return increments a second of each round."""
    rates = {"hornbeam-lmdb": [], "bare-lmdb": []}
    for turn in range(rounds):
        note(f"writers, round {turn + 1} of {rounds}")
        for name, work in (("hornbeam-lmdb", increment), ("bare-lmdb", increment_bare)):
            rates[name].append(together(work, processes, increments))
    ratios = [ours / bare for ours, bare in zip(*rates.values(), strict=True)]
    fastest = summary(rates["hornbeam-lmdb"])["median"]
    return {
        "processes": processes,
        "increments_per_second": {name: summary(values, 0) for name, values in rates.items()},
        "of_bare_lmdb": summary(ratios),
        "targets": {
            "150,000 a second, or half of bare LMDB": fastest >= 150_000
            or summary(ratios)["median"] >= 0.5
        },
    }


def together(work, processes, increments):
    with tempfile.TemporaryDirectory(prefix="hb-bench-") as directory:
        start, times = fork.Barrier(processes), fork.Queue()
        children = [
            fork.Process(target=work, args=(directory, increments, start, times))
            for _ in range(processes)
        ]
        for child in children:
            child.start()
        spans = [times.get(timeout=120) for _ in children]
        for child in children:
            child.join()
    elapsed = max(end for _, end in spans) - min(begin for begin, _ in spans)
    return processes * increments / elapsed


def increment(directory, increments, start, times):
    store = open_store(f"lmdb://{directory}/store")
    store.incr("counter", 0)
    start.wait()
    begin = time.perf_counter()
    for _ in range(increments):
        store.incr("counter")
    times.put((begin, time.perf_counter()))


def increment_bare(directory, increments, start, times):
    bare = lmdb.open(f"{directory}/bare", map_size=2**30, sync=False, metasync=False)
    start.wait()
    begin = time.perf_counter()
    for _ in range(increments):
        with bare.begin(write=True) as txn:
            txn.put(b"counter", b"%d" % (int(txn.get(b"counter", b"0")) + 1))
    times.put((begin, time.perf_counter()))


def listing(rounds, keys=1_000_000, listed=100):
    """List a hundred keys among a million; return milliseconds, and what Redis had to run."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="hb-bench-"))
        _, socket = stack.enter_context(redis_server())
        stores = {
            "hornbeam-lmdb": open_store(f"lmdb://{directory}/store"),
            "hornbeam-redis": open_store(f"unix://{socket}", timeout=10),
        }
        admin = stack.enter_context(redis.Redis(unix_socket_path=str(socket)))
        taken = {}
        for name, store in stores.items():
            stack.enter_context(contextlib.closing(store))
            note(f"{name}: storing {keys} keys")
            fill(store, keys, lambda number: f"doc:{number:07}")
            admin.config_resetstat()
            taken[name] = [time_of_listing(store, keys, listed) for _ in range(max(rounds, 5) * 4)]
        ran = sorted(name.removeprefix("cmdstat_") for name in admin.info("commandstats"))
    return {
        "keys": keys,
        "listed": listed,
        "milliseconds": {name: summary(values, 3) for name, values in taken.items()},
        "redis_ran": ran,
        "targets": {
            "under 1 ms embedded": summary(taken["hornbeam-lmdb"], 3)["median"] < 1,
            "no scan on Redis": not {"scan", "keys"} & set(ran),
        },
    }


def time_of_listing(store, keys, listed):
    prefix = f"doc:{int.from_bytes(os.urandom(4), 'big') % (keys // listed):05}"
    begin = time.perf_counter()
    found = store.keys(prefix)
    elapsed = time.perf_counter() - begin
    if len(found) != listed:
        raise RuntimeError(f"{len(found)} keys were listed, and not {listed}")
    return elapsed * 1e3


def fill(store, keys, name, **options):
    for first in range(0, keys, BATCH):
        batch = range(first, min(first + BATCH, keys))
        store.set_multi({name(number): number for number in batch}, **options)


def cache_bound(inserts, size=64 * 2**20, value_bytes=1536):
    """Insert far more than a cache holds; return the largest size its file ever had."""
    value = os.urandom(value_bytes)
    largest = 0
    with tempfile.TemporaryDirectory(prefix="hb-bench-") as directory:
        path = Path(directory, "store", "cache.lmdb")
        store = open_store(f"lmdb://{directory}/store", cache_size=size)
        with contextlib.closing(store):
            cache = store.space("cache")
            begin = time.perf_counter()
            for number in range(inserts):
                cache.set(f"entry:{number}", value)
                if number % 10_000 == 0:
                    largest = max(largest, on_disk(path))
                if number % 500_000 == 0:
                    note(f"cache: {number} of {inserts} inserts")
            elapsed = time.perf_counter() - begin
            usage = cache.backend.keyspace("cache").usage()
            largest = max(largest, on_disk(path))
    return {
        "inserts": inserts,
        "value_bytes": value_bytes,
        "cache_size": size,
        "largest_file": largest,
        "entries_left": usage.entries,
        "evictions": usage.evictions,
        "microseconds_per_insert": round(elapsed / inserts * 1e6, 1),
        "targets": {"the file stays within its bound": largest <= size},
    }


def on_disk(path):
    status = path.stat()
    return max(status.st_size, status.st_blocks * 512)


def expiring(keys=1_000_000, ttl=20.0):
    """Store keys that expire and are never listed; return what they leave on Redis."""
    with contextlib.ExitStack() as stack:
        _, socket = stack.enter_context(redis_server())
        store = stack.enter_context(contextlib.closing(open_store(f"unix://{socket}", timeout=10)))
        admin = stack.enter_context(redis.Redis(unix_socket_path=str(socket)))
        before = admin.info("memory")["used_memory"]
        note(f"Redis: storing {keys} keys that expire")
        fill(store, keys, lambda number: f"rl:{number}", ttl=ttl)
        at_most = admin.dbsize()
        peak = admin.info("memory")["used_memory"]
        deadline = time.monotonic() + ttl + 60
        while admin.dbsize() and time.monotonic() < deadline:
            time.sleep(0.5)
        left = admin.dbsize()
        after = admin.info("memory")["used_memory"]
    return {
        "keys": keys,
        "ttl_seconds": ttl,
        "redis_keys_at_most": at_most,
        "redis_keys_left": left,
        "megabytes": {
            "before": round(before / 1e6, 1),
            "peak": round(peak / 1e6, 1),
            "after": round(after / 1e6, 1),
        },
        "targets": {"nothing is left": left == 0},
    }
