"""Nodes for tests of batches, in processes of their own. Run as a program it is such a node.

`ITEM_MS` in its environment is how long an item takes; `FILES` a directory for what functions
leave behind.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import numpy as np
from node_processes import NodeProcess, main, wait_for_file

from hornbeam_state import Overloaded, expose

MODULE = "ml_worker"


class PredictionNode(NodeProcess):
    program = __file__

    def __init__(self, url, name, *, files, wait=True, **environ) -> None:
        # Its imports lie in both directories of helpers.
        path = os.pathsep.join(part for part in sys.path if part)
        environ = {"PYTHONPATH": path, "FILES": str(files), **environ}
        super().__init__(url, name, environ=environ, wait=wait)


def predicts(fn):
    return expose(fn, module=MODULE)


def files():
    return Path(os.environ["FILES"])


def is_first(label):
    """Return whether no process has come here before; notes which one did."""
    try:
        with (files() / label).open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return False
    return True


@predicts
def predict(items):
    time.sleep(len(items) * float(os.environ.get("ITEM_MS", "0")) / 1000)
    return [f"{item}!" for item in items]


@predicts
def predict_or_hang(items):
    """Hang, on the first node that comes here with the item "text 5000"."""
    if "text 5000" in items and is_first("hangs"):
        time.sleep(600)
    time.sleep(len(items) * 0.0001)
    return [f"{item}!" for item in items]


@predicts
def wait_for_gate(items):
    """Wait, on the first node that comes here with the first item, for a file of its name."""
    if is_first(f"waits {items[0]}"):
        wait_for_file(files() / items[0])
    return [f"{item}!" for item in items]


@predicts
def twice(items):
    return np.asarray(items) * 2


@predicts
def kinds(items):
    return [type(items).__name__] * len(items)


@predicts
def pids(items):
    return [os.getpid()] * len(items)


@predicts
def fail(items):
    with (files() / "failed").open("a") as file:
        file.write("x")
    raise ValueError("wrong items")


@predicts
def full(items):
    raise Overloaded("no room")


@predicts
def too_few(items):
    return list(items)[1:]


@predicts
def one_text(items):
    return "x" * len(items)


@predicts
async def until_cancelled(items):
    (files() / "began").touch()
    try:
        await asyncio.sleep(600)
    except asyncio.CancelledError:
        (files() / "cancelled").touch()
        raise


if __name__ == "__main__":
    main()
