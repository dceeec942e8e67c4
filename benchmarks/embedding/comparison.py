"""The load on every contender in turns, and what the figures of a round say about each other."""

from __future__ import annotations

import contextlib
import resource
import statistics
import time
from typing import TYPE_CHECKING, Any

from common import busy_seconds, note, rotated, summary
from embedding import accuracy, processes
from embedding.load import post_texts
from embedding.servers import Bench, Failed, Server, running

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np
    from embedding.contenders import Contender, Settings

WARM_UP_CONNECTIONS = 32
Turn = dict[str, Any]


class Seeds:
    """Numbers that never come again in a run, so that neither does a text."""

    def __init__(self) -> None:
        self.last = 0

    def next(self) -> int:
        self.last += 1
        return self.last


class Comparison:
    """Runs of contenders, each under each number of connections, in rounds."""

    def __init__(self, bench: Bench, args: argparse.Namespace, folder: Path) -> None:
        self.bench = bench
        self.args = args
        self.folder = folder
        self.seeds = Seeds()
        self.turns: dict[str, list[Turn]] = {}
        self.cosines: dict[str, float] = {}
        self.failures: dict[str, str] = {}
        self.expected: np.ndarray | None = None

    def run(self, entries: dict[str, tuple[Contender, Settings]]) -> None:
        """Measure what has a name here, one round after the other, one at a time.

        One that fails is not tried again, and the others go on.
        """
        if self.args.check:
            self.expected = accuracy.reference(self.folder)
        for number in range(self.args.rounds):
            for name in rotated(list(entries), number):
                if name in self.failures:
                    continue
                note(f"round {number + 1} of {self.args.rounds}: {name}")
                try:
                    self.measure(name, *entries[name], number)
                except (Failed, RuntimeError) as error:
                    self.failures[name] = str(error)
                    note(f"{name} failed: {error}")

    def measure(self, name: str, contender: Contender, settings: Settings, number: int) -> None:
        """Start a contender, load it with each number of connections, stop it."""
        with running(self.bench, contender, settings) as server:
            self.post(server, WARM_UP_CONNECTIONS, self.args.warm_up)
            for connections in self.args.connections:
                wait_until_idle(server)
                turn = self.observed(server, connections)
                self.turns.setdefault(name, []).append({"round": number, **turn})
                note("  " + told(turn))
            if self.expected is not None and name not in self.cosines:
                wait_until_idle(server)
                self.cosines[name] = accuracy.least_cosine(server, self.expected)

    def post(self, server: Server, connections: int, seconds: float) -> Turn:
        return post_texts(
            server.url,
            server.contender.body,
            connections=connections,
            seconds=seconds,
            seed=self.seeds.next(),
            folder=self.folder,
        )

    def observed(self, server: Server, connections: int) -> Turn:
        """Load a server; again while other programs kept the cores too busy, some times."""
        for _ in range(1 + self.args.again):
            before, used = used_by_others(server), processes.cpu_seconds(server.pid)
            turn = self.post(server, connections, self.args.seconds)
            turn["others"] = (used_by_others(server) - before) / turn["seconds"]
            turn["cores"] = (processes.cpu_seconds(server.pid) - used) / turn["seconds"]
            if turn["others"] <= self.args.others:
                break
        return {**turn, "connections": connections, "rss_mib": processes.resident_mib(server.pid)}

    def valid(self, name: str, connections: int) -> list[Turn]:
        """Return the runs in which every answer was one."""
        turns = self.turns.get(name, ())
        return [turn for turn in turns if turn["connections"] == connections and not turn["errors"]]

    def results(self, name: str) -> dict[str, Any]:
        """Return the figures of a contender, by number of connections."""
        by_connections = {}
        for connections in self.args.connections:
            turns = self.valid(name, connections)
            invalid = [
                {"round": turn["round"], **{kind: turn[kind] for kind in ERRORS if turn[kind]}}
                for turn in self.turns.get(name, ())
                if turn["connections"] == connections and turn["errors"]
            ]
            figures: dict[str, Any] = {"invalid_rounds": invalid}
            if turns:
                for key, digits in FIGURES.items():
                    figures[key] = summary([turn[key] for turn in turns], digits)
            by_connections[str(connections)] = figures
        return by_connections

    def median(self, name: str, connections: int, key: str = "per_second") -> float:
        """Return the median of its valid rounds; nothing is worse than having none."""
        turns = self.valid(name, connections)
        return statistics.median(turn[key] for turn in turns) if turns else 0.0

    def ratio(
        self, one: str, other: str, connections: int, key: str = "per_second"
    ) -> dict[str, Any] | None:
        """Compare runs of the same round: the machine may be faster in one than in another."""
        others = {turn["round"]: turn[key] for turn in self.valid(other, connections)}
        pairs = [
            turn[key] / others[turn["round"]]
            for turn in self.valid(one, connections)
            if turn["round"] in others
        ]
        return summary(pairs, 3) if pairs else None


