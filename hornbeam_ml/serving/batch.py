"""Items to batches and results back: stack, pad, trim, take apart. Pure functions.

Items and results may be trees: dicts and tuples of arrays (numpy's, torch's) and of numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from hornbeam_ml.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

_ARRAYS: Final = (np.ndarray, np.generic, bool, int, float)
_NAMES_SHOWN: Final = 3


class Leaf(NamedTuple):
    """What of an array two items of one batch have in common."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    device: str = ""

    def __str__(self) -> str:
        place = f" on {self.device}" if self.device else ""
        return f"{self.kind} of {self.dtype}, shape {self.shape}{place}"


def signature(item: Any) -> Hashable:
    """Return the shapes and dtypes of an item: items with equal ones can be stacked.

    Raises:
        ValueError: it holds something that is no array, or an array of objects.
    """
    if isinstance(item, Mapping):
        # In an order of the names: two dicts may hold the same in another order.
        names = sorted(item, key=repr)
        return "dict", *((name, signature(item[name])) for name in names)
    if isinstance(item, tuple):
        return type(item), *((number, signature(part)) for number, part in enumerate(item))
    return _leaf(item)


def difference(expected: Any, found: Any, path: str = "item") -> str:
    """Say where the signature of an item is not the one expected."""
    if isinstance(expected, Leaf) or isinstance(found, Leaf):
        return f"{path} is {_brief(found)}, expected {_brief(expected)}"
    for here, there in zip(expected, found, strict=False):
        if here != there and isinstance(here, tuple) and isinstance(there, tuple):
            if here[0] == there[0] and not isinstance(here, Leaf):
                return difference(here[1], there[1], f"{path}[{here[0]!r}]")
            break
    return f"{path} is {_brief(found)}, expected {_brief(expected)}"


def bucket_for(count: int, buckets: Sequence[int] | None) -> int:
    """Return the number of rows that a batch of `count` items is padded to."""
    return next((size for size in buckets or () if size >= count), count)


def stack(items: Sequence[Any], size: int) -> Any:
    """Return items of one signature as one tree with a new first axis of `size` rows.

    Rows without an item repeat the last one: valid data, which no model refuses.
    """
    padded = [*items, *[items[-1]] * (size - len(items))]
    return _stack(padded)


def split(result: Any, count: int, size: int, *, trees: bool) -> list[Any]:
    """Return the results of the first `count` of `size` rows.

    Rows of an array are copies: a model may use its output's memory again, and a caller who
    changes its row changes nobody else's.

    Args:
        result: What the model returned.
        count: How many items the batch held.
        size: How many rows it was padded to.
        trees: Whether dicts and tuples are trees of arrays; else a tuple is a row of results.

    Raises:
        ModelError: it is not one result for each row.
    """
    if type(result) is list and len(result) == size:
        return result[:count]
    if trees and isinstance(result, Mapping):
        names, columns = (
            list(result),
            [split(column, count, size, trees=True) for column in result.values()],
        )
        return [dict(zip(names, row, strict=True)) for row in _rows(columns, count)]
    if trees and isinstance(result, tuple):
        columns = [split(column, count, size, trees=True) for column in result]
        return [_rebuild(result, row) for row in _rows(columns, count)]
    if isinstance(result, Mapping | str | bytes | set | frozenset) or not _has_length(result):
        raise ModelError(f"the model returned {_type(result)} instead of {size} results")
    if len(result) != size:
        raise ModelError(f"the model returned {len(result)} results for {size} items")
    if isinstance(result, np.ndarray):
        rows = list(result[:count])
        return [row.copy() if isinstance(row, np.ndarray) else row for row in rows]
    if _is_tensor(result):
        return [row.clone() for row in result[:count]]
    return list(result)[:count]


def chunks_of(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Cut a sequence into pieces of at most `size`."""
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _leaf(value: Any) -> Leaf:
    # Stacking would drop a mask, and a matrix keeps no other shape than its two axes.
    if isinstance(value, _ARRAYS) and not isinstance(value, np.ma.MaskedArray | np.matrix):
        array = np.asarray(value)
        if not array.dtype.hasobject:
            return Leaf("array", array.dtype.str, array.shape)
    elif _is_tensor(value):
        return Leaf("tensor", str(value.dtype), tuple(value.shape), str(value.device))
    raise ValueError(
        f"an item to stack is an array, or a dict or tuple of arrays; found {_type(value)}"
    )


def _stack(items: list[Any]) -> Any:
    first = items[0]
    if isinstance(first, Mapping):
        return {name: _stack([item[name] for item in items]) for name in first}
    if isinstance(first, tuple):
        return _rebuild(first, [_stack([item[n] for item in items]) for n in range(len(first))])
    if _is_tensor(first):
        return sys.modules["torch"].stack(items)
    return np.stack(items) if isinstance(first, np.ndarray) else np.array(items)


def _rows(columns: list[list[Any]], count: int) -> list[tuple[Any, ...]]:
    return list(zip(*columns, strict=True)) if columns else [()] * count


def _rebuild(like: tuple[Any, ...], parts: Sequence[Any]) -> Any:
    if hasattr(like, "_fields"):  # a named tuple
        return type(like)(*parts)
    return tuple(parts)


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    tensor = getattr(torch, "Tensor", None)  # absent while torch is being imported
    return tensor is not None and isinstance(value, tensor)


def _has_length(value: Any) -> bool:
    return hasattr(value, "__len__") and not (isinstance(value, np.ndarray) and value.ndim == 0)


def _type(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _brief(found: Any) -> str:
    if isinstance(found, Leaf):
        return str(found)
    kind, *parts = found
    names = ", ".join(repr(name) for name, _ in parts[:_NAMES_SHOWN])
    return f"a {kind if isinstance(kind, str) else kind.__name__} with {names or 'nothing'}"
