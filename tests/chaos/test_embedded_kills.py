"""Writers of an embedded store that are killed, and processes that come and go."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter

import pytest
from processes import Child
from values import is_whole, sealed

from hornbeam_state import MISSING, open_store

pytestmark = pytest.mark.slow

ROUNDS = 50
WRITERS = 4


def write_until_told(note, url: str, name: str, seed: int) -> None:
    """Write all kinds of things; note a step before it is asked for, and again once it is done."""
    dice = random.Random(seed)
    store = open_store(url, timeout=30)
    cache = store.space("cache")

    def step(kind: str, act, *args) -> None:
        note(f"? {kind}")
        done = act(*args)
        note(f"{'!' if done is not False else '-'} {kind}")

    def compare_and_set() -> bool:
        seen = store.get("cas", MISSING)
        return store.cas("cas", seen, 1 if seen is MISSING else seen + 1)

    while not store.get("stop"):
        step("incr", store.incr, "n")
        step("cas", compare_and_set)
        step("set", store.set, f"own/{name}", "present")
        store.set(f"value/{dice.randrange(30)}", sealed(dice, dice.randrange(1, 9000)))
        store.set(f"large/{dice.randrange(6)}", sealed(dice, dice.randrange(65_537, 300_000)))
        store.set(f"soon/{dice.randrange(100)}", 1, ttl=0.05)
        cache.set(f"value/{dice.randrange(300)}", sealed(dice, dice.randrange(1, 2000)))
        step("delete", store.delete, f"own/{name}")
        store.delete(f"large/{dice.randrange(6)}")


def look(_note, url: str) -> dict:
    """Open the store alone, which verifies its structure, and return what there is to check."""
    store = open_store(url)
    found = [
        value
        for space in (store, store.space("cache"))
        for prefix in ("value/", "large/")
        for value in space.get_multi(space.keys(prefix)).values()
    ]
    return {
        "n": store.get("n", 0),
        "cas": store.get("cas", 0),
        "own": [key.removeprefix("own/") for key in store.keys("own/")],
        "whole": sum(map(is_whole, found)),
        "torn": sum(not is_whole(value) for value in found),
        "slots": slots_in_use(store),
    }


def test_fifty_rounds_of_kills_tear_nothing(url, tell):
    """Some of four writers are killed at any moment, and all that was acknowledged is there."""
    dice = random.Random(5)
    acknowledged, unknown, seen = Counter(), Counter(), Counter()
    for turn in range(ROUNDS):
        writers = {
            f"{turn}-{number}": Child(
                write_until_told, url, f"{turn}-{number}", dice.randrange(10**9)
            )
            for number in range(WRITERS)
        }
        time.sleep(dice.uniform(0.1, 0.3))  # the scenario: killed somewhere in the middle
        doomed = dice.sample(sorted(writers), dice.randint(1, WRITERS))
        for name in doomed:
            writers[name].kill()
        store = open_store(url, timeout=30)
        store.set("stop", True)  # also: nobody waits for those who were killed
        for name in writers.keys() - set(doomed):
            writers[name].value()
        store.delete("stop")
        store.close()

        present = set()
        for name, writer in writers.items():
            notes = writer.notes()
            done = Counter(notes)
            pending = notes[-1][2:] if notes and notes[-1].startswith("?") else None
            assert pending is None or name in doomed
            acknowledged.update({kind: done[f"! {kind}"] for kind in ("incr", "cas", "set")})
            unknown[pending] += 1
            if done["! set"] > done["! delete"] and pending != "delete":
                present.add(name)
            elif pending is None:
                assert done["! set"] == done["! delete"]
        found = Child(look, url).value()
        assert acknowledged["incr"] <= found["n"] <= acknowledged["incr"] + unknown["incr"]
        assert acknowledged["cas"] <= found["cas"] <= acknowledged["cas"] + unknown["cas"]
        assert present <= set(found["own"])
        seen.update(whole=found["whole"], torn=found["torn"], killed=len(doomed))
        assert found["torn"] == 0
        assert found["slots"] <= 1, "killed processes keep their reader slots"
    assert acknowledged["incr"] > ROUNDS * WRITERS
    assert seen["whole"] > ROUNDS
    tell(
        f"{seen['killed']} of {ROUNDS * WRITERS} writers killed; increments: "
        f"{acknowledged['incr']} acknowledged, {found['n']} counted, {unknown['incr']} cut off; "
        f"cas: {acknowledged['cas']}, {found['cas']}, {unknown['cas']}; "
        f"{seen['whole']} values read back, none torn"
    )


PROCESSES = 1000


def live_shortly(note, url: str, end: str) -> None:
    """Open, count, note how long that took, and end in one of several ways."""
    started = time.monotonic()
    store = open_store(url, timeout=30)
    store.check()
    note(f"{time.monotonic() - started}")
    note("?")
    store.incr("n")
    note("!")
    if end == "close":
        store.close()
    elif end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif end == "killed within a read":
        with store.backend.keyspace("app")._transaction():
            os.kill(os.getpid(), signal.SIGKILL)
    elif end == "killed within a write":
        store.backend.keyspace("app")._write(lambda _txn: os.kill(os.getpid(), signal.SIGKILL))
    elif end == "killed anywhere":
        threading.Timer(random.random() * 0.01, os.kill, (os.getpid(), signal.SIGKILL)).start()
        while True:
            note("?")
            store.incr("n")
            note("!")


ENDS = (
    "exit",
    "close",
    "killed",
    "killed within a read",
    "killed within a write",
    "killed anywhere",
)


def test_a_thousand_processes_come_and_go(url, tell):
    """In turn and four at a time: counts are exact, slots are given back, opening stays quick."""
    dice = random.Random(3)
    keeper = open_store(url, timeout=30)  # stays, as a server would: nobody after it is alone
    keeper.check()
    acknowledged = unknown = most_slots = 0
    opening, ends = [], Counter()
    while len(opening) < PROCESSES:
        together = dice.choice([1, 1, 1, 4])
        chosen = [dice.choice(ENDS) for _ in range(together)]
        children = [Child(live_shortly, url, end) for end in chosen]
        for child, end in zip(children, chosen, strict=True):
            outcome = child.outcome()
            assert outcome.error is None
            assert outcome.code == (-signal.SIGKILL if "killed" in end else 0), end
            first, *notes = child.notes()
            opening.append(float(first))
            acknowledged += notes.count("!")
            unknown += notes.count("?") - notes.count("!")
            child.close()
            ends[end] += 1
        most_slots = max(most_slots, slots_in_use(keeper))
    keeper.backend.opened().forget_dead_readers()
    counted, slots = keeper.get("n"), slots_in_use(keeper)
    keeper.close()
    assert acknowledged <= counted <= acknowledged + unknown
    assert unknown <= ends["killed anywhere"]
    assert most_slots < 100
    assert slots <= 1
    first, last = (sorted(part)[len(part) // 2] for part in (opening[:100], opening[-100:]))
    assert last < 3 * first + 0.01
    tell(
        f"{len(opening)} processes; {acknowledged} increments acknowledged, {counted} counted; at "
        f"most {most_slots} reader slots, {slots} at the end; opening took {first * 1000:.1f} ms "
        f"at first and {last * 1000:.1f} ms at last"
    )


def slots_in_use(store) -> int:
    readers = store.backend.opened().state.environment.readers()
    return sum(line.split()[0].isdigit() for line in readers.splitlines())
