"""A process of a host: it serves nodes and makes calls, as it is told.

Each line of its input is an order, as JSON, each line of its output what came of one. It ends with
its input.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

import exposed_work
import skewed_clock  # noqa: F401 - before the calls are made

import hornbeam_state as hs
from hornbeam_state.rpc import carriers, places

MODULE = exposed_work.MODULE


def pretend_to_be(host: str) -> None:
    """Have this process take every other one, but those of the same host, to be elsewhere."""
    socket.gethostname = lambda: host
    for module in (places, carriers):
        module.place = lambda: f"host {host}"


class Orders:
    """What it can be told to do."""

    def __init__(self) -> None:
        self._served: list[hs.NodeServer] = []
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._loads_on = True

    def begin(self, number: int, order: str, words: list) -> None:
        """Carry out an order, and say what came of it."""
        self._tasks[number] = asyncio.ensure_future(self._run(number, order, words))

    async def _run(self, number: int, order: str, words: list) -> None:
        began = time.monotonic()
        told = {"value": None, "error": None, "message": "", "sent": None}
        try:
            told["value"] = await getattr(self, order)(*words)
        except BaseException as error:
            told |= {"error": type(error).__name__, "message": str(error)}
            told["sent"] = getattr(error, "sent", None)
        told |= {"number": number, "took": time.monotonic() - began}
        del self._tasks[number]
        os.write(sys.stdout.fileno(), json.dumps(told).encode() + b"\n")

    async def serve(self, name, options):
        self._served.append(await hs.aserve_node(name, **options))
        return self._served[-1].name

    async def call(self, node, function, args, timeout_ms):
        module, _, name = function.rpartition(".")
        return await hs.arpc_call(node, module or MODULE, name, args, timeout_ms=timeout_ms)

    async def send(self, node, label, number, timeout_ms):
        """Call with so many bytes."""
        args = [label, bytes(number)]
        return await hs.arpc_call(node, MODULE, "size", args, timeout_ms=timeout_ms)

    async def cast(self, node, function, args):
        await hs.arpc_cast(node, MODULE, function, args)

    async def stream(self, node, function, args, timeout_ms):
        chunks = hs.arpc_stream(node, MODULE, function, args, timeout_ms=timeout_ms)
        return [chunk async for chunk in chunks]

    async def nodes(self):
        return await hs.anodes()

    async def cancel(self, number):
        task = self._tasks.get(number)
        return task is not None and task.cancel()

    async def load(self, node, label, callers, timeout_ms):
        """Call all the time, from so many tasks, until `end_loads`; return what came of each."""
        ends: dict[str, list] = {}

        async def call(caller: int) -> None:
            number = 0
            while self._loads_on:
                one, number = f"{label}-{caller}-{number}", number + 1
                ends[one] = await outcome(node, "note", [one], timeout_ms)
                if ends[one][0] != "done":
                    await asyncio.sleep(0.02)

        await asyncio.gather(*map(call, range(callers)))
        return ends

    async def end_loads(self):
        self._loads_on = False

    async def storm(self, node, label, number, seconds, timeout_ms):
        """Make so many calls at once; return what came of each, and the memory it took at most."""
        before = most_memory()
        labels = [f"{label}-{each}" for each in range(number)]
        ends = await asyncio.gather(
            *(outcome(node, "ahold", [each, seconds], timeout_ms) for each in labels)
        )
        return {
            "ends": dict(zip(labels, ends, strict=True)),
            "bytes": most_memory() - before,
        }

    async def memory(self):
        return most_memory()


async def outcome(node, function, args, timeout_ms) -> list:
    """Return how a call ended (``done``, or the error's name), whether it was sent, and when."""
    began = time.monotonic()
    try:
        value = await hs.arpc_call(node, MODULE, function, args, timeout_ms=timeout_ms)
    except hs.HornbeamError as error:
        end = [type(error).__name__, getattr(error, "sent", None)]
    else:
        end = ["done" if value == args[0] else "wrong", True]
    return [*end, time.monotonic() - began]


def most_memory() -> int:
    """Return the most bytes of memory that this process has had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise LookupError("VmHWM")


async def main() -> None:
    if host := os.environ.get("CHAOS_HOST"):
        pretend_to_be(host)
    orders, loop, ended = Orders(), asyncio.get_running_loop(), asyncio.Event()

    def listen() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(orders.begin, *json.loads(line))
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=listen, daemon=True).start()
    await ended.wait()
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main())
