"""Streams: threads that each own one execution queue.

A stream runs what it is given one call after the other, in the order of submission, on a thread of
its own. On a GPU that thread has a CUDA stream of its own, so the work of several streams of a
process overlaps; models are shared by all of them.

The *current* stream is a context variable: tasks and `asyncio.to_thread` inherit it, and setting
it in one task or thread shows in no other.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import inspect
import itertools
import logging
import os
import threading
import time
import weakref
from contextvars import ContextVar
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final, NamedTuple, ParamSpec, Self, TypeVar

from hornbeam_ml.devices import CudaQueue, check_device, pick_device
from hornbeam_ml.errors import StreamClosed
from hornbeam_ml.promises import Promise
from hornbeam_state.errors import ConfigError, Overloaded

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from concurrent.futures import Future

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger("hornbeam.streams")
_numbers = itertools.count(1)
_entered: ContextVar[tuple[Stream, ...]] = ContextVar("hornbeam_streams", default=())
_EXIT_WAIT_S: Final = 2.0


class Stream:
    """A thread that owns an execution queue, and on a GPU a CUDA stream.

    Safe to use from any thread. A stream that is no longer referred to ends its thread by itself,
    after the calls it was given. After a fork it belongs to the parent: in the child every use of
    it raises `StreamClosed`.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``: a GPU where there is one.
        name: What its thread and its errors are called.
        queue_limit: How many calls may wait.

    Raises:
        ConfigError: no such device, or a limit below 1.
    """

    def __init__(
        self, device: str = "cpu", *, name: str | None = None, queue_limit: int = 8192
    ) -> None:
        if not isinstance(queue_limit, int) or queue_limit < 1:
            raise ConfigError(f"queue_limit={queue_limit!r}: give a whole number from 1 up")
        self.name = name or f"stream-{next(_numbers)}"
        self.device = pick_device(check_device(device))
        self.queue_limit = queue_limit
        # The thread must not refer to the stream, or the stream would never be collected.
        self._thread = _Thread(self.name, self.device)
        self._finalizer = weakref.finalize(self, self._thread.calls.put, None)
        self._finalizer.atexit = False

    def run(self, fn: Callable[P, Any], *args: P.args, **kwargs: P.kwargs) -> Any:
        """Return ``fn(*args, **kwargs)``, computed on the stream's thread.

        `fn` sees the caller's context variables and has this stream as its current one; what it
        returns is computed to the end, on a GPU too. A coroutine function runs on an event loop
        of that thread. On the stream's own thread `fn` is called at once.

        Raises:
            Overloaded: `queue_limit` calls wait already.
            StreamClosed: it is closed, or was while the call waited for its turn.
        """
        if self._thread.is_own():
            return finish(fn(*args, **kwargs))
        future = self.submit(fn, *args, **kwargs)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # an interrupt: nobody waits for the call any more
            raise

    async def arun(self, fn: Callable[P, Any], *args: P.args, **kwargs: P.kwargs) -> Any:
        """Awaitable twin of `run`. Cancelled, it takes a call that has not started back."""
        return await asyncio.wrap_future(self.submit(fn, *args, **kwargs))

    def submit(self, fn: Callable[P, Any], *args: P.args, **kwargs: P.kwargs) -> Future[Any]:
        """Queue a call and return its future at once; see `run`.

        The future can be cancelled until the call starts.
        """
        promise = Promise()
        mark = self._thread.cuda.mark() if self._thread.cuda else None
        self._thread.add(
            _Call(self, promise, contextvars.copy_context(), mark, lambda: fn(*args, **kwargs))
        )
        return promise

    def close(self) -> None:
        """Take no more calls. The running one finishes; queued ones get `StreamClosed`.

        Does not block, and closing again does nothing.
        """
        self._thread.close(f"{self!r} is closed")

    @property
    def closed(self) -> bool:
        """Whether it takes no more calls."""
        return self._thread.reason is not None

    def synchronize(self, result: Any) -> None:
        """On the stream's thread: wait until a result is computed. Nothing to do on a CPU."""
        if self._thread.cuda:
            self._thread.cuda.end(result)

    def follow_default(self) -> None:
        """On the stream's thread: begin after what the GPU's default stream has queued."""
        if self._thread.cuda:
            self._thread.cuda.begin()

    def __enter__(self) -> Self:
        """Make it the current stream of this thread or task.

        Raises:
            StreamClosed: it is closed.
        """
        if self._thread.reason is not None:
            raise StreamClosed(self._thread.reason)
        _entered.set((*_entered.get(), self))
        return self

    def __exit__(self, *_exc: object) -> None:
        # Not by a token: a framework may run the end of a block in another context.
        entered = _entered.get()
        if entered and entered[-1] is self:
            _entered.set(entered[:-1])

    def __repr__(self) -> str:
        return f"Stream({self.device!r}, name={self.name!r})"


def current_stream() -> Stream | None:
    """Return the stream that this thread or task has set, or that runs this call."""
    entered = _entered.get()
    return entered[-1] if entered else None


