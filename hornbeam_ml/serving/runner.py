"""Runs the batches of a serving in one process: loads the model, and finishes every waiter.

Each instance of the model has its streams. On the first of them it is loaded and warmed up; then
each takes batches from the queue, one after the other, until the queue ends.

Two kinds of failure are kept apart. An error of the model is its callers' (`bisection`). A fault
in our own code ends the loop of a stream: what it was running fails, and another stream takes its
place.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import threading
import time
import weakref
from concurrent.futures import Future, InvalidStateError, wait
from contextvars import Context
from typing import TYPE_CHECKING, Any, Final

from hornbeam_ml import threads
from hornbeam_ml.devices import pick_device
from hornbeam_ml.errors import ModelError, ServingClosed
from hornbeam_ml.forks import fork_hazards
from hornbeam_ml.memory import LoadCost, LoadMeter
from hornbeam_ml.serving.bisection import run_batch
from hornbeam_ml.serving.model import LoadedModel, Steps
from hornbeam_ml.serving.queue import BatchQueue
from hornbeam_ml.serving.template import Template
from hornbeam_ml.streams import Stream, current_stream

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from hornbeam_ml.serving.config import ServingConfig
    from hornbeam_ml.serving.takers import Taker

logger = logging.getLogger("hornbeam.serving")
_EXIT_WAIT_S: Final = 2.0
_MOST_FAULTS: Final = 3  # in a row, with no batch finished between them


class Runner:
    """The model of a serving in this process, and the threads that run it.

    Attributes:
        queue: The waiting calls.
        template: What items have to be like.
        failed: Whether loading failed, so that another runner may try again.
        loaded: Done when all instances are loaded and warm, and their streams take batches; its
            error says why they do not.
        costs: What loading each instance took.
    """

    def __init__(self, config: ServingConfig) -> None:
        self.queue = BatchQueue(
            config.label,
            batch_size=config.batch_size,
            timer_s=config.batch_timeout_ms / 1000,
            limit=config.queue_limit,
            max_tokens=config.max_tokens,
            pads=config.pads,
            rows_for=config.rows_for,
        )
        self.failed = False
        self.loaded: Future[None] = Future()
        self.costs: list[LoadCost] = []
        self.template = Template(config)
        self._config = config
        self._lock = threading.Lock()
        self._seats: list[_Seat] = []
        self._models: list[LoadedModel] = []
        self._faults = 0
        self._set_up = 0  # seats whose streams take batches
        self._ending = False
        self._began = 0.0
        _runners.add(self)

    def start(self) -> None:
        """Begin to load, on a stream's thread, one instance after the other."""
        fork_hazards.note("a serving was started", self._config.label)
        self._began = time.monotonic()
        self._load_next()

    @property
    def ready(self) -> bool:
        """Whether everything is loaded, all streams take batches, and none of these hangs."""
        return self.problem is None

    @property
    def problem(self) -> str | None:
        """Why it is not ready, in a few words."""
        if self.failed:
            return "failed to load"
        if not self.loaded.done():
            return "is not loaded"
        if not self._all_set_up:
            return "has stopped" if self._ending else "lacks a stream"
        if self.queue.any_stuck(self._config.stuck_after_s):
            return "hangs"
        return None

    @property
    def _all_set_up(self) -> bool:
        wanted = len(self._config.devices) * self._config.streams
        return not self._ending and self._set_up == wanted

    def is_own_stream(self) -> bool:
        """Return whether the caller runs on one of the streams here: it would wait for itself."""
        stream = current_stream()
        return stream is not None and any(seat.stream is stream for seat in self._seats)

    def run_inline(self, items: Sequence[Any], key: Hashable) -> list[Any] | Steps:
        """Run one batch here and now, on the current stream where there is one; loaded before."""
        model, stream = self._models[0], current_stream()
        if stream is None:
            return model.run(items, key)
        outcome: list[Any] | Steps = stream.run(model.run, items, key)
        return outcome

    def close(self, error: ServingClosed, *, drain: bool, timeout: float) -> None:
        """Take no more calls and wait for the streams to end; see `Serving.close`."""
        self._ending = True
        self.queue.close(error, drain=drain)
        self._set_loaded(error)
        if self.is_own_stream():
            return  # a model closes its own serving: the stream ends after this batch
        with self._lock:
            seats = list(self._seats)
        wait([seat.left for seat in seats], timeout)
        self.queue.abort(error)

    def forget_after_fork(self) -> None:
        """In a forked child: finish whoever waits; its threads are the parent's."""
        self._lock = threading.Lock()
        self._seats.clear()
        self._ending = True
        self.queue.forget_after_fork(
            ServingClosed(f"{self._config.label}: the call was made by the parent of this process")
        )

    # Loading.

    def _load_next(self) -> None:
        """Load the next instance. Not all at once: libraries patch themselves while they load."""
        try:
            device = pick_device(self._config.devices[len(self._models)])
            first = self._add_seat(device)
        except Exception as error:  # noqa: BLE001 - no such GPU: like any failure to load
            self._fail_load(error)
            return
        self._submit(first, self._load, first)

    def _load(self, first: _Seat) -> None:
        device = first.stream.device
        meter = LoadMeter()
        try:
            model = LoadedModel.load(self._config, device)
            self._warm_up(model, first)
            others = [self._add_seat(device) for _ in range(self._config.streams - 1)]
        except BaseException as error:  # noqa: BLE001 - every caller gets it
            first.finished = True
            self._fail_load(error)
            return
        self.costs.append(meter.cost())
        self._models.append(model)
        for seat in [first, *others]:
            seat.model = model
            self._submit(seat, self._serve, seat)
        if len(self._models) < len(self._config.devices) and not self._ending:
            self._load_next()

    def _fail_load(self, error: BaseException) -> None:
        failure = ModelError(
            f"{self._config.label} failed to load: {type(error).__name__}: {error}"
        )
        failure.__cause__ = error
        self.failed = True  # first: whoever is told may try again at once
        self._end(failure)
        for seat in list(self._seats):
            if seat.model is None and not seat.finished:  # its stream has nothing to do yet
                seat.finished = True
                self._left(seat, None)
        self._set_loaded(failure)

    def _set_loaded(self, error: BaseException | None) -> None:
        with contextlib.suppress(InvalidStateError):  # it was closed meanwhile
            if error is None:
                self.loaded.set_result(None)
            else:
                self.loaded.set_exception(error)

    # Streams.

    @functools.cached_property
    def _shares(self) -> tuple[int, int]:
        """The compute threads of a stream among its like, and of one that is alone."""
        return threads.process_share(self._config.streams), threads.process_share(1)

    def _warm_up(self, model: LoadedModel, seat: _Seat) -> None:
        for alone in (True, False) if self._follows_load(seat) else (False,):
            self._limit_threads(seat, alone=alone)
            model.warm_up()

    def _follows_load(self, seat: _Seat) -> bool:
        """Return whether the compute threads of a stream change with the load."""
        # What torch compiles for one number of threads is compiled again for another.
        shares = self._config.streams > 1 and seat.stream.device == "cpu"
        return shares and self._config.compile is None and self._shares[0] != self._shares[1]

    def _limit_threads(self, seat: _Seat, *, alone: bool) -> None:
        """Give the calling thread, of a stream on a CPU, its part of the compute threads.

        One whose batch is alone gets them all: they would be idle. When another batch starts
        meanwhile, the two share the cores until this one ends.
        """
        if self._config.streams > 1 and seat.stream.device == "cpu":
            part, whole = self._shares
            threads.limit_this_thread(whole if alone and self._follows_load(seat) else part)

    def _add_seat(self, device: str) -> _Seat:
        name = f"{self._config.name or 'serving'}-{len(self._seats) + 1}"
        seat = _Seat(Stream(device, name=name), self.queue.add_taker())
        with self._lock:
            self._seats.append(seat)
        return seat

    def _submit(self, seat: _Seat, fn: Callable[[_Seat], None], argument: _Seat) -> None:
        # In an empty context: that of the caller who happened to come first is not for all.
        future = Context().run(seat.stream.submit, fn, argument)
        future.add_done_callback(lambda done: self._left(seat, done.exception()))

    def _serve(self, seat: _Seat) -> None:
        """Run batches until the queue ends; on a stream's thread."""
        with self._lock:
            self._set_up += 1
            seat.serves = True
        if self._all_set_up:
            if not self.loaded.done():
                took = time.monotonic() - self._began
                logger.info("%s loaded in %.1f s", self._config.label, took)
            self._set_loaded(None)
        progress = functools.partial(self.queue.note_progress, seat.taker)
        while entries := self.queue.take(seat.taker):
            self._limit_threads(seat, alone=seat.taker.alone)
            run_batch(entries, seat.model, self.queue, self.template, progress)
            self._faults = 0
            del entries
        seat.finished = True

    def _left(self, seat: _Seat, fault: BaseException | None) -> None:
        """Deal with a stream that left a function of this class."""
        if fault is None and not seat.finished:
            return  # it has loaded, and serves next
        with self._lock:
            if seat.serves:
                self._set_up -= 1
            self._seats.remove(seat)
            self._faults += fault is not None
        try:
            if fault is not None:
                self._recover(seat, fault)
        except BaseException as error:  # noqa: BLE001 - the last edge: leave nobody waiting
            self._give_up(error)
        finally:
            self.queue.remove_taker(seat.taker)
            seat.stream.close()
            seat.left.set_result(None)

    def _recover(self, seat: _Seat, fault: BaseException) -> None:
        logger.error("%s: a stream stopped", self._config.label, exc_info=fault)
        error = ModelError(f"{self._config.label} had an internal error: {fault!r}")
        error.__cause__ = fault
        self.queue.recover(seat.taker, error)
        if seat.model is None:
            self._fail_load(fault)
        elif self._faults > _MOST_FAULTS:
            self._give_up(fault)
        else:
            successor = self._add_seat(seat.stream.device)
            successor.model = seat.model
            self._submit(successor, self._serve, successor)

    def _give_up(self, fault: BaseException) -> None:
        failure = ServingClosed(f"{self._config.label} stopped after internal errors: {fault!r}")
        failure.__cause__ = fault
        self._end(failure)
        self._set_loaded(failure)

    def _end(self, error: BaseException) -> None:
        """Stop for good: nobody is left waiting, and later calls get the reason."""
        self._ending = True
        self.queue.abort(error)


class _Seat:
    """A stream and what it serves.

    Attributes:
        serves: Whether it has begun to take batches.
        finished: Whether its loop came to its proper end.
        left: Done when the stream has left it.
    """

    def __init__(self, stream: Stream, taker: Taker) -> None:
        self.stream = stream
        self.taker = taker
        self.model: Any = None
        self.serves = False
        self.finished = False
        self.left: Future[None] = Future()


_runners: weakref.WeakSet[Runner] = weakref.WeakSet()  # to be told of a fork and of the exit


def _forget_after_fork() -> None:
    for runner in list(_runners):
        runner.forget_after_fork()


def _close_at_exit() -> None:
    """Let what runs finish: native code may crash an interpreter that shuts down around it."""
    runners, error = list(_runners), ServingClosed("the process exits")
    for runner in runners:
        runner.queue.close(error, drain=False)
    deadline = time.monotonic() + _EXIT_WAIT_S
    for runner in runners:
        runner.close(error, drain=False, timeout=max(0.0, deadline - time.monotonic()))


os.register_at_fork(after_in_child=_forget_after_fork)
atexit.register(_close_at_exit)
