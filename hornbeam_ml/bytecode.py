"""What can be read off a function's byte code: its digest, the names it uses, those it changes."""

from __future__ import annotations

import dis
import hashlib
import sys
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any, Final

from hornbeam_state.codec import canonical

if TYPE_CHECKING:
    from collections.abc import Iterable

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
_GLOBAL, _CELL, _ATTRIBUTE = "global", "cell", "attribute"
_KIND_OF: Final = {
    "STORE_GLOBAL": _GLOBAL,
    "LOAD_GLOBAL": _GLOBAL,
    "LOAD_NAME": _GLOBAL,
    "STORE_DEREF": _CELL,
    "LOAD_DEREF": _CELL,
    "LOAD_CLASSDEREF": _CELL,
    "STORE_ATTR": _ATTRIBUTE,
    "LOAD_ATTR": _ATTRIBUTE,
    "LOAD_METHOD": _ATTRIBUTE,
}
_SKIPPED: Final = ("CACHE", "PUSH_NULL", "NOP", "PRECALL")
_PACKAGE_FOLDERS: Final = frozenset(("site-packages", "dist-packages"))


@dataclass(frozen=True, slots=True)
class Code:
    """The facts about one code object and those nested in it.

    Attributes:
        digest: Of instructions, constants and names; not of file name or line numbers. Equal in
            every process of one Python version, whatever ``PYTHONHASHSEED`` is.
        global_names: Global names it reads, sorted.
        names: Every attribute and global name in it.
        uses: Pairs of a name and an attribute taken of what it stands for: ``model`` and
            ``predict`` of ``model.predict(x)``.
        changed_globals: Globals that it counts with or changes in place.
        changed_cells: Enclosing variables likewise.
        changed_attributes: Attributes likewise.
        imports: Modules it imports when it runs: name and level.
        strings: The str constants in it.
        first: The name of its first argument, ``self`` in a method.
    """

    digest: bytes
    global_names: tuple[str, ...]
    names: frozenset[str]
    uses: frozenset[tuple[str, str]]
    changed_globals: frozenset[str]
    changed_cells: frozenset[str]
    changed_attributes: frozenset[str]
    imports: frozenset[tuple[str, int]]
    strings: frozenset[str]
    first: str


@lru_cache(maxsize=8192)
def read_code(code: CodeType) -> Code:
    """Return the facts about a code object."""
    instructions = [one for one in dis.get_instructions(code) if one.opname not in _SKIPPED]
    nested = [read_code(one) for one in code.co_consts if isinstance(one, CodeType)]
    changed = _changed_names(instructions)
    read = {str(one.argval) for one in instructions if one.opname in ("LOAD_GLOBAL", "LOAD_NAME")}

    def joined(own: Iterable[Any], name: str) -> frozenset[Any]:
        return frozenset(own).union(*(getattr(one, name) for one in nested))

    return Code(
        digest=_digest(code),
        global_names=tuple(sorted(joined(read, "global_names"))),
        names=joined(code.co_names, "names"),
        uses=joined(_uses(instructions), "uses"),
        changed_globals=joined(changed[_GLOBAL], "changed_globals"),
        changed_cells=joined(changed[_CELL], "changed_cells"),
        changed_attributes=joined(changed[_ATTRIBUTE], "changed_attributes"),
        imports=joined(_imports(instructions), "imports"),
        strings=joined((one for one in code.co_consts if type(one) is str), "strings"),
        first=code.co_varnames[0] if code.co_argcount else "",
    )


def _digest(code: CodeType) -> bytes:
    constants = [
        ("code", read_code(one).digest) if isinstance(one, CodeType) else _constant(one)
        for one in code.co_consts
    ]
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    content = canonical((code.co_code, constants, names, counts, code.co_exceptiontable))
    return hashlib.blake2b(content, digest_size=16).digest()


def _uses(instructions: list[dis.Instruction]) -> set[tuple[str, str]]:
    return {
        (str(first.argval), str(second.argval))
        for first, second in pairwise(instructions)
        if first.opname.startswith("LOAD_") and second.opname in ("LOAD_ATTR", "LOAD_METHOD")
    }


def _imports(instructions: list[dis.Instruction]) -> set[tuple[str, int]]:
    found = set()
    for place, one in enumerate(instructions):
        if one.opname == "IMPORT_NAME":
            level = instructions[place - 2].argval if place > 1 else 0
            found.add((str(one.argval), level if isinstance(level, int) else 0))
    return found


def _constant(value: Any) -> Any:
    """Return a constant in a form that `canonical` takes."""
    if isinstance(value, tuple):
        return ("tuple", *map(_constant, value))
    if isinstance(value, frozenset):
        return ("frozenset", frozenset(map(_constant, value)))
    if isinstance(value, complex):
        return ("complex", value.real, value.imag)
    return "Ellipsis" if value is ... else ("value", value)


def _changed_names(instructions: list[dis.Instruction]) -> dict[str, set[str]]:
    """Find names that a function counts with, or whose values it changes in place.

    What it changes itself (``count += 1``, ``self.calls.append(x)``, ``seen[x] = y``) can't be
    part of what it is, or no call would be the same as the one before. A name that it merely
    assigns, as in loading a model at the first call, is read as any other.
    """
    changed: dict[str, set[str]] = {_GLOBAL: set(), _CELL: set(), _ATTRIBUTE: set()}
    for place, one in enumerate(instructions):
        kind = _KIND_OF.get(one.opname)
        if kind is None:
            continue
        before = instructions[max(place - 2, 0) : place]
        following = instructions[place + 1 : place + 3]
        if one.opname.startswith("STORE_"):
            # An attribute is stored after its object was swapped to the top of the stack.
            is_changed = any(
                step.opname == "BINARY_OP" and step.argrepr.endswith("=") for step in before
            )
        else:
            is_changed = _is_mutated(following)
        if is_changed:
            changed[kind].add(str(one.argval))
    return changed


def _is_mutated(following: list[dis.Instruction]) -> bool:
    """Return whether what was just loaded is changed by a method, or through an item."""
    if not following:
        return False
    by_method = following[0].opname in ("LOAD_ATTR", "LOAD_METHOD")
    if by_method and following[0].argval in _MUTATORS:
        return True
    item_ops = ("COPY", "STORE_SUBSCR", "DELETE_SUBSCR")
    return following[0].opname.startswith("LOAD_") and following[-1].opname in item_ops


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
