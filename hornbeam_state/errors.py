"""The exceptions of hornbeam, and the marker for an absent value.

A caller branches on what it can do about a failure::

    HornbeamError
    ├── ConfigError (ValueError)         fix the setting that the message names
    ├── StoreError
    │   ├── StoreUnavailable             retry later; the message says whether a write may be in
    │   ├── StoreFull                    free space or raise the limit
    │   ├── CodecError (TypeError)       a value of an unknown type, or damaged bytes
    │   └── KeyTooLong (ValueError)      shorten the key
    ├── WrongType (TypeError)            the key holds something else than a counter
    ├── CounterOverflow (OverflowError)  the counter would leave 64 bits
    ├── LockTimeout (TimeoutError)       someone else held the lock for all of the timeout
    ├── LockLost                         the lock passed to someone else while it was held
    ├── Overloaded                       a queue is full: retry later (HTTP 503)
    ├── DeadlineExceeded (TimeoutError)  too late (HTTP 504)
    └── RpcError
        ├── NodeDown                     the node is gone
        ├── NotExposed                   the node does not offer that function
        └── RemoteError                  the function raised there
"""

from __future__ import annotations

from typing import Final, final


class HornbeamError(Exception):
    """Base of every error hornbeam raises on its own account."""


class ConfigError(HornbeamError, ValueError):
    """A setting is wrong; the message names it and says how to mend it."""


class StoreError(HornbeamError):
    """The shared store could not do what was asked."""


class StoreUnavailable(StoreError):
    """The store cannot be reached, opened or locked in time."""


class StoreFull(StoreError):
    """The store, or the disk under it, has no room for the value."""


class CodecError(StoreError, TypeError):
    """A value cannot be encoded, or bytes cannot be decoded."""


class KeyTooLong(StoreError, ValueError):
    """A key is longer than 4,096 bytes of UTF-8."""


class WrongType(HornbeamError, TypeError):
    """A counter operation met a value that is not a 64-bit integer."""


class CounterOverflow(HornbeamError, OverflowError):
    """A counter would leave the range of a signed 64-bit integer; it was not changed."""


class LockTimeout(HornbeamError, TimeoutError):
    """A lock was held by someone else for the whole timeout."""


class LockLost(HornbeamError):
    """A lock expired and may have been taken by someone else before it was released."""


class Overloaded(HornbeamError):
    """A bounded queue is full.

    Attributes:
        sent: Whether the work may have begun; if not, it is safe to have it done elsewhere.
        retry_after_s: In how many seconds another try makes sense; what HTTP clients are told.
    """

    sent: bool = True
    retry_after_s: float = 1.0

    @classmethod
    def refusal(cls, message: str) -> Overloaded:
        """Return the error for work that was refused before it began."""
        error = cls(message)
        error.sent = False
        return error


class DeadlineExceeded(HornbeamError, TimeoutError):
    """The deadline passed before the work was done.

    Attributes:
        sent: Whether it may have been begun; if not, it is safe to try again.
    """

    sent: bool = True


class RpcError(HornbeamError):
    """A call to another node failed."""


class NodeDown(RpcError):
    """The node is gone, or cannot be reached.

    Attributes:
        sent: Whether the call may have reached it; if not, it is safe to try again.
        retry_after_s: In how many seconds another try makes sense; what HTTP clients are told.
    """

    sent: bool = True
    retry_after_s: float = 1.0


class NotExposed(RpcError):
    """The node does not expose the function."""


class RemoteError(RpcError):
    """The function raised on the other node.

    Attributes:
        remote_type: Name of the exception's type there.
        remote_message: Its message.
        remote_traceback: Where it was raised, if the node was asked to tell.
    """

    remote_traceback: str | None = None

    def __init__(self, remote_type: str, remote_message: str) -> None:
        super().__init__(f"{remote_type}: {remote_message}")
        self.remote_type = remote_type
        self.remote_message = remote_message


@final
class Missing:
    """Type of `MISSING`, which marks absence where `None` is a value like any other."""

    _instance: Missing | None = None

    def __new__(cls) -> Missing:
        """Return the one instance."""
        if cls._instance is None:
            cls._instance = super().__new__(cls)
        return cls._instance

    def __repr__(self) -> str:
        return "MISSING"

    def __bool__(self) -> bool:
        return False

    def __reduce__(self) -> str:
        return "MISSING"


MISSING: Final = Missing()
