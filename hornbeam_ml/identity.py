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

import asyncio
import concurrent.futures
import functools
import logging
import queue
import sys
import threading
import types
import warnings
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from hornbeam_ml.bytecode import is_library_file, library_version, read_code
from hornbeam_ml.classes import (
    attributes_of,
    class_attributes_of,
    is_library_class,
    is_pure_python,
    methods_of,
    methods_of_all,
    reach,
)
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
    threading.Thread,
    threading.local,
    type(threading.Lock()),
    type(threading.RLock()),
    queue.Queue,
    queue.SimpleQueue,
    asyncio.AbstractEventLoop,
    asyncio.Condition,
    asyncio.Event,
    asyncio.Future,
    asyncio.Lock,
    asyncio.Queue,
    asyncio.Semaphore,
    concurrent.futures.Executor,
    ContextVar,
)
"""Types whose objects serve the running of a function and not what it computes."""

_MOST_OF_ONE: Final = 300
"""Values read of one captured object; a larger one (a web app, say) is not described by content."""
_MOST_OF_ALL: Final = 3000
"""Values read of all that one callable captures."""
_DEEPEST: Final = 100
_NO_NAMES: Final[frozenset[str]] = frozenset()
_CALLABLES: Final = (types.FunctionType, types.MethodType, functools.partial, type)

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
    root = walk.captured(function, frozenset(("__call__",)))
    return (root, walk.parts)


def read_models() -> None:
    """Read the registered models now, so that the first cached call need not.

    A model's weights are digested once, which takes as long as reading them.
    """
    for model in registered_models().values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nobody has used it in a cached call yet
            _Walk().captured(model, frozenset(("__call__",)))


class _TooMuch(Exception):
    """A captured object consists of more values than are worth reading at each call."""


class _Opaque(Exception):
    """An object's content cannot be read."""


