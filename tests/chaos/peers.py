"""Processes of hosts, as tests see them: told what to do, stopped, killed, and read after."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

from child_processes import stop
from processes import wait_until

PATIENCE_S = 60.0
LONG_MS = 30_000
_PROGRAM = Path(__file__).with_name("peer_program.py")


class Peer:
    """A process that serves nodes and makes calls.

    Args:
        url: The store.
        directory: Where it notes what it runs and what it logs, as all peers of a test do.
        name: What its files are called.
        within: The words of a command that runs it elsewhere.
        host: Which machine it pretends to be on.
        ahead: Seconds by which its clock is wrong.
        secret: What it signs its messages with.
    """

    def __init__(
        self, url, directory: Path, name: str, *, within=(), host="", ahead=0.0, secret=""
    ) -> None:
        self._log = directory / f"{name}.log"
        environ = {
            **os.environ,
            "HORNBEAM_STORE": url,
            "HORNBEAM_SECRET": secret,
            "CHAOS_HOST": host,
            "CHAOS_AHEAD_S": str(ahead),
            "CHAOS_RAN": str(directory / "ran"),
        }
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                [*within, sys.executable, str(_PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environ,
            )
        self.pid = self._child.pid
        self.node = ""
        self._numbers = itertools.count()
        self._futures: dict[int, Future] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def begin(self, order: str, *words) -> Future:
        """Tell it what to do; the future is of what comes of it.

        That has ``value``, ``error`` (the name of a class, or None), ``message``, ``sent`` and
        ``took`` (seconds).
        """
        number, future = next(self._numbers), Future()
        future.number = number
        self._futures[number] = future
        self._child.stdin.write(json.dumps([number, order, words]).encode() + b"\n")
        self._child.stdin.flush()
        return future

    def outcome(self, order: str, *words) -> SimpleNamespace:
        """Tell it what to do, and wait."""
        return self.begin(order, *words).result(PATIENCE_S)

    def do(self, order: str, *words):
        """Tell it what to do, and return the value; an error is a failure."""
        done = self.outcome(order, *words)
        assert done.error is None, f"{order}: {done.error}: {done.message}"
        return done.value

    def serve(self, name: str, **options) -> str:
        """Make it a node; return the full name."""
        self.node = self.do("serve", name, options)
        return self.node

    def call(self, node: str, function: str, *args, timeout_ms=LONG_MS):
        return self.do("call", node, function, args, timeout_ms)

    def begin_call(self, node: str, function: str, *args, timeout_ms=LONG_MS) -> Future:
        return self.begin("call", node, function, args, timeout_ms)

    def cast(self, node: str, function: str, *args) -> None:
        self.do("cast", node, function, args)

    def reaches(self, node: str) -> bool:
        """Return whether it sees a node, and gets an answer."""
        return (
            node in (self.outcome("nodes").value or ())
            and self.outcome("call", node, "clock", [], 1000).error is None
        )

    def log(self) -> str:
        return self._log.read_text()

    def stop(self) -> None:
        """Stop it, and wait until it stands still."""
        stop(self.pid)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()
        self._reader.join()

    def close(self) -> None:
        """End it, whatever it does."""
        self.kill()
        self._child.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()

    def _read(self) -> None:
        for line in self._child.stdout:
            told = SimpleNamespace(**json.loads(line))
            self._futures.pop(told.number).set_result(told)
        while self._futures:
            _, future = self._futures.popitem()
            future.set_exception(EOFError("the process ended"))


class Runs:
    """What the nodes of a test ran, however they ended."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "ran"
        self._file.touch()

    def all(self) -> list[str]:
        return self._file.read_text().splitlines()

    def count(self, label: str) -> int:
        return self.all().count(label)

    def wait_for(self, label: str, seconds: float = 30.0) -> None:
        wait_until(lambda: self.count(label), f"there is {label!r}", seconds)

    def check(self, ends: dict[str, list]) -> str:
        """Compare what callers were told of their calls with what ran."""
        ran = Counter(self.all())
        for label, (end, sent, _) in ends.items():
            assert end != "wrong", f"{label} got the answer to another call"
            assert ran[label] <= 1, f"{label} ran {ran[label]} times"
            if end == "done":
                assert ran[label] == 1, f"{label} was answered, and did not run"
            elif sent is False:
                assert ran[label] == 0, f"{label} ran, and its caller was told that it did not"
        told = Counter(end for end, _, _ in ends.values())
        longest = max(took for _, _, took in ends.values())
        return f"{dict(told)}; longest {longest:.2f} s"
