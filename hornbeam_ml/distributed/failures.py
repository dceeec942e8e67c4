"""What an error of a chunk means: for the chunk, and for the node that it ran on."""

from __future__ import annotations

from enum import Enum, auto

from hornbeam_state.errors import (
    DeadlineExceeded,
    NodeDown,
    NotExposed,
    Overloaded,
    StoreUnavailable,
)


class Failure(Enum):
    """Why a chunk has no results."""

    GONE = auto()
    """Nothing can be had from the node for now."""
    LATE = auto()
    """It did not answer in time; nothing else is asked of it for now."""
    BUSY = auto()
    """It had no room; it is asked again in a moment."""
    WRONG = auto()
    """The function failed, or what it returned is of no use. The items may be to blame."""


def failure_of(error: BaseException) -> Failure:
    """Return what an error of a call to a node means."""
    match error:
        case DeadlineExceeded():
            return Failure.LATE
        case Overloaded():
            return Failure.BUSY
        case NodeDown() | NotExposed() | StoreUnavailable():
            return Failure.GONE
        case _:
            return Failure.WRONG
