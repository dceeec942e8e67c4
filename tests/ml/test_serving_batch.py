"""Items to batches and back, and what an error of a model means: pure functions."""

from __future__ import annotations

import asyncio
import errno
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hornbeam_ml import DeadlineExceeded, ModelError
from hornbeam_ml.serving.batch import bucket_for, chunks_of, difference, signature, split, stack
from hornbeam_ml.serving.failures import copies, is_about_data


class Pair(NamedTuple):
    left: Any
    right: Any


def same(left, right):
    """Whether two trees of arrays are the same in types, dtypes, shapes and values."""
    if isinstance(left, dict):
        return (
            type(left) is type(right)
            and left.keys() == right.keys()
            and all(same(left[name], right[name]) for name in left)
        )
    if isinstance(left, tuple):
        return type(left) is type(right) and all(map(same, left, right))
    left, right = np.asarray(left), np.asarray(right)
    return left.dtype == right.dtype and np.array_equal(left, right)


TREES = [
    pytest.param(lambda n: np.full((2, 3), n, np.float16), id="array"),
    pytest.param(lambda n: np.float32(n), id="numpy scalar"),
    pytest.param(lambda n: np.array(n), id="array without axes"),
    pytest.param(lambda n: n, id="int"),
    pytest.param(lambda n: n / 2, id="float"),
    pytest.param(lambda n: bool(n % 2), id="bool"),
    pytest.param(lambda n: np.array(["text", str(n)]), id="array of text"),
    pytest.param(lambda n: {"ids": np.arange(3) + n, "mask": np.ones(3, bool)}, id="dict"),
    pytest.param(lambda n: (np.zeros(2) + n, {"x": np.ones(1, np.int8) * n}), id="nested"),
    pytest.param(lambda n: Pair(np.zeros(2) + n, n), id="named tuple"),
    pytest.param(lambda n: (), id="empty tuple"),
]


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize(("count", "size"), [(1, 1), (3, 3), (3, 4), (1, 8)])
def test_what_is_stacked_comes_apart_the_same(tree, count, size):
    """Padding is trimmed."""
    items = [tree(number) for number in range(count)]
    assert len({signature(item) for item in items}) == 1
    rows = split(stack(items, size), count, size, trees=True)
    assert len(rows) == count
    assert all(same(row, item) for row, item in zip(rows, items, strict=True))


def test_padding_repeats_the_last_row():
    """Valid data, which no model refuses."""
    assert stack([np.array([1]), np.array([2])], 4).tolist() == [[1], [2], [2], [2]]


def test_tensors_are_stacked_and_come_apart_the_same():
    torch = pytest.importorskip("torch")
    items = [{"x": torch.full((2,), float(number))} for number in range(3)]
    batch = stack(items, 4)
    assert batch["x"].shape == (4, 2)
    rows = split(batch, 3, 4, trees=True)
    assert all(torch.equal(row["x"], item["x"]) for row, item in zip(rows, items, strict=True))
    assert signature(items[0]) != signature({"x": torch.zeros(2, dtype=torch.float16)})
    assert signature(items[0]) != signature({"x": np.zeros(2, np.float32)})


@pytest.mark.parametrize("kind", ["array", "tensor", "tensor of one row"])
def test_rows_are_the_callers_own(kind):
    """A model that uses its output's memory again changes no result of before."""
    if kind == "array":
        result = np.arange(6).reshape(3, 2)
    else:
        torch = pytest.importorskip("torch")
        result = torch.ones(1, 2).expand(3, 2) if kind.endswith("row") else torch.ones(3, 2)
    for trees in (True, False):
        first, second, _ = split(result, 3, 3, trees=trees)
        expected = second.tolist()
        first += 7
        assert second.tolist() == expected
    if kind == "array":
        result[:] = 0
        assert second.tolist() == expected


def test_the_order_of_names_makes_no_difference():
    left = {"a": np.zeros(1), "b": np.ones(2)}
    right = OrderedDict(b=np.ones(2), a=np.zeros(1))
    assert signature(left) == signature(right)
    assert stack([left, right], 2)["b"].tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("left", "right", "told"),
    [
        pytest.param(np.zeros(2), np.zeros(3), r"item is .*\(3,\), expected .*\(2,\)", id="shape"),
        pytest.param(np.zeros(2), np.zeros(2, "f4"), "item is .*<f4.*expected .*<f8", id="dtype"),
        pytest.param(np.zeros(2, "<i4"), np.zeros(2, ">i4"), ">i4", id="byte order"),
        pytest.param(1, 1.0, "<f8", id="int and float"),
        pytest.param({"x": np.zeros(2)}, {"x": np.zeros(1)}, r"item\['x'\] is", id="inside a dict"),
        pytest.param({"x": 1}, {"y": 1}, "a dict with 'y', expected a dict with 'x'", id="names"),
        pytest.param((1, 2), (1,), "a tuple with 0, expected a tuple with 0, 1", id="length"),
        pytest.param((1, (2,)), (1, (2.0,)), r"item\[1\]\[0\] is", id="deep inside"),
        pytest.param({"x": 1}, np.zeros(2), "expected a dict with 'x'", id="kind"),
        pytest.param(Pair(1, 2), (1, 2), "a tuple with 0, 1, expected a Pair", id="tuple type"),
    ],
)
def test_unlike_items_have_other_signatures_and_it_is_said_where(left, right, told):
    expected, found = signature(left), signature(right)
    assert expected != found
    with pytest.raises(ValueError, match=told):
        raise ValueError(difference(expected, found))


