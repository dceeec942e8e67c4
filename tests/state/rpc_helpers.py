"""Nodes for tests: on a loop in a thread, or in a process of their own.

Run as a program it serves a node: its arguments are the URL of the store, the name, and a file to
which it appends what it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from child_processes import stop
from transport_helpers import Answers, LoopThread

from hornbeam_state import Store, set_default_store
from hornbeam_state.backends.redis.backend import RedisBackend
from hornbeam_state.config import StoreConfig
from hornbeam_state.rpc.functions import default_caller
from hornbeam_state.transports.redis import RedisServer

NODE = "gpu@ml-1"
SECRET = "correct horse battery staple"


def a_backend(url, timeout=5.0) -> RedisBackend:
    return RedisBackend(StoreConfig.from_url(url, timeout=timeout))


@contextlib.contextmanager
def default_store_at(url, **options):
    """Make a store the default one for the length of a block; the channels over it end with it.

    It is patient with its server, unless the options say otherwise.
    """
    store = Store(StoreConfig.from_url(url, **{"timeout": 10.0, **options}))
    before = set_default_store(store)
    try:
        yield store
    finally:
        default_caller().close()
        set_default_store(before)
        store.close()


class NodeThread(LoopThread):
    """A node on an event loop in a thread of this process, for the length of a block."""

    def __init__(self, url, node=NODE, handler=None, **options) -> None:
        super().__init__()
        self.url = url
        self.handler = handler or Answers()
        self._node = node
        self._backend = a_backend(url)
        self._options = options

    def running(self):
        return self.server.running

    async def _start(self):
        self.server = RedisServer(self._backend, self._node, self.handler, **self._options)
        await self.server.start()

    async def _stop(self):
        await self.server.close()
        await self._backend.aclose()
        await self._loop.shutdown_asyncgens()
        await self._loop.shutdown_default_executor()


class NodeProcess:
    """A node in a process of its own; what it runs is in `ran`."""

    def __init__(self, url, file: Path, node=NODE) -> None:
        self._file = file
        file.touch()
        command = [sys.executable, __file__, url, node, str(file)]
        self._child = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._child.stdout.readline() == b"ready\n"

    def ran(self) -> list[str]:
        return self._file.read_text().split()

    def stop(self):
        stop(self._child.pid)

    def go_on(self):
        self._child.send_signal(signal.SIGCONT)

    def kill(self):
        self._child.kill()
        self._child.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self._child.stdout.close()


class Noting:
    """A handler that notes what it runs in a file, and in which process."""

    def __init__(self, file) -> None:
        self._file = os.open(file, os.O_WRONLY | os.O_APPEND)

    def greet(self, hello):
        return {"pid": os.getpid(), **hello}

    async def call(self, request):
        label = request.options.get("label", "call")
        os.write(self._file, f"{label}\n".encode())
        while (gate := request.options.get("gate")) and not os.path.exists(gate):  # noqa: ASYNC110, ASYNC240, PTH110 - it is another process that opens it
            await asyncio.sleep(0.01)
        if request.options.get("dies"):
            os.kill(os.getpid(), signal.SIGKILL)
        await asyncio.sleep(request.options.get("seconds", 0))
        os.write(self._file, f"{label}-done\n".encode())
        return [os.getpid()]

    async def stream(self, request):
        for number in range(request.options["count"]):
            yield number


async def _serve(url, node, file):
    await RedisServer(a_backend(url), node, Noting(file)).start()
    print("ready", flush=True)
    await asyncio.sleep(3600)


if __name__ == "__main__":
    asyncio.run(_serve(*sys.argv[1:]))
