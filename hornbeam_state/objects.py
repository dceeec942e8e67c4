"""Objects of classes with named fields, taken apart into plain values and put together again.

Covers dataclasses, msgspec structs, pydantic models, named tuples and enums. What is stored is
the class's module and qualified name, and its fields. Reading never imports anything: a class is
only looked for among the modules that are already there, so that bytes from a shared store can
name a class that the program uses and nothing else. Nor does it run constructors, validators or
setters: they ran when the value was made, and running them twice may change it. Classes that
define ``__del__`` are not covered, since that would run on whatever the bytes say.

What of a class does run when hostile bytes name it: a struct's ``__post_init__``, which msgspec
always calls, ``_missing_`` of a flag, and ``__hash__`` and ``__eq__`` of an object in a set or as
a key.
"""

from __future__ import annotations

import dataclasses
import operator
import sys
from enum import Enum, Flag
from functools import cached_property, lru_cache, reduce
from inspect import getattr_static
from types import BuiltinFunctionType, MemberDescriptorType, ModuleType
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from hornbeam_state.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

_SHOWN_NAME: Final = 200

_NOTES: Final = frozenset({"__orig_class__"})
"""What typing notes on the instances of generic classes."""


class _Shape(Protocol):
    """How the objects of one kind of class are taken apart and put together."""

    @staticmethod
    def take(value: Any) -> list[Any]: ...

    @staticmethod
    def build(kind: type[Any], *state: Any) -> Any: ...


def take_apart(value: object) -> list[Any] | None:
    """Return module, qualified name and state of an object, or None if its class has no fields.

    Raises:
        CodecError: the class cannot be found again by its name, or the object holds more than
            its fields.
    """
    cls = type(value)
    shape = _shape_of(cls)
    if shape is None:
        return None
    name = _name_of(cls)
    if _find_class(cls.__module__, cls.__qualname__) is not cls:
        raise CodecError(
            f"{name} cannot be found again by its name: define it at the top of a module,"
            " or call register_codec"
        )
    return [cls.__module__, cls.__qualname__, *shape.take(value)]


def put_together(parts: list[Any]) -> Any:
    """Return the object that `take_apart` took apart, without importing its module.

    Raises:
        CodecError: the class is not there, or it is of another shape than the stored object.
        Exception: what damaged state makes of the class's own machinery.
    """
    module, qualname, *state = parts
    if not (type(module) is str and type(qualname) is str):
        raise CodecError("damaged object: it has no class")
    cls = _find_class(module, qualname)
    shape = None if cls is None else _shape_of(cls)
    if cls is None or shape is None:
        name = ascii(f"{module}.{qualname}")[1:-1][:_SHOWN_NAME]
        raise CodecError(
            f"no class {name} with fields here: import its module before reading, or call"
            " register_codec"
        )
    return shape.build(cls, *state)


def _find_class(module: str, qualname: str) -> type[Any] | None:
    """Find a class without running any code: neither imports nor `__getattr__` of a module."""
    found: Any = sys.modules.get(module)
    if not isinstance(found, ModuleType):
        return None
    # Past the __getattribute__ of importlib's lazy modules, which would import.
    names = object.__getattribute__(found, "__dict__")
    for part in qualname.split("."):
        found = names.get(part)
        if not issubclass(type(found), type):
            return None
        names = _look(found, "__dict__")
    same = (_look(found, "__module__"), _look(found, "__qualname__")) == (module, qualname)
    return found if same else None


_look: Final = type.__getattribute__
"""Looks at a class past what its metaclass may do when it is looked at."""


def _attribute(cls: type[Any], name: str) -> Any:
    """Return what a class or a base of it holds under a name, as it lies there, or None."""
    for base in _look(cls, "__mro__"):
        names = _look(base, "__dict__")
        if name in names:
            return names[name]
    return None


def _shape_of(cls: type[Any]) -> type[_Shape] | None:
    if _attribute(cls, "__del__") is not None:
        return None
    bases = _look(cls, "__mro__")
    if Enum in bases:
        return _EnumShape
    if msgspec.Struct in bases:
        return _StructShape
    if tuple in _look(cls, "__bases__") and type(_look(cls, "__dict__").get("_fields")) is tuple:
        return _NamedTupleShape
    is_plain = not _has_native_state(cls)
    if is_plain and _is_model(cls):
        return _ModelShape
    is_dataclass = _attribute(cls, "__dataclass_fields__") is not None
    return _DataclassShape if is_plain and is_dataclass else None


def _is_model(cls: type[Any]) -> bool:
    """Tell a pydantic model, without importing pydantic (whose package imports lazily)."""
    main = sys.modules.get("pydantic.main")
    base = None if main is None else vars(main).get("BaseModel")
    return base in _look(cls, "__mro__") and _attribute(cls, "__pydantic_fields__") is not None


def _has_native_state(cls: type[Any]) -> bool:
    """Tell whether a base keeps content outside attributes, as dict and Exception do.

    Exactly such bases have a `__new__` that is written in C.
    """
    bases = (_look(base, "__dict__") for base in _look(cls, "__mro__") if base is not object)
    return any(isinstance(names.get("__new__"), BuiltinFunctionType) for names in bases)


def _check_extras(value: object, names: Iterable[str], state: Any) -> None:
    """Refuse attributes that are not fields: they would be lost. Cached properties may be."""
    parts = state if isinstance(state, tuple) else (state,)
    held = {name for part in parts if part for name in part}
    cls = type(value)
    for name in held.difference(names, _NOTES):
        if not isinstance(getattr_static(cls, name, None), cached_property):
            raise CodecError(
                f"{_name_of(cls)} object with an attribute that is not a"
                " field of its class: call register_codec"
            )