@pytest.mark.parametrize(
    "item",
    [
        pytest.param("text", id="text"),
        pytest.param([1, 2], id="list"),
        pytest.param(None, id="nothing"),
        pytest.param({"x": [1]}, id="list inside"),
        pytest.param(np.array([None]), id="objects"),
        pytest.param(2**70, id="int beyond 64 bits"),
        pytest.param(np.ma.masked_array([1, 2], [True, False]), id="masked array"),
    ],
)
def test_what_cannot_be_stacked_exactly_is_refused(item):
    with pytest.raises(ValueError, match="an item to stack is an array"):
        signature(item)


@pytest.mark.parametrize(
    ("result", "trees"),
    [
        pytest.param(None, True, id="nothing"),
        pytest.param(np.float64(1), True, id="a number"),
        pytest.param(np.array(1), False, id="an array without axes"),
        pytest.param(np.zeros((2, 3)), True, id="too few rows"),
        pytest.param({"x": np.zeros((2, 3))}, True, id="too few rows inside"),
        pytest.param({"x": np.zeros(3)}, False, id="a dict for a list"),
        pytest.param("abc", True, id="text of that length"),
        pytest.param(b"abc", False, id="bytes of that length"),
        pytest.param({1, 2, 3}, False, id="a set"),
        pytest.param(iter([1, 2, 3]), False, id="an iterator"),
        pytest.param([1, 2, 3, 4], False, id="too many"),
    ],
)
def test_anything_but_one_result_for_each_row_is_an_error(result, trees):
    with pytest.raises(ModelError, match="the model returned"):
        split(result, 3, 3, trees=trees)


def test_a_list_or_tuple_holds_results_as_they_are():
    rows = [object(), object()]
    assert split(rows, 2, 2, trees=False) == rows
    assert split(tuple(rows), 2, 2, trees=False) == rows
    assert split([*rows, "padding"], 2, 3, trees=True) == rows


@given(st.integers(0, 50), st.integers(1, 9))
def test_pieces_hold_everything_in_order(count, size):
    pieces = list(chunks_of(range(count), size))
    assert [item for piece in pieces for item in piece] == list(range(count))
    assert all(0 < len(piece) <= size for piece in pieces)
    assert len(pieces) == -(-count // size)


def test_the_next_bucket():
    assert [bucket_for(count, (1, 4, 16)) for count in (1, 2, 4, 5, 16)] == [1, 4, 4, 16, 16]
    assert bucket_for(3, None) == 3


class ConnectError(Exception):
    """As in httpx."""


class SpecialConnectError(ConnectError):
    """One that derives from it."""


class OutOfMemoryError(RuntimeError):
    """As in torch."""


class UnidentifiedImageError(OSError):
    """As in Pillow: an OSError about an image."""


def raised_from(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "about_data"),
    [
        (ValueError("bad text"), True),
        (TypeError("a number is needed"), True),
        (KeyError("name"), True),
        (ZeroDivisionError(), True),
        (RuntimeError("shapes cannot be multiplied"), True),
        (RuntimeError("stack expects each tensor to be equal size"), True),
        (AssertionError(), True),
        (RecursionError(), True),
        (FileNotFoundError(errno.ENOENT, "no such file"), True),
        (PermissionError(errno.EACCES, "denied"), True),
        (OSError("image file is truncated"), True),
        (UnidentifiedImageError("cannot identify image file"), True),
        (StopIteration(), True),
        (MemoryError(), False),
        (ConnectionResetError(), False),
        (BrokenPipeError(), False),
        (TimeoutError(), False),
        (OSError(errno.ENOSPC, "no space left"), False),
        (OSError(errno.EMFILE, "too many open files"), False),
        (OSError(errno.EIO, "input/output error"), False),
        (ConnectError("refused"), False),
        (SpecialConnectError("refused"), False),
        (OutOfMemoryError("Tried to allocate 2 GiB"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("CUDA out of memory."), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("CUBLAS_STATUS_NOT_INITIALIZED when calling cublasCreate"), False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), False),
        (raised_from(RuntimeError("embedding failed"), ConnectionRefusedError()), False),
        (raised_from(RuntimeError("bad row"), ValueError("bad")), True),
        (NameError("name 'x' is not defined"), False),
        (ImportError("no module"), False),
        (NotImplementedError(), False),
        (ModelError("another model failed"), False),
        (DeadlineExceeded("late"), False),
        (KeyboardInterrupt(), False),
        (SystemExit(), False),
        (asyncio.CancelledError(), False),
    ],
    ids=lambda value: repr(value)[:50],
)  # fmt: skip
def test_which_errors_are_about_the_data(error, about_data):
    assert is_about_data(error) is about_data


class Picky(Exception):
    """An exception that cannot be made from its arguments."""

    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")


def test_copies_of_an_error_are_alike_and_apart():
    try:
        raise ValueError("bad") from KeyError("cause")
    except ValueError as error:
        original = error
    first, second, third = copies(original, 3)
    assert first is original
    assert len({id(first), id(second), id(third)}) == 3
    assert (type(second), second.args) == (ValueError, ("bad",))
    assert second.__cause__ is original.__cause__
    assert second.__traceback__ is original.__traceback__
    assert copies(original, 0) == []
    picky = Picky(1, "x")
    assert copies(picky, 2) == [picky, picky]
