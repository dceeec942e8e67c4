"""Errors as data: what comes back, and what bytes of others can do."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hornbeam_state import codec, errors
from hornbeam_state.errors import CodecError, HornbeamError, NodeDown, Overloaded, RemoteError
from hornbeam_state.transports.failures import dump_failure, load_failure, register_error


class Counted(HornbeamError):
    """An error with a constructor that takes no less than two arguments."""

    def __init__(self, name, count):
        super().__init__(f"{name}: {count}")
        self.name, self.count, self.thing = name, count, object()


class Foreign(Exception):
    pass


class Silent(Exception):
    def __str__(self):
        raise RuntimeError


register_error(Counted)


def catch(fn):
    try:
        fn()
    except Exception as error:
        return error


class Odd:
    def __repr__(self):
        return "<odd>"


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(ValueError("text", 7), id="args"),
        pytest.param(ValueError(), id="none"),
        pytest.param(KeyError("name"), id="KeyError"),
        pytest.param(KeyError(Odd()), id="KeyError of an object"),
        pytest.param(ValueError(Odd()), id="of an object"),
        pytest.param(catch(lambda: Path("/no/such/file").read_text()), id="FileNotFoundError"),
        pytest.param(catch(lambda: b"\xff".decode()), id="UnicodeDecodeError"),
        pytest.param(SyntaxError("bad", ("f.py", 1, 2, "x")), id="SyntaxError"),
        pytest.param(TimeoutError("late"), id="TimeoutError"),
        pytest.param(errors.DeadlineExceeded("late"), id="DeadlineExceeded"),
        pytest.param(errors.ConfigError("wrong"), id="ConfigError"),
        pytest.param(RemoteError("Foreign", "far away"), id="RemoteError"),
        pytest.param(Counted("a", 2), id="registered"),
    ],
)
def test_an_error_comes_back_as_it_was(error):
    copy = load_failure(dump_failure(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.__cause__ is copy.__context__ is copy.__traceback__ is None


def test_plain_attributes_come_along():
    down = NodeDown("gone")
    down.sent, down.retry_after_s = False, 2.5
    copy = load_failure(dump_failure(down))
    assert (copy.sent, copy.retry_after_s) == (False, 2.5)
    full = Overloaded("full")
    full.retry_after_s = 9.0
    assert load_failure(dump_failure(full)).retry_after_s == 9.0
    assert vars(load_failure(dump_failure(Counted("a", 2)))) == {"name": "a", "count": 2}


@pytest.mark.parametrize(
    ("error", "name", "message"),
    [
        pytest.param(Foreign("far"), "Foreign", "far", id="foreign"),
        pytest.param(StopIteration(3), "StopIteration", "3", id="StopIteration"),
        pytest.param(StopAsyncIteration(), "StopAsyncIteration", "", id="StopAsyncIteration"),
        pytest.param(SystemExit(1), "SystemExit", "1", id="SystemExit"),
        pytest.param(KeyboardInterrupt(), "KeyboardInterrupt", "", id="KeyboardInterrupt"),
        pytest.param(GeneratorExit(), "GeneratorExit", "", id="GeneratorExit"),
        pytest.param(asyncio.CancelledError("x"), "CancelledError", "x", id="CancelledError"),
        pytest.param(
            ExceptionGroup("g", [ValueError()]), "ExceptionGroup", "g (1 sub-exception)", id="group"
        ),
        pytest.param(Silent(), "Silent", "its message cannot be read", id="no message"),
        pytest.param(ValueError("\ud800"), "ValueError", "\\ud800", id="surrogates"),
        pytest.param(ValueError("x" * 10**6), "ValueError", "x" * 4096, id="large"),
    ],
)
def test_what_cannot_come_back_is_remote(error, name, message):
    copy = load_failure(dump_failure(error))
    assert type(copy) is RemoteError
    assert (copy.remote_type, copy.remote_message) == (name, message)


def test_an_error_known_only_there_is_remote_here():
    data = codec.encode(["Elsewhere", ("it", 3), {}, False])
    copy = load_failure(data)
    assert (copy.remote_type, copy.remote_message) == ("Elsewhere", "it, 3")


def test_a_name_is_registered_once():
    register_error(Counted)
    with pytest.raises(ValueError, match="another error is called Counted"):
        register_error(type("Counted", (Exception,), {}))
    with pytest.raises(ValueError, match="KeyError"):
        register_error(type("KeyError", (Exception,), {}))
    for wrong in (int, "Counted", BaseException, KeyboardInterrupt):
        with pytest.raises(TypeError):
            register_error(wrong)


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.floats(), st.text(max_size=9)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple)),
    max_leaves=5,
)
NAMES = st.sampled_from(
    ["ValueError", "SystemExit", "StopIteration", "OSError", "NodeDown", "RemoteError", "eval"]
)
ATTRIBUTES = st.dictionaries(
    st.sampled_from(["sent", "args", "__class__", "__cause__", "__dict__"]), VALUES, max_size=2
)


@given(
    st.tuples(NAMES, st.one_of(st.none(), st.lists(VALUES).map(tuple)), ATTRIBUTES | VALUES, VALUES)
)
def test_any_bytes_are_an_error_of_a_known_type_or_damaged(value):
    with contextlib.suppress(CodecError):
        error = load_failure(codec.encode(list(value)))
        assert isinstance(error, Exception)
        assert not isinstance(error, StopIteration | StopAsyncIteration)
        assert type(error).__module__ in ("builtins", "hornbeam_state.errors")


@given(st.binary(max_size=60))
def test_any_bytes_at_all_are_an_error_or_damaged(data):
    with contextlib.suppress(CodecError):
        assert isinstance(load_failure(data), Exception)