ERRORS = ("socket_errors", "not_200", "wrong")
FIGURES = {"per_second": 1, "p50_ms": 2, "p99_ms": 2, "cores": 2, "others": 2, "rss_mib": 0}


def told(turn: Turn) -> str:
    return (
        f"{turn['connections']} connections: {turn['per_second']:.1f} a second, "
        f"p50 {turn['p50_ms']:.1f} ms, p99 {turn['p99_ms']:.1f} ms, {turn['errors']} errors, "
        f"{turn['cores']:.2f} cores used, {turn['others']:.2f} by other programs"
    )


def wait_until_idle(server: Server, seconds: float = 60.0) -> None:
    """Wait until a server has finished what an ended load left in its queues."""
    deadline = time.monotonic() + seconds
    used = processes.cpu_seconds(server.pid)
    while time.monotonic() < deadline:
        time.sleep(0.5)
        now = processes.cpu_seconds(server.pid)
        if now - used < 0.1:
            return
        used = now


def used_by_others(server: Server) -> float:
    """Return the CPU seconds used by whatever is neither this server nor the load generator."""
    ours = resource.getrusage(resource.RUSAGE_CHILDREN)  # wrk, once it has ended
    me = resource.getrusage(resource.RUSAGE_SELF)
    mine = ours.ru_utime + ours.ru_stime + me.ru_utime + me.ru_stime
    return busy_seconds() - processes.cpu_seconds(server.pid) - mine


def ratios(comparison: Comparison, names: list[tuple[str, Contender]]) -> dict[str, Any]:
    """Compare ours to the best peer of its engine, to the best of all and to the plain app."""
    peers = [(name, each) for name, each in names if not each.ours]
    compared: dict[str, Any] = {}
    for connections in comparison.args.connections:
        found = compared.setdefault(str(connections), {})
        for name, contender in names:
            if not contender.ours:
                continue
            for label, other in rivals(comparison, contender, peers, connections).items():
                found[f"{name} / {label} ({other})"] = {
                    "per_second": comparison.ratio(name, other, connections),
                    "p99": comparison.ratio(name, other, connections, "p99_ms"),
                }
    return compared


def rivals(
    comparison: Comparison,
    ours: Contender,
    peers: list[tuple[str, Contender]],
    connections: int,
) -> dict[str, str]:
    """Return whom to compare with, by why."""

    def best(names: list[str]) -> Iterator[str]:
        measured = [name for name in names if comparison.median(name, connections)]
        with contextlib.suppress(ValueError):
            yield max(measured, key=lambda name: comparison.median(name, connections))

    same = [name for name, each in peers if each.engine == ours.engine]
    wanted = {
        f"best {ours.engine} peer": best(same),
        "best peer": best([name for name, _ in peers]),
        "plain": best([name for name, each in peers if each.app == "plain"]),
    }
    return {label: name for label, found in wanted.items() for name in found}
