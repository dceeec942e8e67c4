"""A node: a process that serves what it exposes, on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Self

from hornbeam_state.default import default_store
from hornbeam_state.errors import ConfigError, StoreError
from hornbeam_state.rpc.answers import Answers
from hornbeam_state.rpc.carriers import entrances
from hornbeam_state.rpc.exposed import exposed_names
from hornbeam_state.rpc.names import full_name
from hornbeam_state.rpc.registration import Registration
from hornbeam_state.rpc.servings import Nothing

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence
    from types import TracebackType

    from hornbeam_state.rpc.entrances import Entrance
    from hornbeam_state.rpc.entries import Entry
    from hornbeam_state.rpc.servings import Servings
    from hornbeam_state.store import Store

logger = logging.getLogger("hornbeam.rpc")

CONCURRENCY: Final = 8
QUEUE_LIMIT: Final = 1024
DRAIN_S: Final = 30.0
_TRACEBACKS: Final = "HORNBEAM_RPC_TRACEBACKS"
_LONGEST_END_S: Final = 5.0


class NodeServer:
    """A node that serves; `serve_node` makes one. A context manager; leaving it closes.

    Its methods may be called from any thread. In a forked child it is not served, and closing does
    nothing.
    """

    def __init__(
        self,
        store: Store,
        name: str | None,
        *,
        tags: Sequence[str],
        servings: Servings | None,
        concurrency: int,
        queue_limit: int,
        tracebacks: bool,
    ) -> None:
        self._store = store
        self._tags = tuple(tags)
        self._servings = servings or Nothing()
        self._concurrency = concurrency
        self._queue_limit = queue_limit
        self._tracebacks = tracebacks
        self._pid = os.getpid()
        self._registration = Registration(
            store, name, describe=self._describe, on_lost=self._end_soon
        )
        self._addresses: dict[str, dict[str, Any]] = {}
        self._entrances: list[Entrance] = []
        self._answers: Answers | None = None
        self._waiting = 0  # at the entrances, as of the last heartbeat
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name=f"hornbeam-node-{self.name}", daemon=True
        )
        self._is_draining = False
        self._is_replaced = False
        self._closing = threading.Lock()
        self._ended = threading.Event()

    @property
    def name(self) -> str:
        """The full name, ``name@host``."""
        return self._registration.name

    @property
    def running(self) -> int:
        """How many calls run, those of servings among them."""
        answers = self._answers
        return 0 if answers is None else answers.turns.running + answers.served.running

    @property
    def queued(self) -> int:
        """How many calls wait for their turn; those in Redis as of the last heartbeat."""
        return 0 if self._answers is None else self._answers.turns.waiting + self._waiting

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the node has ended, or for so many seconds; return whether it has."""
        return self._ended.wait(timeout)

    def close(self, drain: float = DRAIN_S) -> None:
        """Leave the list of nodes, refuse new calls, finish those that were taken, and end.

        The name stays taken until then.

        Args:
            drain: Seconds to wait for calls and casts that run or are queued. Then they are
                cancelled; a plain function that runs goes on unheard.
        """
        if os.getpid() != self._pid:
            return
        with self._closing:
            if self._ended.is_set():
                return
            self._is_draining = True
            if self._answers is not None:
                self._answers.draining = True  # before others may learn that it closes
            try:
                self._registration.beat()
            except StoreError as error:
                logger.warning("others still see the node %s: %s", self.name, error)
            try:
                self._run(self._end(drain), drain + 2 * _LONGEST_END_S)
            except TimeoutError:
                logger.exception("the node %s did not end: its event loop is blocked", self.name)
            finally:
                self._registration.close()
                self._stop()

    async def aclose(self, drain: float = DRAIN_S) -> None:
        """Awaitable twin of `close`."""
        await asyncio.to_thread(self.close, drain)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Claim the name, listen, and be found by others."""
        self._thread.start()
        try:
            self._registration.claim()
            self._run(self._begin(), _LONGEST_END_S)
            self._registration.keep()
        except BaseException:
            self.close(0)
            raise
        _nodes.append(self)

    async def _begin(self) -> None:
        self._answers = Answers(
            self.name,
            self._registration.token,
            concurrency=self._concurrency,
            most_waiting=self._queue_limit,
            with_tracebacks=self._tracebacks,
            servings=self._servings,
        )
        for entrance in entrances(self._store, self.name, most_waiting=self._queue_limit):
            self._entrances.append(entrance)
            self._addresses[entrance.transport] = await entrance.open(self._answers)

    async def _end(self, drain: float) -> None:
        answers = self._answers
        if answers is None:
            return
        try:
            # All at once: what is drained must not take new calls from a stream meanwhile.
            await asyncio.gather(
                answers.drain(drain),
                *(one.close(grace=drain, refuse=not self._is_replaced) for one in self._entrances),
            )
        finally:
            await answers.close()
            await self._loop.shutdown_asyncgens()
            await self._loop.shutdown_default_executor()

    def _describe(self, entry: Entry) -> Entry:
        serving = [] if self._is_draining else [one for one in self._entrances if one.serves]
        self._waiting = sum(one.waiting() for one in serving)
        return replace(
            entry,
            transports={one.transport: self._addresses[one.transport] for one in serving},
            functions=exposed_names(),
            servings=dict(self._servings.names()),
            tags=self._tags,
            concurrency=self._concurrency,
            running=self.running,
            queued=self.queued,
        )

    def _end_soon(self) -> None:
        """End without waiting for calls: whoever has the name now answers them."""
        self._is_replaced = True
        threading.Thread(target=self.close, args=(0.0,), name="hornbeam-node-end").start()

    def _run(self, work: Coroutine[Any, Any, None], timeout: float) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    def _stop(self) -> None:
        if self in _nodes:
            _nodes.remove(self)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_LONGEST_END_S)
        if self._thread.is_alive():
            logger.error("the event loop of the node %s hangs: it is left alone", self.name)
        else:
            self._loop.close()
        self._ended.set()


def serve_node(
    name: str | None = None,
    *,
    tags: Sequence[str] = (),
    servings: Servings | None = None,
    concurrency: int = CONCURRENCY,
    queue_limit: int = QUEUE_LIMIT,
    tracebacks: bool | None = None,
    store: Store | None = None,
) -> NodeServer:
    """Make this process a node: others find it, and call what it exposes.

    It serves until it is closed, on threads of its own. Functions that are exposed later are served
    too, and found within a second or so.

    Args:
        name: ``name`` or ``name@host``; None: ``HORNBEAM_NODE``, or the name of the program.
        tags: Words by which others may choose nodes.
        servings: The models that it runs, which bound their calls themselves.
        concurrency: How many calls run at a time.
        queue_limit: How many more may wait; beyond that callers get `Overloaded` at once. With a
            store on Redis, as many may wait there too.
        tracebacks: Whether callers are told where a function raised, which may show values;
            None: whether ``HORNBEAM_RPC_TRACEBACKS`` is 1.
        store: Where the registry is; None: the default store.

    Raises:
        ConfigError: a setting makes no sense, or a living process has the name. A name whose
            owner died is taken over at once on the same machine, and within four seconds elsewhere.
        StoreUnavailable: the registry cannot be reached.
    """
    for option, value, least in (("concurrency", concurrency, 1), ("queue_limit", queue_limit, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"node {option}={value!r}: give a whole number, {least} or more")
    made = NodeServer(
        default_store() if store is None else store,
        name,
        tags=tags,
        servings=servings,
        concurrency=concurrency,
        queue_limit=queue_limit,
        tracebacks=os.environ.get(_TRACEBACKS) == "1" if tracebacks is None else tracebacks,
    )
    made.start()
    return made


async def aserve_node(name: str | None = None, **options: Any) -> NodeServer:
    """Awaitable twin of `serve_node`, with the same options."""
    return await asyncio.to_thread(serve_node, name, **options)


def node() -> str:
    """Return the name of this process: that under which it serves, or would serve.

    Raises:
        ConfigError: ``HORNBEAM_NODE`` is no name.
    """
    return _nodes[0].name if _nodes else full_name()


_nodes: list[NodeServer] = []  # of this process, in the order they began to serve


def own_nodes() -> list[NodeServer]:
    """Return the nodes that this process serves."""
    return list(_nodes)


os.register_at_fork(after_in_child=_nodes.clear)
