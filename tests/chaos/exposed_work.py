"""What the nodes of the chaos tests expose. Each run is a line of a file that survives the node."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

from hornbeam_state import expose

MODULE = "work"


def work(fn):
    return expose(fn, module=MODULE)


def write(text: str) -> None:
    """Note a run, in one piece and whatever happens after."""
    file = os.open(os.environ["CHAOS_RAN"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, f"{text}\n".encode())
    finally:
        os.close(file)


@work
def note(label):
    write(label)
    return label


@work
def hold(label, seconds):
    write(label)
    time.sleep(seconds)
    write(f"{label} done")
    return label


@work
def hold_until(label, path):
    """Run until there is a file of that name."""
    write(label)
    while not Path(path).exists():
        time.sleep(0.01)
    return label


@work
async def ahold(label, seconds):
    write(label)
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        write(f"{label} cancelled")
        raise
    write(f"{label} done")
    return label


@work
async def count(label, number, pause):
    write(label)
    for each in range(number):
        yield each
        await asyncio.sleep(pause)


@work
def size(label, value):
    write(label)
    return len(value)


@work
def has_imported(module):
    return module in sys.modules


@work
def clock():
    return time.time()


@work
def process_id():
    return os.getpid()