def _read_names_of_fields(cls: type[Any]) -> tuple[str, ...]:
    """Return the names of the fields of a dataclass or a struct.

    Raises:
        CodecError: one is a property or another descriptor, so that to put a value there would
            run code.
    """
    is_struct = msgspec.Struct in _look(cls, "__mro__")
    names = cls.__struct_fields__ if is_struct else [one.name for one in dataclasses.fields(cls)]
    for name in names:
        kept = _attribute(cls, name)
        is_setter = _attribute(type(kept), "__set__") is not None
        if is_setter and not isinstance(kept, MemberDescriptorType):
            raise CodecError(
                f"{_name_of(cls)} has a field that is a property or another"
                " descriptor: call register_codec"
            )
    return tuple(names)


_names_of_fields: Callable[[type[Any]], tuple[str, ...]]
_names_of_fields = lru_cache(maxsize=1024)(_read_names_of_fields)  # type: ignore[assignment]


def _fields_of(value: object, names: Iterable[str]) -> dict[str, Any]:
    try:
        return {name: getattr(value, name) for name in names}
    except AttributeError:
        cls = type(value)
        raise CodecError(f"{_name_of(cls)} object that lacks one of its fields") from None


def _check_fields(cls: type[Any], fields: Any, names: Collection[str]) -> None:
    if type(fields) is not dict or fields.keys() != set(names):
        raise CodecError(
            f"{_name_of(cls)} has other fields than the stored object: has it changed since?"
        )


class _DataclassShape:
    @staticmethod
    def take(value: Any) -> list[Any]:
        names = _names_of_fields(type(value))
        _check_extras(value, names, object.__getstate__(value))
        return [_fields_of(value, names)]

    @staticmethod
    def build(kind: type[Any], fields: Any) -> Any:
        _check_fields(kind, fields, _names_of_fields(kind))
        value = object.__new__(kind)
        for name, item in fields.items():
            object.__setattr__(value, name, item)
        return value


class _StructShape:
    @staticmethod
    def take(value: Any) -> list[Any]:
        names = _names_of_fields(type(value))
        _check_extras(value, names, getattr(value, "__dict__", None))
        return [_fields_of(value, names)]

    @staticmethod
    def build(kind: type[Any], fields: Any) -> Any:
        _check_fields(kind, fields, _names_of_fields(kind))
        try:
            value = kind(**fields)
        except Exception as error:
            raise CodecError(f"{_name_of(kind)}.__post_init__ failed on stored fields") from error
        # There is no way to make a struct without its __post_init__: put back what that changed.
        for name, item in fields.items():
            msgspec.structs.force_setattr(value, name, item)
        return value


class _ModelShape:
    """Pydantic models through the state they give to `copy` and `pickle`.

    That is exact where neither documented way in is: `model_validate` runs validators, which may
    refuse or change what they once returned, and `model_construct` resolves aliases, runs
    `model_post_init` and drops private attributes.
    """

    @staticmethod
    def take(value: Any) -> list[Any]:
        cls = type(value)
        state = _pydantic_base(cls).__getstate__(value)
        names = cls.__pydantic_fields__
        _check_extras(value, names, state["__dict__"])
        if not state["__dict__"].keys() >= names.keys():
            raise CodecError(f"{_name_of(cls)} object that lacks a field")
        return [
            {name: state["__dict__"][name] for name in names},
            set(state["__pydantic_fields_set__"]),
            state.get("__pydantic_extra__"),
            state.get("__pydantic_private__"),
        ]

    @staticmethod
    def build(kind: type[Any], fields: Any, fields_set: Any, extra: Any, private: Any) -> Any:
        _check_fields(kind, fields, kind.__pydantic_fields__)
        rest = {type(fields_set), type(extra), type(private)}
        if not (rest <= {set, dict, type(None)} and type(fields_set) is set):
            raise CodecError("damaged object: not the state of a model")
        if not kind.__private_attributes__.keys() >= set(private or ()):
            raise CodecError(f"{_name_of(kind)} has other private attributes than were stored")
        value = object.__new__(kind)
        state = {
            "__dict__": fields,
            "__pydantic_fields_set__": fields_set,
            "__pydantic_extra__": extra,
            "__pydantic_private__": private,
        }
        _pydantic_base(kind).__setstate__(value, state)
        return value


def _pydantic_base(cls: type[Any]) -> Any:
    """Return BaseModel or RootModel: their state is known, that of a subclass's own is not."""
    ours = ("pydantic.main", "pydantic.root_model")
    return next(base for base in cls.__mro__ if base.__module__ in ours)


class _NamedTupleShape:
    @staticmethod
    def take(value: Any) -> list[Any]:
        _check_extras(value, (), getattr(value, "__dict__", None))
        return [dict(zip(value._fields, value, strict=True))]

    @staticmethod
    def build(kind: type[Any], fields: Any) -> Any:
        names = kind._fields
        _check_fields(kind, fields, names)
        return tuple.__new__(kind, [fields[name] for name in names])


class _EnumShape:
    """Enum members by name; combined flags by the names of their bits."""

    @staticmethod
    def take(value: Any) -> list[Any]:
        cls = type(value)
        if cls.__members__.get(value._name_) is value:
            return [[value._name_]]
        names = [member._name_ for member in value] if isinstance(value, Flag) else []
        if not isinstance(value, Flag) or _EnumShape.build(cls, names) != value:
            raise CodecError(f"{_name_of(cls)} value that is not a member")
        return [names]

    @staticmethod
    def build(kind: type[Any], names: Any) -> Any:
        members = [kind[name] for name in names]
        if issubclass(kind, Flag):
            return reduce(operator.or_, members, kind(0))
        (member,) = members
        return member


def _name_of(kind: type[Any]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
