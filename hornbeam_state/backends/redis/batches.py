"""Commands, and how an operation asks for them. No sockets here.

An operation is a generator: it yields `Batch`es, is sent their replies and returns the result, so
that the sync and the async connection run the very same code.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from redis.exceptions import NoScriptError

if TYPE_CHECKING:
    from hornbeam_state.backends.redis.scripts import Script

T = TypeVar("T")


class Command(NamedTuple):
    """One Redis command.

    Attributes:
        words: What is sent.
        bucket: The bucket of its keys, which says where a Cluster takes it; None when any
            primary may answer.
        script: The script that it calls by its digest, if it does.
    """

    words: tuple[bytes, ...]
    bucket: int | None = None
    script: Script | None = None

    def in_full(self) -> Command:
        """Return the same call with the script's text instead of its digest."""
        if self.script is None:
            return self
        return Command((b"EVAL", self.script.text, *self.words[2:]), self.bucket)


class Batch(NamedTuple):
    """Commands that are sent together.

    Attributes:
        commands: What to send.
        repeatable: Whether doing it twice comes to the same as doing it once.
        whole: Whether nothing is done unless the last byte arrives: true of a single command,
            since a server waits for all of it, and of MULTI ... EXEC.
        independent: Whether a server that cannot be reached fails its own commands only: their
            replies are then a `StoreError`.
    """

    commands: Sequence[Command]
    repeatable: bool
    whole: bool
    independent: bool = False

    @property
    def is_transaction(self) -> bool:
        """Whether the commands are done together or not at all."""
        return self.whole and len(self.commands) > 1


class OnEachPrimary(NamedTuple):
    """Asks for an operation on every primary there is; the results are sent back in a list.

    Attributes:
        operation: Makes the operation, from what messages call the primary. Its commands without
            a bucket go to that primary.
    """

    operation: Callable[[str], Steps[Any]]


Steps: TypeAlias = Generator[Batch | OnEachPrimary, list[Any], T]
"""An operation: yields batches, is sent one reply per command (errors as values)."""


def call(script: Script, bucket: int, keys: Sequence[bytes], *args: bytes) -> Command:
    """Return the command that runs `script` on keys of a bucket."""
    words = (b"EVALSHA", script.sha, b"%d" % len(keys), *keys, *args)
    return Command(words, bucket, script)


def ask(*commands: Command, repeatable: bool = False) -> Steps[list[Any]]:
    """Send the commands together and return their replies; raise the first that is an error."""
    batch = Batch(commands, repeatable, len(commands) == 1)
    replies = yield batch
    for reply in replies:
        if isinstance(reply, Exception):
            yield from _ask_in_full(batch, replies)
            _raise_first_error(replies)
            break
    return replies


def ask_independently(commands: Sequence[Command], *, repeatable: bool = True) -> Steps[list[Any]]:
    """Send commands together and return for each its reply, or the error it met."""
    batch = Batch(commands, repeatable, whole=len(commands) == 1, independent=True)
    replies = yield batch
    yield from _ask_in_full(batch, replies)
    return replies


def _ask_in_full(batch: Batch, replies: list[Any]) -> Steps[None]:
    """Call the scripts that a server did not know by their text, and replace their replies."""
    unknown = [n for n, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
    if unknown:
        again = tuple(batch.commands[n].in_full() for n in unknown)
        answers = yield batch._replace(commands=again, whole=len(again) == 1)
        for n, answer in zip(unknown, answers, strict=True):
            replies[n] = answer


def ask_all_or_none(commands: Sequence[Command]) -> Steps[list[Any]]:
    """Send the commands as one transaction and return their replies. Not for a Cluster.

    A call of an unknown script would fail inside the transaction while the others go through, so
    the scripts are loaded ahead of it.
    """
    texts = {command.script.sha: command.script.text for command in commands if command.script}
    loads = [Command((b"SCRIPT", b"LOAD", text)) for text in texts.values()]
    wrapped = [*loads, Command((b"MULTI",)), *commands, Command((b"EXEC",))]
    replies = yield Batch(wrapped, repeatable=False, whole=True)
    _raise_first_error(replies)
    results: list[Any] = replies[-1]
    _raise_first_error(results)
    return results


def _raise_first_error(replies: Sequence[Any]) -> None:
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