class _Walk:
    """One walk over what a callable consists of.

    Functions and objects become numbered `parts` that refer to each other by number, so that
    what is met again, or refers to itself, is described once.
    """

    def __init__(self) -> None:
        self.parts: list[Description] = []
        # By identity and by the names in play. It keeps what it met alive, and so the id unique.
        self._met: dict[tuple[int, frozenset[str]], tuple[int, Any]] = {}
        self._left = _MOST_OF_ALL
        self._depth = 0
        self._library_objects = 0  # how many we are inside of

    def captured(self, value: Any, names: frozenset[str]) -> Description:
        """Describe something that code captures, or settle for an identity of this process.

        Args:
            value: It.
            names: The names that the code mentions: which methods it may run.
        """
        known = _process_identities.find(value)
        if known is not None:
            return known
        left_before, place = self._left, len(self.parts)
        self._left = allowed = min(left_before, _MOST_OF_ONE)
        try:
            return self.value(value, names)
        except _TooMuch:
            self._back_to(place)
            return _process_identities.of(value)
        finally:
            self._left = left_before - (allowed - max(self._left, 0))

    def value(self, value: Any, names: frozenset[str] = _NO_NAMES) -> Description:
        """Describe any value."""
        if type(value) in _PLAIN:
            return value
        if issubclass(type(value), _CALLABLES):
            names = _NO_NAMES  # they have their own
        met = self._met.get((id(value), names))
        if met is not None:
            return ("part", met[0])
        self._left -= 1
        if self._left < 0 or self._depth > _DEEPEST:
            raise _TooMuch
        number = len(self.parts)
        self._met[id(value), names] = (number, value)
        self.parts.append(None)
        self._depth += 1
        try:
            self.parts[number] = self._composite(value, names)
        except _Opaque:
            if self._library_objects:
                raise
            self._back_to(number)
            return _process_identities.of(value)
        finally:
            self._depth -= 1
        return ("part", number)

    def _back_to(self, place: int) -> None:
        """Forget what was described since, so that the description does not tell of the try."""
        del self.parts[place:]
        self._met = {key: met for key, met in self._met.items() if met[0] < place}

    def _composite(self, value: Any, names: frozenset[str]) -> Description:
        # By type and not by isinstance, which a proxy object would pass on to what it stands for.
        class_ = type(value)
        fingerprint = next(
            (_fingerprints[base] for base in class_.__mro__ if base in _fingerprints), None
        )
        if fingerprint is not None:
            return ("fingerprint", _full_name(class_), self.value(fingerprint(value)))
        if issubclass(class_, _INERT):
            return ("inert", _full_name(class_))
        for kind, describe in self._kinds:
            if issubclass(class_, kind):
                return describe(self, value, names)
        if is_torch_module(value):
            return self._torch_module(value, names)
        return self._data(value, names)

    def _data(self, value: Any, names: frozenset[str]) -> Description:
        class_: type = type(value)
        if is_pure_python(class_) and not is_library_class(class_):
            return self._object(value, attributes_of(value), names)
        try:
            return ("value", canonical(value))
        except CodecError:
            pass
        if class_ in (list, tuple):
            return (class_.__name__, self._items(value, names))
        if class_ is dict:
            return ("dict", self._pairs(value, names))
        if is_pure_python(class_):
            return self._object(value, attributes_of(value), names)
        return self._foreign(value)

    def _foreign(self, value: Any) -> Description:
        """Describe what is made in C: by its name in a library, or as a method of a value."""
        if _is_library_member(value):
            return ("named", *_names_of(value), library_version(_names_of(value)[0]))
        if type(value) is types.BuiltinMethodType:
            return ("bound", value.__name__, self.value(value.__self__))
        raise _Opaque

    def _method(self, method: types.MethodType, _names: frozenset[str]) -> Description:
        names = frozenset((method.__func__.__name__,))
        return ("method", self.value(method.__func__), self.captured(method.__self__, names))

    def _partial(self, partial: Any, _names: frozenset[str]) -> Description:
        arguments = self._items(partial.args), self._pairs(partial.keywords)
        return ("partial", self.value(partial.func), *arguments)

    def _lru_cache(self, function: Any, _names: frozenset[str]) -> Description:
        return ("lru_cache", self.value(function.__wrapped__))

    def _function(self, function: types.FunctionType, _names: frozenset[str]) -> Description:
        if function in (get_model, aget_model):
            return ("models", self._pairs(registered_models()))
        code = read_code(function.__code__)
        name = (function.__module__, function.__qualname__, code.digest)
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

    def _class(self, class_: type, _names: frozenset[str]) -> Description:
        return ("class", self._class_parts(class_, frozenset(methods_of_all(class_)), frozenset()))

    def _class_parts(
        self, class_: type, reached: frozenset[str], changed: frozenset[str]
    ) -> Description:
        """Describe a class by name and version, one of the app also by what it consists of.

        Args:
            class_: The class.
            reached: The methods that may run; what these capture counts too.
            changed: The attributes that these change, and that are left out.
        """
        parts: list[Description] = [_full_name(class_), library_version(class_.__module__)]
        for base in class_.__mro__:
            if not is_library_class(base):
                parts.append(
                    [
                        (name, self.value(one) if name in reached else _digest(one))
                        for name, one in sorted(methods_of(base).items())
                    ]
                )
                values = class_attributes_of(base).items()
                parts.append(self._pairs({k: one for k, one in values if k not in changed}))
        return parts

    def _object(
        self, value: Any, attributes: Mapping[str, Any], names: frozenset[str]
    ) -> Description:
        """Describe an object by its class, the methods that may run, and its attributes.

        A library's object that cannot be read to the end gets one identity as a whole, since its
        other attributes (those of a client with its connections, say) come and go with its use.
        """
        class_: type = type(value)
        reached = reach(class_, names)
        kept = {name: one for name, one in attributes.items() if name not in reached.changed}
        is_library = is_library_class(class_)
        self._library_objects += is_library
        try:
            return (
                "object",
                self._class_parts(class_, reached.methods, reached.changed),
                self._pairs(kept, names | reached.names),
            )
        finally:
            self._library_objects -= is_library

    def _torch_module(self, module: Any, names: frozenset[str]) -> Description:
        try:
            description, own_parts = _torch_modules.describe(module)
        except UnreadableModule as error:
            raise _Opaque from error
        names |= {"forward"}
        return (
            "torch",
            description,
            [self._object(part, own_attributes(part), names) for part in own_parts],
        )

    def _items(self, values: Iterable[Any], names: frozenset[str] = _NO_NAMES) -> list[Description]:
        return [self.value(value, names) for value in values]

    def _pairs(
        self, mapping: Mapping[Any, Any], names: frozenset[str] = _NO_NAMES
    ) -> list[Description]:
        """Describe a mapping in an order that does not depend on how it was filled."""
        if all(type(key) is str for key in mapping):
            return [(key, self.value(mapping[key], names)) for key in sorted(mapping)]
        keys = sorted((canonical(self.value(key)), key) for key in mapping)
        return [(described, self.value(mapping[key], names)) for described, key in keys]

    _kinds = (
        (types.FunctionType, _function),
        (types.MethodType, _method),
        (functools.partial, _partial),
        (functools._lru_cache_wrapper, _lru_cache),  # noqa: SLF001 - the type has no other name
        (type, _class),
        (types.ModuleType, _module),
    )


def _is_assigned(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - reading it is the test
    except ValueError:
        return False
    return True


def _is_library_member(value: Any) -> bool:
    """Return whether a library keeps the value under its own name, as it does ``math.sqrt``."""
    module, name = _names_of(value)
    found: Any = sys.modules.get(module)
    if found is None or not is_library_file(getattr(found, "__file__", None) or "<frozen"):
        return False
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is value


def _names_of(value: Any) -> tuple[str, str]:
    """Return the module and the qualified name that a value says it has, or empty ones."""
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    owner = getattr(value, "__self__", None) or getattr(value, "__objclass__", None)
    module = getattr(owner, "__name__", None) if type(owner) is types.ModuleType else None
    module = module or getattr(owner if isinstance(owner, type) else value, "__module__", None)
    return (module, name) if isinstance(module, str) and isinstance(name, str) else ("", "")


def _digest(function: types.FunctionType) -> bytes:
    return read_code(function.__code__).digest


def _full_name(class_: type) -> str:
    return f"{class_.__module__}.{class_.__qualname__}"
