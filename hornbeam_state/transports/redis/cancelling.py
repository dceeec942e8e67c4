"""Taking calls out of the streams of nodes again, and telling nodes what nobody waits for."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from hornbeam_state.backends.redis.batches import ask_independently, call
from hornbeam_state.errors import StoreError
from hornbeam_state.transports.redis import scripts
from hornbeam_state.transports.redis.envelope import cancellation
from hornbeam_state.transports.redis.keys import GROUP, cancel_topic
from hornbeam_state.waking import wake

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from hornbeam_state.backends.redis.backend import RedisBackend
    from hornbeam_state.transports.redis.pending import Pending, Route, Table

logger = logging.getLogger("hornbeam.transport")


class End(NamedTuple):
    """A call that is to be cancelled.

    Attributes:
        call: The call.
        error: Makes what its caller gets, given whether the node may have begun to run it; None:
            the caller has gone.
    """

    call: Pending
    error: Callable[[bool], Exception] | None


class Canceller:
    """Cancels calls. Thread-safe, and blocks.

    Args:
        backend: The store.
        table: The calls that have no answer yet.
    """

    def __init__(self, backend: RedisBackend, table: Table) -> None:
        self._backend = backend
        self._table = table

    def end(self, ends: Sequence[End]) -> None:
        """Cancel calls; tell each caller who waits, and each node that runs one of them."""
        ends = [end for end in ends if end.error is None or not end.call.done]
        started = self._cancel([end.call for end in ends])
        failed = []
        for end, begun in zip(ends, started, strict=True):
            if end.error is not None and self._table.take(end.call):
                end.call.fail(end.error(begun))
                failed.append(end.call)
        wake(failed)
        never_ran = [end.call for end, begun in zip(ends, started, strict=True) if not begun]
        remove_values(self._backend, never_ran)
        self._tell_nodes([end.call for end, begun in zip(ends, started, strict=True) if begun])

    def _cancel(self, calls: Sequence[Pending]) -> list[bool]:
        """Take calls out of their streams; return for each whether it may have begun."""
        added = [one for one in calls if one.entry is not None]
        commands = []
        for one in added:
            keys = one.route.keys
            commands.append(
                call(scripts.CANCEL, keys.bucket, (keys.calls,), GROUP, one.entry or b"")
            )
        begun = {one.number: one.tried for one in calls}
        try:
            replies = self._backend.link.run(ask_independently(commands)) if commands else []
        except StoreError as error:
            logger.warning("%d calls cannot be cancelled: %s", len(commands), error)
            replies = []
        for one, reply in zip(added, replies, strict=False):
            if isinstance(reply, int):  # else an error
                begun[one.number] = not reply
        return [begun[one.number] for one in calls]

    def _tell_nodes(self, calls: Iterable[Pending]) -> None:
        by_route: dict[int, tuple[Route, list[bytes]]] = {}
        for one in calls:
            by_route.setdefault(id(one.route), (one.route, []))[1].append(one.id)
        for route, ids in by_route.values():
            message = cancellation(route.secret, route.node, ids)
            try:
                self._backend.publish(cancel_topic(route.node), message)
            except StoreError as error:
                logger.warning("%s cannot be told of cancelled calls: %s", route.node, error)


def remove_values(backend: RedisBackend, calls: Iterable[Pending]) -> None:
    """Remove the large values of calls that nobody will run."""
    commands = [call.leftover for call in calls if call.leftover is not None]
    if commands:
        try:
            backend.link.run(ask_independently(commands))
        except StoreError as error:
            logger.warning("values of cancelled calls stay until they expire: %s", error)
