"""What can be read off a class: its methods, which of them may run, and what those change."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from dataclasses import dataclass
from typing import Any, Final

from hornbeam_ml.bytecode import is_library_file, read_code

_HEAP_TYPE: Final = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement
_BARE: Final = (object, types.SimpleNamespace)
_BEHAVIOUR: Final = (
    types.FunctionType,
    types.MemberDescriptorType,
    types.GetSetDescriptorType,
    property,
    functools.cached_property,
    staticmethod,
    classmethod,
)
_LIFE: Final = frozenset(
    f"__{name}__"
    for name in (
        *("init", "new", "del", "post_init", "setstate", "enter", "exit", "aenter", "aexit"),
        *("setitem", "delitem", "setattr", "delattr", "set", "delete"),
        *("iadd", "isub", "imul", "ior", "iand"),
    )
)


@dataclass(frozen=True, slots=True)
class Reached:
    """What happens when code uses an object of a class.

    Attributes:
        methods: The methods that may run.
        names: The names that these mention.
        uses: The names of which these take attributes, with them.
        changed: The attributes that methods which surely run count with or change in place.
    """

    methods: frozenset[str]
    names: frozenset[str]
    uses: frozenset[tuple[str, str]]
    changed: frozenset[str]


@functools.lru_cache(maxsize=4096)
def reach(class_: type, names: frozenset[str], called: frozenset[str]) -> Reached:
    """Return what code may run of a class.

    Operators run methods that no code mentions, so the special ones always count, but for those
    that make, change and end the object.

    Args:
        class_: The class.
        names: The names the code mentions, of whatever object.
        called: The attributes that it takes of an object of this class.
    """
    functions = methods_of_all(class_)
    special = {name for name in functions if name.startswith("__")} - _LIFE
    methods = _closure(functions, special | (names & functions.keys()), own_only=False)
    codes = [read_code(functions[name].__code__) for name in methods]
    certain = _closure(functions, special | (called & functions.keys()), own_only=True)
    changed = [read_code(functions[name].__code__).changed_attributes for name in certain]
    return Reached(
        frozenset(methods),
        frozenset().union(*(code.names for code in codes)),
        frozenset().union(*(code.uses for code in codes)),
        frozenset().union(*changed),
    )


def _closure(
    functions: dict[str, types.FunctionType], start: set[str], *, own_only: bool
) -> set[str]:
    """Return the methods reached from some: those mentioned, or only those taken of ``self``."""
    waiting, reached = list(start), set[str]()
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            code = read_code(functions[name].__code__)
            mentioned = {used for owner, used in code.uses if owner == code.first}
            waiting.extend((mentioned if own_only else code.names) & functions.keys())
    return reached


def methods_of(class_: type) -> dict[str, types.FunctionType]:
    """Return the functions a class itself defines, those behind properties and the like too."""
    found = {}
    for name, member in vars(class_).items():
        function = member
        if isinstance(member, property):
            function = member.fget
        elif isinstance(member, functools.cached_property):
            function = member.func
        elif isinstance(member, staticmethod | classmethod):
            function = member.__func__
        if isinstance(function, types.FunctionType):
            found[name] = function
    return found


def methods_of_all(class_: type) -> dict[str, types.FunctionType]:
    """Return the functions that objects of a class have as methods, inherited ones too."""
    functions: dict[str, types.FunctionType] = {}
    for base in reversed(class_.__mro__):
        functions.update(methods_of(base))
    return functions


def class_attributes_of(class_: type) -> dict[str, Any]:
    """Return the values a class itself keeps under names of its own."""
    return {
        name: value
        for name, value in vars(class_).items()
        if not (name.startswith("__") or name == "_abc_impl") and not isinstance(value, _BEHAVIOUR)
    }


def is_pure_python(class_: type) -> bool:
    """Return whether objects of the class hold nothing but Python attributes."""
    if class_.__module__ == "unittest.mock":
        return False  # a mock's attributes are its record of calls
    return all(base in _BARE or base.__flags__ & _HEAP_TYPE for base in class_.__mro__)


@functools.lru_cache(maxsize=4096)
def is_library_class(class_: type) -> bool:
    """Return whether a class belongs to Python or to an installed distribution."""
    if class_.__module__.partition(".")[0] in sys.stdlib_module_names:
        return class_.__module__ != "__main__"
    if not class_.__flags__ & _HEAP_TYPE:
        return True
    try:
        return is_library_file(inspect.getfile(class_))
    except (TypeError, OSError):
        return False


def attributes_of(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, those in slots too, without running any code of it."""
    found: dict[str, Any] = {}
    for base in type(value).__mro__:
        for name, member in vars(base).items():
            if isinstance(member, types.MemberDescriptorType):
                try:
                    found[name] = member.__get__(value)
                except AttributeError:
                    continue  # an empty slot
    with contextlib.suppress(AttributeError):
        found.update(object.__getattribute__(value, "__dict__"))
    return found
