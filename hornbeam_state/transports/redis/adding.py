"""Adding calls to the streams of nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from redis.exceptions import RedisError

from hornbeam_state.backends.redis.batches import ask_independently
from hornbeam_state.backends.redis.errors import may_have_happened, refused
from hornbeam_state.errors import NodeDown, StoreError, StoreUnavailable
from hornbeam_state.transports.redis import scripts
from hornbeam_state.transports.redis.cancelling import remove_values
from hornbeam_state.transports.redis.line import UNKNOWN_SCRIPT
from hornbeam_state.transports.redis.outgoing import full

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hornbeam_state.backends.redis.backend import RedisBackend
    from hornbeam_state.backends.redis.batches import Command
    from hornbeam_state.transports.redis.outgoing import Outgoing
    from hornbeam_state.transports.redis.pending import Clock, Pending


class Adder:
    """Adds calls. Thread-safe, and blocks.

    Args:
        backend: The store.
        clock: The server's clock.
        left: Called with a call that was added after its caller had left.
    """

    def __init__(
        self, backend: RedisBackend, clock: Clock, left: Callable[[Pending], None]
    ) -> None:
        self._backend = backend
        self._clock = clock
        self._left = left

    def prepare(self, call: Pending) -> Command | None:
        """Return what adds a call, which is to be sent at once; None: its caller has left.

        Raises:
            NodeDown: its large values cannot be sent.
        """
        message: Outgoing | None = call.message
        if message is None:
            return None
        call.leftover = message.take_back()
        try:
            self._backend.link.run(message.upload())
        except StoreError as error:
            raise _not_sent(error) from error
        return message.add(self._clock.now)

    def add(self, calls: Sequence[Pending]) -> list[Exception | None]:
        """Send calls together; return for each what went wrong."""
        outcomes = self._try_to_add(calls)
        for number, outcome in enumerate(outcomes):
            if outcome is AGAIN:
                outcomes[number] = self._try_to_add([calls[number]])[0]
                if outcomes[number] is AGAIN:
                    outcomes[number] = _not_sent(StoreUnavailable("its clock jumps"))
        return outcomes

    def _try_to_add(self, calls: Sequence[Pending]) -> list[Exception | None]:
        outcomes: list[Exception | None] = [None] * len(calls)  # who has left gets nothing
        to_send = []
        for number, call in enumerate(calls):
            try:
                command = self.prepare(call)
            except NodeDown as error:
                outcomes[number] = error
            else:
                if command is not None:
                    to_send.append((number, command))
        if not to_send:
            return outcomes
        for number, _ in to_send:
            calls[number].tried = True
        try:
            commands = [command for _, command in to_send]
            replies = self._backend.link.run(ask_independently(commands, repeatable=False))
        except StoreError as error:
            replies = [error] * len(to_send)
        for (number, _), reply in zip(to_send, replies, strict=True):
            outcomes[number] = self.added(calls[number], reply)
        return outcomes

    def added(self, call: Pending, reply: Any) -> Exception | None:
        """Take note of the reply to what `prepare` returned; return what went wrong.

        `AGAIN` means that nothing was done, and that `add` may succeed.
        """
        if isinstance(reply, Exception):
            return self._failed(reply)
        now, what, detail = reply
        self._clock.set(now)
        if what == scripts.WRONG_CLOCK:
            return AGAIN
        if what != scripts.ADDED:
            call.tried = False
            remove_values(self._backend, [call])
            return full(call.route.node, detail) if what == scripts.FULL else None
        call.entry, call.message = detail, None  # which may hold large arrays
        if call.done:  # its caller left meanwhile
            self._left(call)
        return None

    def _failed(self, reply: Exception) -> Exception:
        if isinstance(reply, StoreError):
            return _not_sent(reply, maybe=may_have_happened(reply))
        if not isinstance(reply, RedisError):
            return _not_sent(StoreUnavailable(f"the connection was lost: {reply}"), maybe=True)
        if str(reply).startswith(UNKNOWN_SCRIPT):
            return AGAIN
        return _not_sent(refused(reply, self._backend.config.safe_url))


def _not_sent(error: StoreError, *, maybe: bool = False) -> NodeDown:
    down = NodeDown(f"the call cannot be sent: {error}")
    down.sent = maybe
    down.__cause__ = error
    return down


AGAIN: Final = NodeDown("the server's clock is another one")
