"""A server of calls for tests: in a process of its own, or on a loop in a thread.

Run as a program it serves at the path in its first argument, until it is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
from child_processes import stop

from hornbeam_state import DeadlineExceeded, HornbeamError
from hornbeam_state.transports.base import Request
from hornbeam_state.transports.failures import register_error
from hornbeam_state.transports.local import Server

PATIENCE = 20.0


class Registered(HornbeamError):
    """An error of another package."""


class Unregistered(Exception):
    """An error that nobody knows."""


register_error(Registered)

ERRORS = {
    "registered": Registered("mine", 7),
    "unregistered": Unregistered("theirs"),
    "value": ValueError("wrong"),
    "key": KeyError("name"),
    "exit": asyncio.CancelledError("not yours"),
    "stop": StopAsyncIteration("over"),
}


class Answers:
    """A handler with a method for each thing to test."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self._released = asyncio.Event()

    def greet(self, hello):
        if "refuse" in hello:
            raise Registered(hello["refuse"])
        return {"pid": os.getpid(), "said": dict(hello)}

    async def call(self, request):
        return await getattr(self, request.method)(request)

    async def stream(self, request):
        label, number = request.options.get("label", "stream"), 0
        if request.options.get("tells"):
            self.events.append(f"{label} began")
        try:
            while number < request.options.get("count", 2**40):
                if number == request.options.get("fail_at"):
                    raise ValueError("half way")
                if number == request.options.get("hold_at"):
                    await self._released.wait()
                yield [number, *request.values]
                number += 1
                if pause := request.options.get("pause"):
                    await asyncio.sleep(pause)
        finally:
            self.events.append(f"{label} ended at {number}")

    async def echo(self, request):
        await asyncio.sleep(request.options.get("seconds", 0))
        return request.values

    async def hold(self, request):
        """Be an `echo` that lasts until `release`."""
        await self._released.wait()
        return request.values

    async def release(self, request=None):
        self._released.set()
        return []

    async def timeout(self, request):
        return [request.timeout]

    async def hang(self, request):
        self.events.append(f"{request.options['label']} began")
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.events.append(f"{request.options['label']} cancelled")
            raise

    async def fail(self, request):
        raise ERRORS[request.options["error"]]

    async def give(self, request):
        return [np.zeros(request.options["bytes"], np.uint8)]

    async def give_unknown(self, request):
        return [object()]

    async def told(self, request):
        return list(self.events)

    async def rss(self, request):
        return [rss()]


def rss() -> int:
    """Return the bytes of memory in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def ask(method="echo", *values, timeout=PATIENCE, **options) -> Request:
    """Return a request."""
    return Request(target="test", method=method, values=values, options=options, timeout=timeout)


def eventually(check, what="it"):
    """Return the first true answer of `check`."""
    deadline = time.monotonic() + PATIENCE
    while not (answer := check()):
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.005)
    return answer


def miss_deadline(call, has_begun):
    """Have a call miss its deadline after it has begun; return the error.

    It is made with few seconds, and again with more if they were over before it had begun.
    """
    for seconds in (0.05, 0.5, 5.0):
        try:
            call(seconds)
        except DeadlineExceeded as error:
            if has_begun():
                return error
        else:
            raise AssertionError("it met its deadline")
    raise AssertionError("it never began")


class LoopThread:
    """What runs on an event loop in a thread of this process, for the length of a block.

    It has a `_start` and a `_stop`, which are run there, a `server` in between, and its `handler`.
    """

    def __init__(self, new_loop=asyncio.new_event_loop) -> None:
        self._loop = new_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE)

    def close(self, grace=0.0):
        self.run(self.server.close(grace=grace))

    def release(self):
        self.run(self.handler.release())

    def __enter__(self):
        self._thread.start()
        try:
            self.run(self._start())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_):
        self.run(self._stop())
        self._end()

    def _end(self):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class ServerThread(LoopThread):
    """A server on an event loop in a thread of this process, for the length of a block."""

    def __init__(self, path, handler=None, new_loop=asyncio.new_event_loop, **options) -> None:
        super().__init__(new_loop)
        self.path = path
        self.handler = handler or Answers()
        self._options = options

    async def _start(self):
        self.server = Server(self.path, self.handler, **self._options)
        await self.server.start()

    async def _stop(self):
        await self.server.close()

    async def _running(self):
        return len(self.server._tasks())

    async def _announce(self, note):
        self.server.announce(note)

    def announce(self, note):
        self.run(self._announce(note))

    def running(self):
        return self.run(self._running())


class ServerProcess:
    """A server in a process of its own, for the length of a block."""

    def __init__(self, path, *arguments) -> None:
        self.path = path
        command = [sys.executable, __file__, str(path), *arguments]
        self._child = subprocess.Popen(command, stdout=subprocess.PIPE)
        self.pid = self._child.pid
        assert self._child.stdout.readline() == b"ready\n"

    def signal(self, number):
        if number == signal.SIGSTOP:
            stop(self.pid)
        else:
            os.kill(self.pid, number)

    def kill(self):
        self._child.kill()
        self._child.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGCONT)
        self.kill()
        self._child.stdout.close()


async def _serve(path):
    await Server(path, Answers()).start()
    print("ready", flush=True)
    await asyncio.sleep(3600)


if __name__ == "__main__":
    if "uvloop" in sys.argv:
        import uvloop

        uvloop.run(_serve(Path(sys.argv[1])))
    else:
        asyncio.run(_serve(Path(sys.argv[1])))
