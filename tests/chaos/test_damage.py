"""Damaged files of an embedded store: refused by name or begun anew, never a crash."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from pathlib import Path

import pytest
from processes import Child, Gate, wait_until

from hornbeam_state import HornbeamError, StoreUnavailable, open_store

pytestmark = pytest.mark.slow

PLACES = 16
"""How many offsets of each file are tried, the first byte among them."""

COUNTERS = {f"n/{number:03}": 1_000_000 + number for number in range(200)}


def make_store(note, url: str, gate: Gate | None) -> None:
    """Write counters and values; keep the store open until the gate is."""
    store = open_store(url)
    for key, number in COUNTERS.items():
        store.incr(key, number)
    store.set_multi({f"soon/{number:03}": number for number in range(100)}, ttl=1000)
    for space in (store, store.space("cache")):
        space.set_multi({f"value/{number:03}": bytes(number * 20) for number in range(100)})
        for number in range(0, 100, 3):
            space.delete(f"value/{number:03}")
    note("written")
    if gate is not None:
        gate.wait()


def use(_note, url: str) -> dict:
    """Open the store and use it in every way; tell what was wrong, other than errors of ours."""
    store = open_store(url)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            store.check()
        except StoreUnavailable as error:
            return {"refused": str(error)}
    wrong, failed = 0, 0
    for key, number in COUNTERS.items():
        try:
            wrong += store.incr(key) != number + 1
        except HornbeamError:
            failed += 1
    for space in (store, store.space("cache")):
        for call, *args in (
            (space.keys,),
            (lambda space=space: space.get_multi(space.keys()),),
            (space.set, "new", bytes(9000)),
            (space.delete, "value/050"),
            (space.clear, "value/"),
        ):
            try:
                call(*args)
            except HornbeamError:
                failed += 1
    cached = len(store.space("cache").keys())
    return {
        "wrong": wrong,
        "failed": failed,
        "said": [str(one.message) for one in said],
        "cached": cached,
    }


def damage(path: Path, how: str, offset: int, dice: random.Random) -> None:
    """Damage a file in place, as LMDB has it mapped."""
    left = path.stat().st_size - offset
    with path.open("r+b", buffering=0) as file:
        if how == "truncated":
            file.truncate(offset)
            return
        file.seek(offset)
        size = min(left, dice.choice([64, 512, 4096, 20_000]))
        file.write(bytes(size) if how == "zeroed" else dice.randbytes(size))


@pytest.mark.parametrize("in_use", [False, True], ids=["closed", "open-elsewhere"])
@pytest.mark.parametrize("how", ["truncated", "zeroed", "random"])
@pytest.mark.parametrize("name", ["state.lmdb", "cache.lmdb"])
def test_a_damaged_file_is_refused_or_begun_anew(tmp_path, name, how, in_use, tell):
    """Whatever is damaged where: no crash, no counter that is silently wrong."""
    dice, total = random.Random(f"{name} {how}"), Counter()
    for turn in range(PLACES):
        path = tmp_path / f"store-{turn}" / name
        url = f"lmdb://{path.parent}"
        gate = Gate()
        holder = Child(make_store, url, gate)
        wait_until(holder.notes, "the store is written")
        if not in_use:
            gate.open()
            holder.value()
        damage(path, how, dice.randrange(path.stat().st_size) if turn else 0, dice)
        found = Child(use, url).value()  # no other end than its own
        if "refused" in found:
            assert str(path) in found["refused"]
            assert in_use or name == "state.lmdb", "a cache is never refused, it starts empty"
            total["refused"] += 1
        else:
            assert found["wrong"] == 0
            total["begun anew" if found["said"] else "no harm"] += 1
            total["operations that failed"] += found["failed"]
            assert all(str(path) in text and "starts empty" in text for text in found["said"])
        if in_use:
            # Its own pages are gone under it: how that process ends is not our concern.
            gate.open()
            holder.outcome()
        gate.close()
    assert total["refused"] + total["begun anew"] + total["no harm"] == PLACES
    assert total["refused"] + total["begun anew"] >= 3
    tell(dict(sorted(total.items())))


@pytest.mark.parametrize("name", ["state.lmdb", "cache.lmdb"])
def test_a_file_that_was_removed_while_in_use_is_not_made_anew(tmp_path, name):
    """Two processes would count on two files."""
    url = f"lmdb://{tmp_path}/store"
    gate = Gate()
    holder = Child(make_store, url, gate)
    wait_until(holder.notes, "the store is written")
    (tmp_path / "store" / name).unlink()
    assert "missing" in Child(use, url).value()["refused"]
    gate.open()
    holder.value()
    gate.close()
