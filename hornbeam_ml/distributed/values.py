"""Inputs and results of functions that work on lists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hornbeam_ml.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def as_sequence(inputs: Iterable[Any]) -> Sequence[Any]:
    """Return inputs as a list; an array or a tensor as it is, to be cut along its first axis.

    Raises:
        TypeError: they are one text or a mapping, or not iterable.
    """
    if isinstance(inputs, list) or getattr(inputs, "shape", None):
        return inputs  # type: ignore[return-value]  # an array is no Sequence, and works as one
    if isinstance(inputs, str | bytes | bytearray | dict):
        raise TypeError(f"inputs are a list of items, not a {type(inputs).__name__}")
    return list(inputs)


def checked_results(results: Any, count: int) -> list[Any]:
    """Return what a function returned as a list.

    Raises:
        ModelError: it is not one result for each item.
    """
    if not (isinstance(results, list | tuple) or getattr(results, "shape", None)):
        raise ModelError(
            f"a function that gets a list has to return one, not a {type(results).__name__}"
        )
    if len(results) != count:
        raise ModelError(f"{len(results)} results came back for {count} items")
    return list(results)
