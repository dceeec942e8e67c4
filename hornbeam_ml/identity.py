"""What a function, an object, a model *is*: descriptions that survive a restart.

Two calls may share a cached result only if they would compute the same. So what a function is
takes in more than its name: its code, its defaults, and what it captures (globals, enclosing
variables, the object a method belongs to), read at every call. A model is its weights and
settings. What the function itself changes, such as a counter of calls, is left out.

Where something cannot be described by its content, it gets an identity that is valid in this
process only: it is then never confused with another, but not shared with other workers either,
and a warning says so once.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
import types
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from hornbeam_ml.bytecode import is_library_file, library_version, read_code
from hornbeam_ml.classes import attributes_of, is_library_class, is_pure_python, methods_of, reach
from hornbeam_ml.models import aget_model, get_model, registered_models
from hornbeam_ml.process_identity import ProcessIdentities
from hornbeam_ml.torch_identity import (
    TorchModules,
    UnreadableModule,
    is_torch_module,
    own_attributes,
)
from hornbeam_state.codec import canonical
from hornbeam_state.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

Description = Any
"""A nested tuple of values that `canonical` takes."""

_PLAIN: Final = (bool, int, float, str, bytes, types.NoneType)
_INERT: Final = (
    logging.Logger,
    logging.LoggerAdapter,
    threading.Event,
    threading.Condition,
    threading.Semaphore,
    threading.local,
    type(threading.Lock()),
    type(threading.RLock()),
    ContextVar,
)
_CALLABLES: Final = (types.FunctionType, types.MethodType, functools.partial, type)
_MOST_OF_ONE: Final = 300
"""Values read of one captured object; a larger one (a web app, say) is not described by content."""
_MOST_OF_ALL: Final = 3000
"""Values read of all that one callable captures."""

_fingerprints: dict[type, Callable[[Any], Any]] = {}
_torch_modules: Final = TorchModules()
_process_identities: Final = ProcessIdentities()


def register_fingerprint(type_: type, fingerprint: Callable[[Any], Any]) -> None:
    """Say how objects of a type, and of its subclasses, are identified in cache keys.

    Args:
        type_: A class whose objects compute something, such as a model's.
        fingerprint: Returns, for such an object, a value that is equal exactly for objects that
            compute the same: for a model, a digest of its weights and settings, never only its
            name. It is called for every cached call, so keep it cheap or remember its result.
    """
    _fingerprints[type_] = fingerprint


def describe_callable(function: Callable[..., Any]) -> Description:
    """Return what a callable is.

    Raises:
        TypeError: it is not callable.
    """
    if not callable(function):
        raise TypeError(f"a callable is needed, not {type(function).__qualname__}")
    walk = _Walk()
    if isinstance(function, _CALLABLES):
        return walk.callable(function)
    return ("call", walk.captured(function, frozenset(("__call__",))))


class _TooMuch(Exception):
    """A captured object consists of more values than are worth reading at each call."""


class _Walk:
    """One walk over what a callable consists of. Each thing is described where it is met first."""

    def __init__(self) -> None:
        # By identity and by the names in play. It keeps what it met alive, and so the id unique.
        self._met: dict[tuple[int, frozenset[str]], tuple[int, Any]] = {}
        self._left = _MOST_OF_ALL

    def callable(self, function: Any) -> Description:
        """Describe one of `_CALLABLES`."""
        if isinstance(function, types.MethodType):
            name = function.__func__.__name__
            owner = self.captured(function.__self__, frozenset((name,)))
            return ("method", self.callable(function.__func__), owner)
        if isinstance(function, functools.partial):
            arguments = self._items(function.args), self._pairs(function.keywords)
            return ("partial", self.callable(function.func), *arguments)
        if isinstance(function, type):
            return self._class(function)
        return self._function(function)

    def captured(self, value: Any, names: frozenset[str]) -> Description:
        """Describe something that code captures, or settle for an identity of this process.

        Args:
            value: It.
            names: The names that the code mentions: which methods it may run.
        """
        left_before = self._left
        self._left = allowed = min(left_before, _MOST_OF_ONE)
        try:
            return self.value(value, names)
        except _TooMuch:
            return _process_identities.of(value)
        finally:
            self._left = left_before - (allowed - max(self._left, 0))

    def value(self, value: Any, names: frozenset[str] = frozenset()) -> Description:
        """Describe any value."""
        if type(value) in _PLAIN:
            return value
        known = _process_identities.find(value)
        if known is not None:
            return known
        self._left -= 1
        if self._left < 0:
            raise _TooMuch
        if issubclass(type(value), _CALLABLES):
            return self.callable(value)
        return self._met_before(value, names) or self._composite(value, names)

    def _met_before(self, value: Any, names: frozenset[str] = frozenset()) -> Description | None:
        """Return the place where this walk met a value; None, and note it, the first time."""
        key = (id(value), names)
        met = self._met.get(key)
        if met is not None:
            return ("met before", met[0])
        self._met[key] = (len(self._met), value)
        return None

    def _composite(self, value: Any, names: frozenset[str]) -> Description:
        # By type and not by isinstance, which a proxy object would pass on to what it stands for.
        class_ = type(value)
        fingerprint = next(
            (_fingerprints[one] for one in class_.__mro__ if one in _fingerprints), None
        )
        if fingerprint is not None:
            return ("fingerprint", _full_name(class_), self.value(fingerprint(value)))
        if class_ is functools._lru_cache_wrapper:  # noqa: SLF001
            return ("lru_cache", self.value(value.__wrapped__))
        if issubclass(class_, _INERT):
            return ("inert", _full_name(class_))
        if issubclass(class_, types.ModuleType):
            return self._module(value, names)
        if is_torch_module(value):
            return self._torch_module(value, names)
        return self._data(value, names)

    def _data(self, value: Any, names: frozenset[str]) -> Description:
        try:
            return ("value", canonical(value))
        except CodecError:
            pass
        if type(value) in (list, tuple):
            return (type(value).__name__, self._items(value, names))
        if type(value) is dict:
            return ("dict", self._pairs(value, names))
        named = _library_name(value)
        if named is not None:
            return named
        if is_pure_python(type(value)) and type(value).__module__ != "unittest.mock":
            return self._object(value, attributes_of(value), names)
        return _process_identities.of(value)

    def _function(self, function: types.FunctionType) -> Description:
        if function in (get_model, aget_model):
            return ("models", self._pairs(registered_models()))
        code = read_code(function.__code__)
        name = (function.__module__, function.__qualname__, code.digest)
        met = self._met_before(function)
        if met is not None:
            return met
        if is_library_file(function.__code__.co_filename):
            version = library_version(function.__module__ or "")
            return ("library", *name, version, self._cells(function, code.names, code.changed))
        return (
            "function",
            *name,
            self._items(function.__defaults__ or ()),
            self._pairs(function.__kwdefaults__ or {}),
            self._cells(function, code.names, code.changed),
            [
                (used, self.captured(function.__globals__[used], code.names))
                for used in code.global_names
                if used in function.__globals__ and used not in code.changed
            ],
        )

    def _cells(
        self, function: types.FunctionType, names: frozenset[str], changed: frozenset[str]
    ) -> Description:
        if not function.__closure__:
            return []
        return [
            (name, self.captured(cell.cell_contents, names))
            for name, cell in zip(function.__code__.co_freevars, function.__closure__, strict=True)
            if name not in changed and _is_assigned(cell)
        ]

    def _module(self, module: types.ModuleType, names: frozenset[str]) -> Description:
        """Describe a library by its version, a module of the app by what is used of it."""
        filename = getattr(module, "__file__", None)
        if filename is None or is_library_file(filename):
            return ("module", module.__name__, library_version(module.__name__))
        used = {name: vars(module)[name] for name in names if name in vars(module)}
        return ("module", module.__name__, self._pairs(used, names))

    def _class(self, class_: type, reached: frozenset[str] | None = None) -> Description:
        """Describe a class by name and version, one of the app also by its methods' code.

        Args:
            class_: The class.
            reached: The methods that may run; what these capture counts too. None: all.
        """
        met = self._met_before(class_) if reached is None else None
        if met is not None:
            return met
        methods = [
            (name, self._function(function))
            if reached is None or name in reached
            else (name, read_code(function.__code__).digest)
            for base in class_.__mro__
            if not is_library_class(base)
            for name, function in sorted(methods_of(base).items())
        ]
        return ("class", _full_name(class_), library_version(class_.__module__), methods)

    def _object(
        self, value: Any, attributes: Mapping[str, Any], names: frozenset[str]
    ) -> Description:
        """Describe an object by its class, the methods that may run, and its attributes."""
        class_: type = type(value)
        reached = reach(class_, names)
        kept = {name: one for name, one in attributes.items() if name not in reached.changed}
        return (
            "object",
            self._class(class_, reached.methods),
            self._pairs(kept, names | reached.names),
        )

    def _torch_module(self, module: Any, names: frozenset[str]) -> Description:
        try:
            description = _torch_modules.describe(module)
            own_parts = _torch_modules.own_parts(module)
        except UnreadableModule:
            return _process_identities.of(module)
        names |= {"forward"}
        return (
            "torch",
            description,
            [self._object(part, own_attributes(part), names) for part in own_parts],
        )

    def _items(
        self, values: Iterable[Any], names: frozenset[str] = frozenset()
    ) -> list[Description]:
        return [self.value(value, names) for value in values]

    def _pairs(
        self, mapping: Mapping[Any, Any], names: frozenset[str] = frozenset()
    ) -> list[Description]:
        """Describe a mapping in an order that does not depend on how it was filled."""
        if all(type(key) is str for key in mapping):
            return [(key, self.value(mapping[key], names)) for key in sorted(mapping)]
        keys = sorted((canonical(self.value(key)), key) for key in mapping)
        return [(described, self.value(mapping[key], names)) for described, key in keys]


def _is_assigned(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - reading it is the test
    except ValueError:
        return False
    return True


def _library_name(value: Any) -> Description | None:
    """Describe something a library keeps under its own name, such as ``math.sqrt``."""
    module = getattr(value, "__module__", None)
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    owner = getattr(value, "__self__", None)
    if isinstance(owner, types.ModuleType):
        module = owner.__name__
    if not isinstance(module, str) or not isinstance(name, str):
        return None
    found: Any = sys.modules.get(module)
    if not is_library_file(getattr(found, "__file__", None) or "<frozen"):
        return None
    for part in name.split("."):
        found = getattr(found, part, None)
    return ("named", module, name, library_version(module)) if found is value else None


def _full_name(class_: type) -> str:
    return f"{class_.__module__}.{class_.__qualname__}"
