"""Errors as data: they reach the caller as the same type, with the same message.

That holds for hornbeam's own errors, for Python's, and for those that were registered. Anything
else becomes a `RemoteError` with the type's name and the message. No traceback is sent. Reading
bytes, whoever wrote them, calls no constructors but those of Python's own exceptions.
"""

from __future__ import annotations

import builtins
from typing import Any, Final

from hornbeam_state import codec, errors
from hornbeam_state.errors import CodecError, HornbeamError, RemoteError

_MOST_BYTES: Final = 2**16
_MOST_TEXT: Final = 2**12
_PLAIN: Final = (type(None), bool, int, float, str)

# Not what ends a program, a generator or a loop: a caller would mistake them for its own.
_BUILTIN: Final = {
    each.__name__: each
    for each in vars(builtins).values()
    if isinstance(each, type)
    and issubclass(each, Exception)
    and not issubclass(each, StopIteration | StopAsyncIteration)
}
_registered: dict[str, type[Exception]] = {
    each.__name__: each
    for each in vars(errors).values()
    if isinstance(each, type) and issubclass(each, HornbeamError)
}


def register_error(type: type[Exception]) -> None:
    """Have errors of exactly this type reach callers as this type. Thread-safe, and for good.

    Call it on both sides, best where the type is defined. Such an error is made again without its
    constructor: its `args` come back, and those attributes that are plain values.

    Raises:
        TypeError: it is no class of exceptions.
        ValueError: another type of that name is registered, or Python has one.
    """
    if not (isinstance(type, builtins.type) and issubclass(type, Exception)):
        raise TypeError(f"{type!r} is no class of exceptions")
    name = type.__name__
    if name in _BUILTIN or _registered.setdefault(name, type) is not type:
        raise ValueError(f"another error is called {name}")


def dump_failure(error: BaseException) -> bytes:
    """Return bytes from which `load_failure` makes an error like this one. Never fails."""
    name, message = type(error).__name__, _message(error)
    if type(error) in (_registered.get(name), _BUILTIN.get(name)):
        for args in (_args(error), (_Shown(message),)):
            data = _dump(name, args, _attributes(error))
            if data is not None and _is_alike(data, error, message):
                return data
    if isinstance(error, RemoteError):
        name, message = error.remote_type, error.remote_message
    message = message[:_MOST_TEXT].encode("utf-8", "backslashreplace").decode()
    return codec.encode([name[:_MOST_TEXT], None, message])


def load_failure(data: bytes | memoryview) -> Exception:
    """Return the error that `dump_failure` was given, or a `RemoteError` in its place.

    Raises:
        CodecError: these are no bytes of `dump_failure`.
    """
    value = codec.decode(data)
    match value:
        case [str(name), None, str(message)]:
            return RemoteError(name, message)
        case [str(name), tuple(args), dict(attributes), bool(shown)] if _are_plain(attributes):
            try:
                return _make(name, tuple(map(_Shown, args)) if shown else args, attributes)
            except Exception:  # noqa: BLE001 - a constructor may raise anything
                return RemoteError(name, ", ".join(map(str, args)))
    raise CodecError("damaged value: it is no error")


class _Shown(str):
    """What stands for an argument that cannot be sent: KeyError shows the `repr` of its own."""

    __slots__ = ()
    __repr__ = str.__str__


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - it is the code of a model
        return "its message cannot be read"


def _args(error: BaseException) -> tuple[Any, ...]:
    if isinstance(error, OSError) and error.filename is not None and len(error.args) == 2:  # noqa: PLR2004 - errno, strerror
        return (*error.args, error.filename, None, error.filename2)
    return error.args


def _attributes(error: BaseException) -> dict[str, Any]:
    return {key: value for key, value in vars(error).items() if type(value) in _PLAIN}


def _are_plain(attributes: dict[Any, Any]) -> bool:
    return all(
        type(key) is str and type(value) in _PLAIN and not key.startswith("__")
        for key, value in attributes.items()
    )


def _dump(name: str, args: tuple[Any, ...], attributes: dict[str, Any]) -> bytes | None:
    shown = any(type(arg) is _Shown for arg in args)
    try:
        data = codec.encode(
            [name, tuple(map(str.__str__, args)) if shown else args, attributes, shown]
        )
    except Exception:  # noqa: BLE001 - of no type that is known, or of one that fails
        return None
    return data if len(data) <= _MOST_BYTES else None


def _is_alike(data: bytes, error: BaseException, message: str) -> bool:
    try:
        copy = load_failure(data)
        return type(copy) is type(error) and str(copy) == message
    except Exception:  # noqa: BLE001 - then it is not
        return False


def _make(name: str, args: tuple[Any, ...], attributes: dict[str, Any]) -> Exception:
    builtin = _BUILTIN.get(name)
    if builtin is not None:
        error = builtin(*args)
    elif name in _registered:
        error = _registered[name].__new__(_registered[name], *args)
        error.args = args
    else:
        return RemoteError(name, ", ".join(map(str, args)))
    vars(error).update(attributes)
    return error
