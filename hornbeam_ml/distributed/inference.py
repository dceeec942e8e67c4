"""`DistributedInference`: a batch spread over nodes."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import os
import time
import weakref
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from hornbeam_ml.distributed.blocking import run_blocking
from hornbeam_ml.distributed.plan import Plan
from hornbeam_ml.distributed.records import LOCAL, Records
from hornbeam_ml.distributed.run import Run
from hornbeam_ml.distributed.thread_batches import check_count
from hornbeam_ml.distributed.values import as_sequence, checked_results
from hornbeam_ml.functions import is_coroutine_function
from hornbeam_ml.request import seconds_left
from hornbeam_state import anodes, arpc_call, nodes
from hornbeam_state.errors import ConfigError, DeadlineExceeded, NodeDown, StoreUnavailable
from hornbeam_state.rpc.threads import Raised, Threads

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from hornbeam_ml.distributed.chunks import Flight
    from hornbeam_ml.distributed.records import DistributionStats

logger = logging.getLogger("hornbeam.distributed")


class DistributedInference:
    """Spreads batches over the nodes that expose a function, and takes what they cannot do.

    The items of a batch go to all nodes at once, in chunks. A node that gets free gets the next
    one, of a size that follows from how fast it was, so that a slow node gets less and all end
    together. A chunk that fails or is late goes to another node, or is run here; near the end a
    chunk that takes long somewhere is also given to an idle node, and the first answer counts. So
    **the function may run twice on an item**; each result is delivered once.

    Safe to use from any thread and event loop, by any number of batches at a time: what one learns
    of the speed of nodes, all use. It keeps nothing open.

    Example::

        embedding = DistributedInference(
            "gpu", module="ml_worker", function="predict", local=embedder.encode
        )
        vectors = await embedding.predict_batch(texts)

    Args:
        node_filter: A part of the names of the nodes, before the ``@``; "" takes all.
        module: The module of the function, as the nodes expose it.
        function: Its name. It gets a list of items (of an array, a part of it), and returns as
            many results.
        local: The same in this process, a plain or a coroutine function, for what no node does.
            A plain one runs in a thread. None: then there is an error instead.
        timeout_ms: When a chunk is late.
        batch_size: How many items a chunk has at most.

    Raises:
        ConfigError: a setting makes no sense.
    """

    def __init__(
        self,
        node_filter: str = "gpu",
        *,
        module: str,
        function: str,
        local: Callable[[Any], Any] | None = None,
        timeout_ms: float = 60_000,
        batch_size: int = 256,
    ) -> None:
        check_count("batch_size", batch_size)
        if not (0 < timeout_ms < math.inf):
            raise ConfigError(f"timeout_ms={timeout_ms!r}: give milliseconds, more than 0")
        if local is not None and not callable(local):
            raise ConfigError("local: give a function that gets a list and returns as many results")
        self.node_filter = node_filter
        self._module = module
        self._function = function
        self._local = local
        self._timeout_ms = timeout_ms
        self._batch_size = batch_size
        self._records = Records()
        _all.add(self)

    def get_worker_nodes(self) -> list[str]:
        """Return the names of the live nodes that match and expose the function, sorted.

        Raises:
            StoreUnavailable: the registry cannot be reached.
        """
        return nodes(self.node_filter, exposes=f"{self._module}.{self._function}")

    async def aget_worker_nodes(self) -> list[str]:
        """Awaitable twin of `get_worker_nodes`."""
        return await anodes(self.node_filter, exposes=f"{self._module}.{self._function}")

    async def predict_batch(self, inputs: Iterable[Any]) -> list[Any]:
        """Return a result for each input, in their order.

        Within an HTTP request it ends by the request's deadline, and when its client leaves.
        Cancelled, it cancels the calls: a plain function that runs goes on unheard.

        Args:
            inputs: Values of the codec, or an array, which is cut along its first axis. They
                must not change until this returns.

        Raises:
            NodeDown: nodes went away or there was none, and there is no `local`.
            RemoteError: the function raised, on two nodes if there are two, and there is no
                `local`.
            DeadlineExceeded: nodes did not answer in time, and there is no `local`; or the
                deadline of the request passed.
            Overloaded: nodes had no room for all of `timeout_ms`, and there is no `local`.
            ModelError: not every input got a result, in the same way.
            StoreUnavailable: the nodes cannot be listed, and there is no `local`.
            Exception: `local` raised.
        """
        return await self._predict(as_sequence(inputs), self.aget_worker_nodes)

    def predict_batch_sync(self, inputs: Iterable[Any]) -> list[Any]:
        """Blocking twin of `predict_batch`; on the thread of an event loop it blocks that."""
        # The connections of a store belong to an event loop, and the one of this call is short.
        look = partial(asyncio.to_thread, self.get_worker_nodes)
        sequence = as_sequence(inputs)
        return run_blocking(lambda: self._predict(sequence, look))

    def split_inputs(self, inputs: Sequence[Any], n: int) -> list[Any]:
        """Return inputs in n parts, in their order, whose sizes differ by one at most.

        Raises:
            ConfigError: n is not 1 or more.
        """
        check_count("n", n)
        size, longer = divmod(len(inputs), n)
        ends = [size * part + min(part, longer) for part in range(n + 1)]
        return [inputs[start:stop] for start, stop in pairwise(ends)]

    def local_predict(self, inputs: Iterable[Any]) -> list[Any]:
        """Return what `local` makes of inputs; blocks.

        Raises:
            ConfigError: there is none.
            ModelError: it did not return as many results.
            Exception: it raised that.
        """
        sequence, local = as_sequence(inputs), self._need_local()
        if is_coroutine_function(local):
            return run_blocking(lambda: self.alocal_predict(sequence))
        return checked_results(local(sequence), len(sequence))

    async def alocal_predict(self, inputs: Iterable[Any]) -> list[Any]:
        """Awaitable twin of `local_predict`; a plain function runs in a thread."""
        threads = Threads(1, "hornbeam-local")
        try:
            return await self._run_here(as_sequence(inputs), threads)
        finally:
            threads.close()

    def stats(self) -> DistributionStats:
        """Return what became of the batches so far, in this process."""
        return self._records.stats()

    async def _predict(
        self, inputs: Sequence[Any], look: Callable[[], Awaitable[list[str]]]
    ) -> list[Any]:
        if not len(inputs):
            return []
        plan = Plan(
            len(inputs),
            self._records,
            most=self._batch_size,
            timeout_s=self._timeout_ms / 1000,
            has_local=self._local is not None,
            nobody=self._nobody(),
        )
        threads = Threads(1, "hornbeam-local")

        async def call(flight: Flight) -> list[Any]:
            items = inputs[flight.chunk.start : flight.chunk.stop]
            if flight.name == LOCAL:
                return await self._run_here(items, threads)
            return await self._run_there(flight.name, items)

        try:
            plan.list_nodes(await self._first_look(look), time.monotonic())
            return await Run(plan, len(inputs), call, look).finish()
        finally:
            threads.close()

    async def _first_look(self, look: Callable[[], Awaitable[list[str]]]) -> list[str]:
        try:
            return await look()
        except StoreUnavailable as error:
            if self._local is None:
                raise
            logger.debug("cannot list the nodes: %s", error)
            return []

    async def _run_there(self, name: str, items: Sequence[Any]) -> list[Any]:
        left = seconds_left()
        if left == 0:  # something held up the event loop
            raise DeadlineExceeded("the deadline of the request passed")
        timeout_ms = self._timeout_ms if left is None else min(self._timeout_ms, left * 1000)
        answer = await arpc_call(name, self._module, self._function, [items], timeout_ms=timeout_ms)
        return checked_results(answer, len(items))

    async def _run_here(self, items: Sequence[Any], threads: Threads) -> list[Any]:
        local = self._need_local()
        if is_coroutine_function(local):
            return checked_results(await local(items), len(items))
        context = contextvars.copy_context()
        try:
            answer = await threads.run(context, partial(local, items), lambda: None)
        except Raised as raised:
            raise raised.error from None
        return checked_results(answer, len(items))

    def _need_local(self) -> Callable[[Any], Any]:
        if self._local is None:
            raise ConfigError("there is no local function: give DistributedInference(local=...)")
        return self._local

    def _nobody(self) -> NodeDown:
        error = NodeDown(
            f"no live node with {self.node_filter!r} in its name exposes "
            f"{self._module}.{self._function}, and there is no local function"
        )
        error.sent = False
        return error

    def forget_lock(self) -> None:
        """In a forked child: another thread of the parent may have held it."""
        self._records.forget_lock()


_all: weakref.WeakSet[DistributedInference] = weakref.WeakSet()  # to be told of a fork


def _forget_locks() -> None:
    for each in list(_all):
        each.forget_lock()


os.register_at_fork(after_in_child=_forget_locks)