def with_stream(stream: Stream, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return ``fn(*args, **kwargs)``, called here with `stream` as the current stream.

    Raises:
        StreamClosed: it is closed.
        TypeError: `fn` is a coroutine function, which would run after the setting is undone.
    """
    if inspect.iscoroutinefunction(fn):
        raise TypeError("use `await awith_stream(...)` for a coroutine function")
    with stream:
        return fn(*args, **kwargs)


async def awith_stream(
    stream: Stream, fn: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Awaitable twin of `with_stream`, for a coroutine function."""
    with stream:
        return await fn(*args, **kwargs)


class _Call(NamedTuple):
    """A call that waits, or runs. It keeps its stream alive."""

    stream: Stream
    promise: Promise
    context: contextvars.Context
    mark: Any
    fn: Callable[[], Any]

    def execute(self, cuda: CudaQueue | None) -> None:
        if not self.promise.set_running_or_notify_cancel():
            return
        try:
            if cuda:
                cuda.begin(self.mark)
            result = self.context.run(_call_on, self.stream, self.fn)
            if cuda:
                cuda.end(result, self.mark)
        except BaseException as error:  # noqa: BLE001 - the caller gets it
            self.promise.set_exception(error)
        else:
            self.promise.set_result(result)


class _Thread:
    """What a stream's thread works on. `calls` ends with None.

    Attributes:
        reason: Why no more calls are taken; None while they are.
    """

    def __init__(self, name: str, device: str) -> None:
        # Garbage collection may end a stream in the middle of anything that this thread or
        # another does, and `put` of this queue is the one way to say so that needs no lock.
        self.calls: SimpleQueue[_Call | None] = SimpleQueue()
        self.cuda = CudaQueue(device) if device != "cpu" else None
        self.reason: str | None = None
        self._name = name
        self._lock = threading.Lock()
        self._running: _Call | None = None
        self._ident: int | None = None
        _threads.add(self)
        thread = threading.Thread(target=self._main, name=f"hornbeam-{name}", daemon=True)
        thread.start()
        _remember(thread)

    def is_own(self) -> bool:
        return self._ident == threading.get_ident()

    def add(self, call: _Call) -> None:
        with self._lock:
            if self.reason is not None:
                raise StreamClosed(self.reason)
            if self.calls.qsize() >= call.stream.queue_limit:
                raise Overloaded(f"{call.stream!r}: {call.stream.queue_limit} calls wait already")
            self.calls.put(call)

    def close(self, reason: str) -> None:
        with self._lock:
            if self.reason is not None:
                return
            self.reason = reason
        waiting = self._take_waiting()
        self.calls.put(None)
        for call in waiting:
            if call.promise.set_running_or_notify_cancel():
                call.promise.set_exception(StreamClosed(reason))

    def forget_after_fork(self) -> None:
        """In a forked child: refuse further use, and finish whoever waits here."""
        self._lock = threading.Lock()
        self._ident = None
        self.reason = (
            f"stream {self._name!r} belongs to the process that made it, the parent of this one: "
            "make a stream in the process that uses it"
        )
        running = [self._running] if self._running is not None else []
        for call in running + self._take_waiting():
            call.promise.fail_after_fork(StreamClosed(self.reason))

    def _take_waiting(self) -> list[_Call]:
        waiting = []
        with contextlib.suppress(Empty):
            while True:
                call = self.calls.get_nowait()
                if call is not None:
                    waiting.append(call)
        return waiting

    def _main(self) -> None:
        self._ident = threading.get_ident()
        _local.loop = None
        failure = "its thread ended"
        try:
            with self.cuda.entered() if self.cuda else contextlib.nullcontext():
                self._serve()
        except BaseException as error:
            logger.exception("stream %r stopped", self._name)
            failure = f"it stopped: {error!r}"
        finally:
            running, self._running = self._running, None
            self._ident = None
            reason = f"stream {self._name!r} is closed: {failure}"
            self.close(reason)
            if running is not None and not running.promise.done():
                running.promise.set_exception(StreamClosed(reason))
            if _local.loop is not None:
                _local.loop.close()

    def _serve(self) -> None:
        while (call := self.calls.get()) is not None:
            self._running = call
            call.execute(self.cuda)
            # Not even the name may keep the stream alive while this waits.
            self._running = call = None


def _call_on(stream: Stream, fn: Callable[[], Any]) -> Any:
    _entered.set((stream,))
    return finish(fn())


# Coroutine functions on threads without an event loop.

_local = threading.local()  # on a stream's thread it has `loop`


def finish(result: Any) -> Any:
    """Return a result, or what an awaitable one comes to; blocks.

    On a stream's thread the awaitable runs on the event loop of that thread, elsewhere on one
    that is made for it.
    """
    if not hasattr(type(result), "__await__"):
        return result

    async def wait() -> Any:
        return await result

    if hasattr(_local, "loop") and not _loop_runs():
        if _local.loop is None:
            _local.loop = asyncio.Runner()
        return _local.loop.run(wait())
    outcome = Promise()
    threading.Thread(target=_run_apart, args=(outcome, wait), name="hornbeam-await").start()
    return outcome.result()


def _loop_runs() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _run_apart(outcome: Promise, wait: Callable[[], Any]) -> None:
    """Run in a thread of its own: the caller's may have a running loop already."""
    try:
        outcome.set_result(asyncio.run(wait()))
    except BaseException as error:  # noqa: BLE001 - the caller gets it
        outcome.set_exception(error)


_threads: weakref.WeakSet[_Thread] = weakref.WeakSet()  # to be told of a fork and of the exit
_os_threads: set[threading.Thread] = set()  # also while one clears up after its stream is forgotten


def _remember(thread: threading.Thread) -> None:
    for ended in [each for each in list(_os_threads) if not each.is_alive()]:
        _os_threads.discard(ended)
    _os_threads.add(thread)


def _forget_after_fork() -> None:
    for thread in list(_threads):
        thread.forget_after_fork()


def _close_at_exit() -> None:
    """Let what runs finish: native code may crash an interpreter that shuts down around it.

    That includes the destructors of what a library keeps for each thread, after the last call.
    """
    for stream in list(_threads):
        stream.close("the process exits")
    deadline = time.monotonic() + _EXIT_WAIT_S
    for thread in list(_os_threads):
        thread.join(max(0.0, deadline - time.monotonic()))


os.register_at_fork(after_in_child=_forget_after_fork)
atexit.register(_close_at_exit)
