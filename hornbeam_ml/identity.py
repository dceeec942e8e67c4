"""What a function, an object, a model *is*: descriptions that survive a restart.

Two calls may share a cached result only if they would compute the same. So what a function is
takes in more than its name: its code, its defaults, and what it captures (globals, enclosing
variables, the object a method belongs to), read at every call. A model is its weights and
settings. What the function itself changes, such as a counter of calls, is left out.

An object may say itself what it is: a method ``__fingerprint__`` of its class returns a value that
is equal exactly for objects that compute the same, or None to be described like any other. What
was given to `register_fingerprint` for its class comes before that.

Where something cannot be described by its content, it gets an identity that is valid in this
process only: it is then never confused with another, but not shared with other workers either,
and a warning says so once.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import importlib
import logging
import queue
import sys
import threading
import types
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hornbeam_ml.bytecode import Code, is_library_file, library_version, read_code
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
)
"""Types whose objects serve the running of a function and not what it computes."""

_NAMED_BY_REPR: Final = frozenset(("torch.device", "torch.dtype", "torch.Size", "re.Pattern"))
_MOST_OF_ONE: Final = 300
"""Values read of one captured object; a larger one (a web app, say) is not described by content."""
_MOST_OF_ALL: Final = 3000
"""Values read of all that one callable captures."""
_DEEPEST: Final = 100
_RECORDS: Final = (int, float, list, dict, set, deque, OrderedDict, defaultdict, Counter)
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
    root = walk.captured(function, Context.of_call("__call__"))
    return (root, walk.parts)


def read_models() -> None:
    """Read the registered models now, so that the first cached call need not.

    A model's weights are digested once, which takes as long as reading them.
    """
    for model in registered_models().values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nobody has used it in a cached call yet
            _Walk().captured(model, Context.of_call("__call__"))


_NO_NAMES: Final[frozenset[str]] = frozenset()
_ABSENT: Final = object()


class Context(NamedTuple):
    """What the code that captures a value does.

    Attributes:
        names: Every name it mentions.
        uses: The names of which it takes attributes, with them.
        called: The attributes that it takes of this very value.
    """

    names: frozenset[str]
    uses: frozenset[tuple[str, str]]
    called: frozenset[str]

    @classmethod
    def of(cls, code: Code, name: str) -> Context:
        """Return what code does with the value it knows by a name."""
        return cls(code.names, code.uses, _NO_NAMES).inside(name)

    @classmethod
    def of_call(cls, method: str) -> Context:
        """Return the context of a value of which one method is called."""
        return cls(frozenset((method,)), frozenset(), frozenset((method,)))

    def inside(self, name: str) -> Context:
        """Return the context of what is kept under a name."""
        return self._replace(called=frozenset(one for owner, one in self.uses if owner == name))


NOTHING: Final = Context(_NO_NAMES, frozenset(), _NO_NAMES)


def _is_own_record(value: Any, name: str, changed: frozenset[str]) -> bool:
    """Return whether a value is what a function notes for itself: a count, a list of calls."""
    return name in changed and type(value) in _RECORDS


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
        self._met: dict[tuple[int, Context], tuple[int, Any]] = {}
        self._left = _MOST_OF_ALL
        self._depth = 0
        self._library_objects = 0  # how many we are inside of

    def captured(self, value: Any, context: Context) -> Description:
        """Describe something that code captures, or settle for an identity of this process.

        Args:
            value: It.
            context: What the code does with it.
        """
        known = _process_identities.find(value)
        if known is not None:
            return known
        left_before, place = self._left, len(self.parts)
        self._left = allowed = min(left_before, _MOST_OF_ONE)
        try:
            return self.value(value, context)
        except _TooMuch:
            self._back_to(place)
            return _process_identities.of(value)
        finally:
            self._left = left_before - (allowed - max(self._left, 0))

    def value(self, value: Any, context: Context = NOTHING) -> Description:
        """Describe any value."""
        if type(value) in _PLAIN:
            return value
        if issubclass(type(value), _CALLABLES):
            context = NOTHING  # they have their own
        met = self._met.get((id(value), context))
        if met is not None:
            return ("part", met[0])
        self._left -= 1
        if self._left < 0 or self._depth > _DEEPEST:
            raise _TooMuch
        number = len(self.parts)
        self._met[id(value), context] = (number, value)
        self.parts.append(None)
        self._depth += 1
        try:
            self.parts[number] = self._composite(value, context)
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

    def _composite(self, value: Any, context: Context) -> Description:
        # By type and not by isinstance, which a proxy object would pass on to what it stands for.
        class_: type = type(value)
        fingerprint = _fingerprint_of(value)
        if fingerprint is not _ABSENT:
            return ("fingerprint", _full_name(class_), self.value(fingerprint))
        if is_library_class(class_) and issubclass(class_, _INERT):
            return ("inert", _full_name(class_))
        if _full_name(class_) in _NAMED_BY_REPR or issubclass(class_, PurePath):
            return ("repr", repr(value))
        for kind, describe in self._kinds:
            if issubclass(class_, kind):
                return describe(self, value, context)
        if is_torch_module(value):
            return self._torch_module(value, context)
        return self._data(value, context)

    def _data(self, value: Any, context: Context) -> Description:
        class_: type = type(value)
        if is_pure_python(class_) and not is_library_class(class_):
            return self._object(value, attributes_of(value), context)
        try:
            return ("value", canonical(value))
        except CodecError:
            pass
        if class_ in (list, tuple):
            return (class_.__name__, self._items(value, context))
        if class_ is dict:
            return ("dict", self._pairs(value, context))
        if is_pure_python(class_):
            return self._object(value, attributes_of(value), context)
        return self._foreign(value)

    def _foreign(self, value: Any) -> Description:
        """Describe what is made in C: by its name in a library, or as a method of a value."""
        if _is_library_member(value):
            return ("named", *_names_of(value), library_version(_names_of(value)[0]))
        if type(value) is types.BuiltinMethodType:
            return ("bound", value.__name__, self.value(value.__self__))
        raise _Opaque

    def _method(self, method: types.MethodType, _context: Context) -> Description:
        context = Context.of_call(method.__func__.__name__)
        return ("method", self.value(method.__func__), self.captured(method.__self__, context))

    def _partial(self, partial: Any, _context: Context) -> Description:
        arguments = self._items(partial.args), self._pairs(partial.keywords)
        return ("partial", self.value(partial.func), *arguments)

    def _lru_cache(self, function: Any, _context: Context) -> Description:
        return ("lru_cache", self.value(function.__wrapped__))

    def _function(self, function: types.FunctionType, _context: Context) -> Description:
        code = read_code(function.__code__)
        name = (function.__module__, function.__qualname__, code.digest)
        if is_library_file(function.__code__.co_filename):
            version = library_version(function.__module__ or "")
            return ("library", *name, version, self._cells(function, code))
        return (
            "function",
            *name,
            self._items(function.__defaults__ or ()),
            self._pairs(function.__kwdefaults__ or {}),
            self._pairs({key: one for key, one in vars(function).items() if key != "__wrapped__"}),
            self._cells(function, code),
            self._globals(function, code),
            self._imports(function, code),
        )

    def _globals(self, function: types.FunctionType, code: Code) -> list[Description]:
        described = []
        for name in code.global_names:
            value = function.__globals__.get(name, _ABSENT)
            if value is get_model or value is aget_model:
                described.append((name, self._models(code)))
            elif value is not _ABSENT and not _is_own_record(value, name, code.changed_globals):
                described.append((name, self.captured(value, Context.of(code, name))))
        return described

    def _models(self, code: Code) -> list[Description]:
        """Describe the registered models that a function may ask for, loading them if need be."""
        known = sorted(registered_models())
        named = [name for name in known if name in code.strings]
        context = Context(code.names, code.uses, frozenset())
        return [(name, self.captured(get_model(name), context)) for name in named or known]

    def _cells(self, function: types.FunctionType, code: Code) -> list[Description]:
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        return [
            (name, self.captured(cell.cell_contents, Context.of(code, name)))
            for name, cell in cells
            if _is_assigned(cell)
            and not _is_own_record(cell.cell_contents, name, code.changed_cells)
        ]

    def _imports(self, function: types.FunctionType, code: Code) -> list[Description]:
        """Describe what a function imports when it runs; it is imported now."""
        described = []
        for name, level in sorted(code.imports):
            package = function.__globals__.get("__package__") or ""
            try:
                module = importlib.import_module("." * level + name, package)
            except Exception:  # noqa: BLE001 - importing runs any code; the call will fail the same
                described.append((name, level, None))
            else:
                context = Context(code.names, code.uses, frozenset())
                described.append((name, level, self.captured(module, context)))
        return described

    def _module(self, module: types.ModuleType, context: Context) -> Description:
        """Describe a library by its version, a module of the app by what is used of it."""
        filename = getattr(module, "__file__", None)
        if filename is None or is_library_file(filename):
            return ("module", module.__name__, library_version(module.__name__))
        used = {name: vars(module)[name] for name in context.names if name in vars(module)}
        return ("module", module.__name__, self._pairs(used, context))

    def _class(self, class_: type, _context: Context) -> Description:
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

    def _object(self, value: Any, attributes: Mapping[str, Any], context: Context) -> Description:
        """Describe an object by its class, the methods that may run, and its attributes.

        A library's object that cannot be read to the end gets one identity as a whole, since its
        other attributes (those of a client with its connections, say) come and go with its use.
        """
        class_: type = type(value)
        reached = reach(class_, context.names, context.called)
        kept = {
            name: one
            for name, one in attributes.items()
            if not _is_own_record(one, name, reached.changed)
        }
        inside = Context(context.names | reached.names, context.uses | reached.uses, _NO_NAMES)
        is_library = is_library_class(class_)
        self._library_objects += is_library
        try:
            return (
                "object",
                self._class_parts(class_, reached.methods, reached.changed),
                self._pairs(kept, inside),
            )
        finally:
            self._library_objects -= is_library

    def _torch_module(self, module: Any, context: Context) -> Description:
        try:
            description, own_parts = _torch_modules.describe(module)
        except UnreadableModule as error:
            raise _Opaque from error
        context = context._replace(
            names=context.names | {"forward"}, called=context.called | {"forward"}
        )
        return (
            "torch",
            description,
            [self._object(part, own_attributes(part), context) for part in own_parts],
        )

    def _items(self, values: Iterable[Any], context: Context = NOTHING) -> list[Description]:
        return [self.value(value, context) for value in values]

    def _pairs(self, mapping: Mapping[Any, Any], context: Context = NOTHING) -> list[Description]:
        """Describe a mapping in an order that does not depend on how it was filled."""
        if all(type(key) is str for key in mapping):
            return [(key, self.value(mapping[key], context.inside(key))) for key in sorted(mapping)]
        keys = sorted((canonical(self.value(key)), key) for key in mapping)
        return [(described, self.value(mapping[key], context)) for described, key in keys]

    _kinds = (
        (types.FunctionType, _function),
        (types.MethodType, _method),
        (functools.partial, _partial),
        (functools._lru_cache_wrapper, _lru_cache),  # noqa: SLF001 - the type has no other name
        (type, _class),
        (types.ModuleType, _module),
    )


def _fingerprint_of(value: Any) -> Any:
    """Return what was said about an object, by its registered fingerprint or by itself."""
    class_: type = type(value)
    for base in class_.__mro__:
        if base in _fingerprints:
            return _fingerprints[base](value)
    own = getattr(class_, "__fingerprint__", None)
    fingerprint = own(value) if own is not None else None
    return _ABSENT if fingerprint is None else fingerprint


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
