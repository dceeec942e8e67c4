"""What can be read off a function's byte code: its digest, the names it uses, those it changes."""

from __future__ import annotations

import dis
import hashlib
import sys
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import CodeType
from typing import Any, Final

from hornbeam_state.codec import canonical

_MUTATORS: Final = frozenset(
    (
        "__delitem__",
        "__setitem__",
        "add",
        "append",
        "appendleft",
        "clear",
        "difference_update",
        "discard",
        "extend",
        "extendleft",
        "insert",
        "intersection_update",
        "pop",
        "popitem",
        "popleft",
        "put",
        "put_nowait",
        "remove",
        "reverse",
        "rotate",
        "setdefault",
        "sort",
        "symmetric_difference_update",
        "update",
    )
)
_STORES: Final = frozenset(
    ("STORE_GLOBAL", "STORE_DEREF", "STORE_ATTR", "DELETE_GLOBAL", "DELETE_DEREF", "DELETE_ATTR")
)
_LOADS: Final = frozenset(
    ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_ATTR", "LOAD_METHOD")
)


_PACKAGE_FOLDERS: Final = frozenset(("site-packages", "dist-packages"))


@dataclass(frozen=True, slots=True)
class Code:
    """The facts about one code object and those nested in it.

    Attributes:
        digest: Of instructions, constants and names; not of file name or line numbers. Equal in
            every process of one Python version, whatever ``PYTHONHASHSEED`` is.
        global_names: Global names it reads, sorted.
        names: Every attribute and global name in it.
        changed: Names of variables and attributes that it assigns to or changes in place.
    """

    digest: bytes
    global_names: tuple[str, ...]
    names: frozenset[str]
    changed: frozenset[str]


@lru_cache(maxsize=8192)
def read_code(code: CodeType) -> Code:
    """Return the facts about a code object."""
    instructions = list(dis.get_instructions(code))
    global_names = {
        str(one.argval) for one in instructions if one.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    names = set(code.co_names)
    changed = _changed_names(instructions)
    constants: list[Any] = []
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            nested = read_code(constant)
            global_names.update(nested.global_names)
            names |= nested.names
            changed |= nested.changed
            constants.append(("code", nested.digest))
        else:
            constants.append(_constant(constant))
    digest = hashlib.blake2b(digest_size=16)
    digest.update(
        canonical(
            (
                code.co_code,
                constants,
                code.co_names,
                code.co_varnames,
                code.co_freevars,
                code.co_cellvars,
                (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags),
                code.co_exceptiontable,
            )
        )
    )
    return Code(digest.digest(), tuple(sorted(global_names)), frozenset(names), frozenset(changed))


def _constant(value: Any) -> Any:
    """Return a constant in a form that `canonical` takes."""
    if isinstance(value, tuple):
        return ("tuple", *map(_constant, value))
    if isinstance(value, frozenset):
        return ("frozenset", frozenset(map(_constant, value)))
    if isinstance(value, complex):
        return ("complex", value.real, value.imag)
    return "Ellipsis" if value is ... else ("value", value)


def _changed_names(instructions: list[dis.Instruction]) -> set[str]:
    """Find names that are assigned to, changed by a method, or changed through an item.

    A function that counts its calls (``count += 1``, ``self.calls.append(x)``, ``seen[x] = y``)
    changes something that therefore can't be part of what it is. Missing one only costs a hit.
    """
    changed = {str(one.argval) for one in instructions if one.opname in _STORES}
    code = [one for one in instructions if one.opname not in ("CACHE", "PUSH_NULL", "NOP")]
    for first, second, third in zip(code, code[1:], [*code[2:], code[-1]], strict=False):
        if first.opname not in _LOADS:
            continue
        by_method = second.opname in ("LOAD_ATTR", "LOAD_METHOD") and second.argval in _MUTATORS
        by_item = second.opname.startswith("LOAD_") and third.opname in (
            "COPY",
            "STORE_SUBSCR",
            "DELETE_SUBSCR",
        )
        if by_method or by_item:
            changed.add(str(first.argval))
    return changed


_LIBRARY_FOLDERS: Final = (
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    str(Path(__file__).parent),  # ours, also when it is installed in place
)


@lru_cache(maxsize=4096)
def is_library_file(filename: str) -> bool:
    """Return whether a source file belongs to Python or to an installed distribution."""
    if filename.startswith(("<frozen", *_LIBRARY_FOLDERS)):
        return True
    # Those of another environment, of the user, or of the system, that sys.path may reach too.
    return not _PACKAGE_FOLDERS.isdisjoint(Path(filename).parts)


def library_version(module: str) -> str:
    """Return the version that a module's top-level package states, or Python's."""
    package = sys.modules.get(module.partition(".")[0])
    version = getattr(package, "__version__", None)
    return str(version) if isinstance(version, str) else sys.version.partition(" ")[0]
