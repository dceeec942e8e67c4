"""Nodes for tests, in processes of their own.

Run as a program it is a node: its arguments are its name and options of `serve_node` as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from child_processes import stop

from hornbeam_state import (
    NodeDown,
    Overloaded,
    arpc_call,
    call,
    expose,
    node,
    rpc_call,
    serve_node,
    traceparent,
)
from hornbeam_state.rpc.server import own_nodes

PATIENCE_MS = 30_000
MODULE = "work"
ran: list[str] = []  # on the node: what ran, in that order


def wait_for_file(path):
    beginning(path).touch()
    while not Path(path).exists():
        time.sleep(0.005)


def beginning(path):
    """Return the file that says that something waits for this one."""
    return Path(f"{path}.began")


def work(fn):
    return expose(fn, module=MODULE, idempotent=fn.__name__ == "echo")


@work
def echo(*args, **kwargs):
    return [*args, kwargs] if kwargs else args[0] if len(args) == 1 else list(args)


@work
async def aecho(value):
    return value


@work
def pid():
    return os.getpid()


@work
def note(label):
    ran.append(label)


@work
def append(path, label):
    """Note what runs where it outlives the node."""
    with Path(path).open("a") as file:
        file.write(f"{label}\n")


@work
def told():
    return list(ran)


@work
def stop_until(path):
    """Keep a thread until there is such a file; a file beside it says that this has begun."""
    ran.append(f"began {Path(path).name}")
    wait_for_file(path)
    ran.append(f"ended {Path(path).name}")
    return "done"


@work
async def astop_until(path):
    ran.append(f"began {Path(path).name}")
    try:
        await asyncio.to_thread(wait_for_file, path)
    except asyncio.CancelledError:
        ran.append(f"cancelled {Path(path).name}")
        raise
    return "done"


class Own(Exception):
    """An error that no caller knows."""


ERRORS = {
    "value": lambda: ValueError("wrong"),
    "timeout": lambda: TimeoutError("its own"),
    "own": lambda: Own("mine"),
    "stop": lambda: StopIteration("over"),
    "exit": lambda: SystemExit(3),
    "cancelled": lambda: asyncio.CancelledError("not yours"),
    "overloaded": lambda: Overloaded("its queue"),
    "down": lambda: NodeDown("a third node"),
}


def make_error(kind):
    return ERRORS[kind]()


@work
def fail(kind):
    raise make_error(kind)


@work
async def afail(kind):
    raise make_error(kind)


@work
def fail_at_another(name):
    return rpc_call(name, MODULE, "echo", [1])


@work
def count(number, fail_at=None):
    try:
        for each in range(number):
            if each == fail_at:
                raise ValueError("half way")
            yield each
    finally:
        ran.append("generator closed")


@work
async def acount(number, fail_at=None, pause=0):
    try:
        for each in range(number):
            if each == fail_at:
                raise ValueError("half way")
            await asyncio.sleep(pause)
            yield each
    finally:
        ran.append("generator closed")


@work
def descend(levels):
    """Call this node from within a call to it."""
    return 0 if levels == 0 else 1 + rpc_call(node(), MODULE, "descend", [levels - 1])


@work
async def adescend(levels):
    if levels == 0:
        return 0
    return 1 + await arpc_call(node(), MODULE, "adescend", [levels - 1])


@work
async def wait_for_oneself():
    return rpc_call(node(), MODULE, "aecho", [1])


@work
def trace():
    return traceparent.get()


@work
def trace_twice():
    return call(f"{MODULE}.trace")


@work
def load():
    """Return how many calls run, and how many wait."""
    (served,) = own_nodes()
    return served.running, served.queued


@work
def unsendable():
    return object()


@work
def threads():
    import threading

    return threading.active_count()


class Model:
    """A serving: it answers with what it is asked, or as it is told to."""

    async def answer(self, request):
        (item, *_) = request.values
        if request.method == "raise":
            raise make_error(item)
        if request.method == "wait":
            ran.append("began to wait")
            await asyncio.to_thread(wait_for_file, item)
        return [*request.values, request.target, request.method, traceparent.get()]

    async def answer_stream(self, request):
        for step in range(3):
            yield [*request.values, step]


class Models:
    """The servings of a node."""

    def __init__(self, names) -> None:
        self._names = names

    def names(self):
        return dict.fromkeys(self._names, True)

    def find(self, name):
        return Model() if name in self._names else None


class NodeProcess:
    """A node in a process of its own, for the length of a block. It is patient with its store."""

    program = __file__

    def __init__(self, url, name="gpu", *, environ=(), wait=True, **options) -> None:
        self._child = subprocess.Popen(
            [sys.executable, self.program, name, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "HORNBEAM_STORE": f"{url}?timeout=10", **dict(environ)},
        )
        self.pid = self._child.pid
        self.said = ""
        if wait:
            self.await_ready()

    def await_ready(self):
        """Wait until it serves; its name is what it says."""
        self.said = self._child.stdout.readline().decode().strip()
        assert self.said.startswith("serves "), self.said
        return self

    def await_refusal(self):
        """Wait until it has said why it does not serve."""
        self.said = self._child.stdout.readline().decode().strip()
        assert self._child.wait(30) == 1
        return self.said

    @property
    def name(self):
        return self.said.removeprefix("serves ")

    def call(self, function, *args, timeout_ms=PATIENCE_MS, **kwargs):
        return rpc_call(self.name, MODULE, function, args, kwargs, timeout_ms=timeout_ms)

    def signal(self, number):
        if number == signal.SIGSTOP:
            stop(self.pid)
        else:
            os.kill(self.pid, number)

    def kill(self):
        self._child.kill()
        self._child.wait()

    def close(self, drain=10.0):
        """Have it close by itself; returns at once."""
        self._child.stdin.write(f"{drain}\n".encode())
        self._child.stdin.flush()

    def wait(self):
        return self._child.wait(30)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._child.poll() is None:
            self.signal(signal.SIGCONT)
            self.kill()
        self._child.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()


def main() -> None:
    try:
        options = json.loads(sys.argv[2])
        if "servings" in options:
            options["servings"] = Models(options["servings"])
        served = serve_node(sys.argv[1], **options)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        sys.exit(1)
    print(f"serves {served.name}", flush=True)
    served.close(float(sys.stdin.readline() or 0))


if __name__ == "__main__":
    main()
