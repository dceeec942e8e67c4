"""An embedded store on a disk that is full: errors of ours, never a signal, never a torn store."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from processes import Child, Gate, wait_until
from values import is_whole, sealed

from hornbeam_state import StoreFull, StoreUnavailable, open_store

pytestmark = pytest.mark.slow

FULL = (StoreFull, StoreUnavailable)


def fill_rest(disk: Path, *, leave: int = 0) -> None:
    """Take what is left of the disk, but for `leave` bytes."""
    with (disk / "ballast").open("ab", buffering=0) as file:
        for size in (65_536, 4096):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
        file.truncate(file.seek(0, os.SEEK_END) - leave)


def attempt(counts: Counter, call, *args, **options) -> bool:
    """Make a call that may find the disk full; count how it went."""
    try:
        call(*args, **options)
    except FULL as error:
        counts[f"{call.__name__} {type(error).__name__}"] += 1
        return False
    counts[f"{call.__name__} done"] += 1
    return True


def use_a_full_disk(_note, url: str, seed: int, seconds: float) -> dict:
    """Write all kinds of things, and read back whatever was written last."""
    dice, counts = random.Random(seed), Counter()
    store = open_store(url, timeout=10)
    cache = store.space("cache")
    increments, written, looked_at = 0, {}, 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        increments += attempt(counts, store.incr, "n")
        large = dice.random() < 0.3
        key = f"{seed}/{'large' if large else 'small'}/{dice.randrange(40)}"
        value = sealed(dice, dice.randrange(65_537, 200_000) if large else dice.randrange(1, 9000))
        if attempt(counts, store.set, key, value):
            written[key] = value
        attempt(counts, store.set, f"{seed}/soon", 1, ttl=0.01)
        attempt(counts, cache.add, key, sealed(dice, 3000))
        if dice.random() < 0.3 and attempt(counts, store.delete, key):
            written.pop(key, None)
        looked_at += 1
        assert store.get(key) == written.get(key), "a write that failed changed something"
        cached = cache.get(key)
        assert cached is None or is_whole(cached)
    return {"increments": increments, "counts": counts, "looked at": looked_at}


def tidy_up(_note, url: str) -> dict:
    """Read everything and delete half of it, while nobody else writes and the disk is full."""
    store = open_store(url)
    keys = [key for seed in range(4) for key in store.keys(f"{seed}/") if "soon" not in key]
    whole = [is_whole(value) for value in store.get_multi(keys).values()]
    deleted = [store.delete(key) for key in keys[::2]]
    return {
        "n": store.get("n"),
        "whole": sum(whole),
        "torn": len(whole) - sum(whole),
        "deleted": sum(deleted),
        "kept": len([key for key in keys if store.get(key) is not None]) - len(keys[1::2]),
    }


def go_on(_note, url: str) -> int:
    """Write as if nothing had been."""
    store = open_store(url)
    for number in range(20):
        store.set(f"again/{number}", bytes(100_000))
        store.set(f"again/small/{number}", bytes(5000))
        store.space("cache").set(f"{number}", bytes(5000))
    store.backend.opened().take_snapshot_if_changed()
    return store.incr("n")


@pytest.mark.parametrize("filled_by", ["the store", "others"])
def test_writers_fill_a_disk(small_disk, filled_by, tell):
    """Four of them get errors of ours, read on and delete; with room again, writes go on."""
    disk = small_disk("8m")
    url = f"lmdb://{disk}/store"
    writers = [Child(use_a_full_disk, url, seed, 4.0) for seed in range(4)]
    if filled_by == "others":
        wait_until(lambda: (disk / "store" / "state.blobs").is_dir(), "the store is there")
        time.sleep(0.5)  # the scenario: in the middle of their writes
    else:
        wait_until(lambda: os.statvfs(disk).f_bavail == 0, "the disk is full")
    fill_rest(disk)
    found = [writer.value() for writer in writers]
    counts = sum((Counter(one["counts"]) for one in found), Counter())
    increments = sum(one["increments"] for one in found)
    fill_rest(disk)
    tidied = Child(tidy_up, url).value()
    assert counts["set StoreFull"] > 50
    assert counts["incr done"] == increments == tidied["n"]
    assert (tidied["torn"], tidied["kept"]) == (0, 0)
    assert tidied["whole"] > 10
    assert tidied["deleted"] > 5
    (disk / "ballast").unlink()
    assert Child(go_on, url).value() == increments + 1
    tell(f"{dict(sorted(counts.items()))}; afterwards {tidied}")


def open_and_use(_note, url: str, gate: Gate | None = None) -> Counter:
    """Open a store and do one of each, as far as there is room for it."""
    counts = Counter()
    store = open_store(url, timeout=5)
    if gate is not None:
        gate.wait()
    if not attempt(counts, store.check):
        return counts
    for call, *args in (
        (store.incr, "n"),
        (store.set, "small", bytes(1000)),
        (store.set, "large", bytes(100_000)),
        (store.space("cache").add, "k", bytes(1000)),
        (store.backend.opened().take_snapshot_if_changed,),
        (store.keys,),
        (store.delete, "small"),
    ):
        attempt(counts, call, *args)
    store.get("n")
    with store.lock("l", timeout=5):
        return counts


@pytest.mark.parametrize("there", [False, True], ids=["new", "there-already"])
def test_a_store_is_opened_on_a_full_disk(small_disk, there, tell):
    """Whatever room is left, three who open it together get it, or an error of ours.

    LMDB writes to its table of readers, and hornbeam to a lock and a sketch, through memory maps:
    one page of them without room is a SIGBUS.
    """
    total = Counter()
    for leave in (*range(0, 100_000, 4096), *range(100_000, 500_000, 40_960), 1_150_000):
        disk = small_disk("3m")
        url = f"lmdb://{disk}/store"
        if there:
            Child(open_and_use, url).value()
        fill_rest(disk, leave=leave)
        gate = Gate()
        openers = [Child(open_and_use, url, gate) for _ in range(3)]
        gate.open()
        for opener in openers:
            total += Counter(opener.value())
        gate.close()
        (disk / "ballast").unlink()
        afterwards = Child(open_and_use, url).value()
        assert not [outcome for outcome in afterwards if not outcome.endswith("done")], leave
    assert total["check done"] > 5
    assert total["incr done"] > 5
    assert total["set StoreFull"] > 5
    tell(dict(sorted(total.items())))


def hold_readers(note, url: str, gate: Gate) -> None:
    """Take a reader slot and keep it."""
    store = open_store(url)
    with store.backend.keyspace("app")._transaction():
        note("reading")
        gate.wait()


def test_many_readers_come_to_a_full_disk(small_disk):
    """Each needs a slot of its own in LMDB's table, of which 64 lie on one page."""
    disk = small_disk("8m")
    url = f"lmdb://{disk}/store"
    Child(open_and_use, url).value()
    fill_rest(disk)
    gate = Gate()
    readers = [Child(hold_readers, url, gate) for _ in range(100)]
    for reader in readers:
        wait_until(lambda reader=reader: reader.notes() == ["reading"], "it reads")
    gate.open()
    for reader in readers:
        reader.value()
    gate.close()


def test_no_file_can_be_made(small_disk, tell):
    """A disk without inodes has no room for large values and snapshots, and for everything else."""
    disk = small_disk("8m", "nr_inodes=40")
    url = f"lmdb://{disk}/store"
    Child(open_and_use, url).value()
    taken = 0
    with contextlib.suppress(OSError):
        while True:
            (disk / f"ballast-{taken}").touch()
            taken += 1

    def use(_note) -> Counter:
        counts = Counter()
        store = open_store(url)
        if attempt(counts, store.check):
            pytest.fail("opening needs to make files")
        (disk / "ballast-0").unlink()
        store.check()
        (disk / "ballast-0").touch()
        store.incr("n")
        for call, *args in (
            (store.set, "large/2", bytes(100_000)),
            (store.backend.opened().take_snapshot_if_changed,),
        ):
            assert not attempt(counts, call, *args)
        assert store.incr("n") == 3
        assert store.delete("large")
        return counts

    tell(Child(use).value())
