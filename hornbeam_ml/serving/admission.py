"""Letting calls in: everything about them is checked in the caller's own thread or task."""

from __future__ import annotations

import functools
import time
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from hornbeam_ml.errors import ModelError
from hornbeam_ml.request import current_request
from hornbeam_ml.serving.batch import chunks_of
from hornbeam_ml.serving.calls import Call, Entry
from hornbeam_ml.serving.length_line import runs

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from hornbeam_ml.request import Request
    from hornbeam_ml.serving.calls import Waker
    from hornbeam_ml.serving.config import ServingConfig
    from hornbeam_ml.serving.runner import Runner

C = TypeVar("C", bound=Call)


class Terms(NamedTuple):
    """On what terms a call is made, fixed when it begins.

    Attributes:
        key: Its batch key.
        deadline: When the caller stops waiting, seconds of `time.monotonic`; `inf`: never.
        request: The HTTP request that the call is made for, if any.
    """

    key: Hashable
    deadline: float
    request: Request | None = None


class Admission:
    """Checks calls against the settings of a serving."""

    def __init__(self, config: ServingConfig) -> None:
        self._config = config
        self._keys = config.keys

    def terms(self, key: Hashable, timeout_ms: float | None = None) -> Terms:
        """Return the terms of a call that begins now.

        Raises:
            ValueError: there is no such key.
            ClientDisconnected: the client of the request has left.
            DeadlineExceeded: the deadline of the request has passed.
        """
        if timeout_ms is None:
            timeout_ms = self._config.deadline_ms
        deadline = inf if timeout_ms is None else time.monotonic() + timeout_ms / 1000
        request = current_request()
        if request is not None:
            request.check()
            deadline = min(deadline, request.deadline)
        if key in self._keys:
            return Terms(key, deadline, request)
        if not self._config.batch_keys:
            raise ValueError(f"{self._config.label} has no batch_keys, so no key={key!r}")
        known = ", ".join(repr(name) for name in self._keys)
        raise ValueError(f"{self._config.label} has no key {key!r}; it has: {known}")

    def admit(
        self, runner: Runner, kind: type[C], items: Sequence[Any], terms: Terms, waker: Waker
    ) -> C:
        """Let the items of a call wait for their batches.

        Raises:
            ValueError: an item is not like those the model takes.
            ModelError: the model calls itself.
            Overloaded: the queue is full.
            DeadlineExceeded: it is too late already.
            ClientDisconnected: the client of the request has left.
            ServingClosed: it was closed.
        """
        if runner.is_own_stream():
            raise ModelError(f"{self._config.label} calls itself: it would wait for itself")
        call = kind(len(items), runner.queue.clock(), terms.deadline, waker)
        lane_of, length_of = runner.template.lane_of, self._config.length_of
        entries = [
            Entry(
                call, index, item, lane_of(item, terms.key, streams=kind.streams), length_of(item)
            )
            for index, item in enumerate(items)
        ]
        if terms.request is not None:
            call.attach(terms.request, functools.partial(runner.queue.disconnect, call))
        try:
            runner.queue.admit(call, entries)
        except BaseException:
            call.detach()
            raise
        return call

    def batches(
        self, runner: Runner, items: Sequence[Any], key: Hashable
    ) -> Iterable[Sequence[int]]:
        """Return the batches in which to run the items of one caller, as indices.

        Raises:
            ValueError: an item is not like those the model takes.
        """
        for item in items:
            runner.template.lane_of(item, key, streams=False)
        if self._config.max_tokens is None:
            return chunks_of(range(len(items)), self._config.batch_size)
        lengths = [self._config.length_of(item) for item in items]
        return runs(lengths, self._config.batch_size, self._config.max_tokens)
