"""What a failure of Redis means to the caller, and what to do about it."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

from redis import exceptions as driver

from hornbeam_state.errors import StoreError, StoreFull, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterable

FAILURES: Final = (driver.RedisError, OSError, UnicodeError)
"""What talking to a server may raise: the last, when its name is no host name."""

REFUSALS: Final = (
    driver.ResponseError,
    driver.AuthenticationError,
    driver.AuthorizationError,
    driver.BusyLoadingError,
)
"""What is an answer of the server, though the driver may call it a connection error."""


class Stage(enum.Enum):
    """How far a call had come when its connection failed."""

    QUEUED = "queued"  # waiting for one of the connections
    CONNECTING = "connecting"  # nothing of the call was sent
    SENDING = "sending"  # not all of it was sent, so that none of it was done
    WAITING = "waiting"  # it may have been done


class Interrupted(Exception):
    """The connection failed during a call.

    Attributes:
        stage: How far the call had come.
        timed_out: Whether time ran out, instead of the connection ending.
        error: What the driver said.
    """

    def __init__(self, stage: Stage, error: Exception) -> None:
        super().__init__(str(error))
        self.stage = stage
        self.timed_out = isinstance(error, TimeoutError | driver.TimeoutError)
        self.error = error


def explained(stage: Stage, error: Exception) -> Interrupted | driver.RedisError:
    """Tell a server that could not be talked to from one that said no."""
    # An asyncio connection wraps whatever a unix socket's greeting met.
    root = error.__cause__ if isinstance(error.__cause__, driver.RedisError) else error
    return root if isinstance(root, REFUSALS) else Interrupted(stage, root)


_LATER: Final = (driver.TryAgainError, driver.ClusterDownError)
_UNKNOWN: Final = "; the write may or may not have happened"
_NOTHING_DONE: Final = "; nothing was changed"

# An error reply is told by its code, which stands at different places: a script of Redis 6.2
# reports "ERR Error running script (...): -OOM ...", and the driver cuts known codes off.
_REPLIES: Final[tuple[tuple[type[Exception], str, str], ...]] = (
    (
        driver.BusyLoadingError,
        "LOADING ",
        "is loading its data from disk: try again when it is done",
    ),
    (
        driver.ReadOnlyError,
        "READONLY ",
        "is a read-only replica: give the address of the primary in the store URL",
    ),
    (
        driver.MasterDownError,
        "MASTERDOWN ",
        "is a replica that lost its primary: give the address of the primary, or wait for it",
    ),
    (
        driver.NoPermissionError,
        "NOPERM ",
        (
            "does not let this user do that: allow it all commands on keys and channels hb:*, "
            "and all channels for topics that end in * (ACL SETUSER)"
        ),
    ),
    (
        driver.AskError,
        "MOVED ",
        "is a node of a Cluster: use redis+cluster:// in the store URL",
    ),
    (
        driver.ClusterError,
        "CLUSTERDOWN ",
        "is a node of a Cluster: use redis+cluster:// in the store URL",
    ),
    (
        driver.ClusterCrossSlotError,
        "CROSSSLOT ",
        "is a node of a Cluster: use redis+cluster:// in the store URL",
    ),
)


def refused(error: driver.RedisError, where: str) -> StoreError:
    """Translate an error that the server replied; nothing was done."""
    text = str(error)
    if isinstance(error, driver.OutOfMemoryError) or "OOM command not allowed" in text:
        return StoreFull(
            f"{where} is full: free space, raise its maxmemory, or set maxmemory-policy "
            f"volatile-lru so that cache entries make room ({text})"
        )
    if isinstance(error, driver.AuthenticationError | driver.AuthenticationWrongNumberOfArgsError):
        return StoreUnavailable(f"{where} {_about_password(error)} ({text})")
    for kind, code, meaning in _REPLIES:
        if isinstance(error, kind) or text.startswith(code) or f" -{code}" in text:
            return StoreUnavailable(f"{where} {meaning} ({text})")
    return StoreUnavailable(f"{where} refused the command: {text}")


def _about_password(error: driver.RedisError) -> str:
    if error.status_code == "NOAUTH":
        return "asks for a password: write scheme://user:PASSWORD@host in the store URL"
    if "without any password configured" in str(error):
        return "has no password, but the store URL gives one: leave it out"
    return "refused the user name or password in the store URL: correct them"


def unreachable(
    failure: Interrupted, where: str, timeout: float, *, write: bool, said: Iterable[object] = ()
) -> StoreError:
    """Translate a failure of the connection, saying whether a write may have happened.

    Args:
        failure: It.
        where: What messages call the server.
        timeout: Seconds that were waited at most.
        write: Whether the call was one that changes something.
        said: What nodes of a Cluster had answered before to what was asked now.
    """
    outcome = ""
    if write:
        outcome = _UNKNOWN if failure.stage is Stage.WAITING else _NOTHING_DONE
    if isinstance(failure.error, driver.InvalidResponse):
        return StoreUnavailable(
            f"{where} answered something that is not Redis: check host and port ({failure})"
        )
    if failure.stage is Stage.QUEUED:
        return StoreUnavailable(
            f"{where}: all connections of this event loop were busy for {timeout:g} s{outcome}"
        )
    if failure.timed_out:
        waited = next((answer for answer in said if isinstance(answer, _LATER)), None)
        before = f"; before, {_why_later(waited)}" if waited else ""
        return StoreUnavailable(f"{where} did not answer within {timeout:g} s{outcome}{before}")
    if failure.stage is Stage.CONNECTING:
        return StoreUnavailable(
            f"{where} cannot be reached: check that the server runs there ({failure}){outcome}"
        )
    return StoreUnavailable(f"{where} ended the connection ({failure}){outcome}")


def rearranged(answer: object, where: str, timeout: float, *, write: bool) -> StoreUnavailable:
    """Say that a Cluster did not come to serve a slot within the time.

    Args:
        answer: What a node said last, or None when no node serves the slot at all.
        where: What messages call the store.
        timeout: Seconds that were waited at most.
        write: Whether a part of a write may have been done.
    """
    return StoreUnavailable(
        f"{where}: {_why_later(answer)} (a call waits up to {timeout:g} s for that to end)"
        f"{_UNKNOWN if write else ''}"
    )


def _why_later(answer: object) -> str:
    if answer is None or isinstance(answer, driver.ClusterDownError):
        reason = "no node serves some of its slots"
    else:
        reason = "a slot is on its way to another node"
    return f"{reason}: see what CLUSTER INFO says"


def not_tried(where: str, pause: float, *, write: bool = False) -> StoreError:
    """Say that the circuit breaker spared the server a call, or the rest of a write."""
    return StoreUnavailable(
        f"{where} could not be reached just now: the next try is in {pause:.2g} s"
        f"{_UNKNOWN if write else ''}"
    )


def may_have_happened(error: BaseException) -> bool:
    """Return whether the call that raised `error` may have been done nevertheless."""
    if isinstance(error, StoreUnavailable):
        cause = error.__cause__
        return isinstance(cause, Interrupted) and cause.stage is Stage.WAITING
    return not isinstance(error, Exception)  # cancelled, or interrupted by a signal
