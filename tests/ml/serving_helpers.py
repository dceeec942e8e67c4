"""Models that can be watched and held, and callers of both kinds, for the tests of servings."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

LIMIT_S = 20.0  # nothing takes that long, except what hangs


def until(check, what="it happens"):
    """Wait until a condition holds, and return what it gave."""
    deadline = time.monotonic() + LIMIT_S
    while not (answer := check()):
        assert time.monotonic() < deadline, f"not in {LIMIT_S} s: {what}"
        time.sleep(0.001)
    return answer


class Held:
    """A batch function that doubles its items, notes its batches, and can be held.

    Args:
        hold: Let every batch wait for a `release`.
    """

    def __init__(self, *, hold=False):
        self.batches = []
        self.keys = []
        self._permits = threading.Semaphore(0)
        self._hold = hold

    def __call__(self, batch, key=None):
        self.batches.append(list(batch))
        self.keys.append(key)
        if self._hold:
            assert self._permits.acquire(timeout=LIMIT_S)
        return [2 * item for item in batch]

    def release(self, batches=1):
        """Let that many batches go on."""
        self._permits.release(batches)

    def open(self):
        """Hold no more batches."""
        self._hold = False
        self._permits.release(100)

    def started(self, count):
        """Wait until that many batches have started."""
        until(lambda: len(self.batches) >= count, f"{count} batches, of {self.batches}")

    @property
    def sizes(self):
        return [len(batch) for batch in self.batches]

    @property
    def seen(self):
        return [item for batch in self.batches for item in batch]


class ThreadCallers:
    """Calls from threads; each returns a future at once."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(64)

    def run(self, serving, item, **options):
        return self._pool.submit(serving.run, item, **options)

    def run_batch(self, serving, items, **options):
        return self._pool.submit(serving.run_batch, items, **options)

    def stream(self, serving, item, **options):
        return self._pool.submit(lambda: list(serving.stream(item, **options)))

    def stream_some(self, serving, item, count):
        """Listen to so many chunks and no more."""

        def listen():
            with serving.stream(item) as chunks:
                return [next(chunks) for _ in range(count)]

        return self._pool.submit(listen)

    def close(self):
        self._pool.shutdown()


class TaskCallers:
    """The same calls from tasks of one event loop."""

    def __init__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def _spawn(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, serving, item, **options):
        return self._spawn(serving.arun(item, **options))

    def run_batch(self, serving, items, **options):
        return self._spawn(serving.arun_batch(items, **options))

    def stream(self, serving, item, **options):
        async def listen():
            return [chunk async for chunk in serving.astream(item, **options)]

        return self._spawn(listen())

    def stream_some(self, serving, item, count):
        async def listen():
            async with serving.astream(item) as chunks:
                return [await anext(chunks) for _ in range(count)]

        return self._spawn(listen())

    def close(self):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def in_child(function):
    """Run a function in a forked child; return what it printed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(int(LIMIT_S))  # a child that hangs ends
        try:
            os.write(writing, str(function()).encode())
        except BaseException as error:
            os.write(writing, f"raised {error!r}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as output:
        printed = output.read()
    os.waitpid(child, 0)
    return printed


def answers(futures):
    """Return results and errors."""
    return [future.exception(LIMIT_S) or future.result() for future in futures]


def queued(serving, count):
    """Wait until that many items wait."""
    until(lambda: serving.stats().queued == count, f"{count} queued, not {serving.stats()}")
