"""What this process offers to other nodes: a table that only `expose` fills.

A call names a module and a function. Both are a key of the table, and nothing is ever imported
because a call says so.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

from hornbeam_state.errors import ConfigError, NotExposed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

F = TypeVar("F", bound="Callable[..., Any]")
_MOST_NEAR: Final = 3


@dataclass(frozen=True, kw_only=True)
class Exposed:
    """A function that may be called from other nodes.

    Attributes:
        fn: The function.
        module: The first part of its key.
        name: The second.
        idempotent: Whether it may run twice for one call.
        is_async: Whether it runs on the event loop: a coroutine function or async generator.
        is_stream: Whether it yields: a generator or async generator.
    """

    fn: Callable[..., Any]
    module: str
    name: str
    idempotent: bool
    is_async: bool
    is_stream: bool

    @property
    def full_name(self) -> str:
        """``"module.function"``."""
        return f"{self.module}.{self.name}"


_table: dict[tuple[str, str], Exposed] = {}  # of this process; only `expose` writes to it


@overload
def expose(
    fn: F, *, module: str | None = None, name: str | None = None, idempotent: bool = False
) -> F: ...


@overload
def expose(
    fn: None = None,
    *,
    module: str | None = None,
    name: str | None = None,
    idempotent: bool = False,
) -> Callable[[F], F]: ...


def expose(
    fn: F | None = None,
    *,
    module: str | None = None,
    name: str | None = None,
    idempotent: bool = False,
) -> F | Callable[[F], F]:
    """Make a function callable from other nodes; a decorator, with or without arguments.

    The function itself stays as it is. A plain function runs in a thread, a coroutine function on
    the event loop of the node, where it must not block. Generators of both kinds are for
    `rpc_stream`.

    Args:
        fn: The function.
        module: What callers name as its module; None: the module it is defined in, and the name
            of the file where that is run as a program.
        name: What callers name as the function; None: its own name.
        idempotent: Whether running it twice does what running it once does. Callers may rely
            on it, such as by asking two nodes at a time.

    Raises:
        ConfigError: another function is exposed under these names, or it has none.

    Example:
        >>> @expose(module="example")
        ... def double(number):
        ...     return 2 * number
        >>> double(4)
        8
    """
    if fn is None:
        return lambda fn: expose(fn, module=module, name=name, idempotent=idempotent)
    own_name = name or getattr(fn, "__name__", None)
    if not isinstance(own_name, str):
        raise ConfigError(f"{fn!r} has no name of its own: expose it with name=")
    plain = inspect.unwrap(fn)
    is_generator = inspect.isgeneratorfunction(plain)
    is_async_generator = inspect.isasyncgenfunction(plain)
    made = Exposed(
        fn=fn,
        module=module or _module_of(fn),
        name=own_name,
        idempotent=idempotent,
        is_async=inspect.iscoroutinefunction(plain) or is_async_generator,
        is_stream=is_generator or is_async_generator,
    )
    present = _table.setdefault((made.module, made.name), made)
    if present is not made and not _is_reloaded(present.fn, fn):
        raise ConfigError(
            f"{made.full_name} is exposed already, by another function: give it another name="
        )
    _table[made.module, made.name] = made
    return fn


def find_exposed(module: str, name: str) -> Exposed:
    """Return a function by its key.

    Raises:
        NotExposed: there is none; the message tells names that are near, and no others.
    """
    found = _table.get((module, name))
    if found is None:
        raise NotExposed(f"{module}.{name} is not exposed here{_hint(module, name)}")
    return found


def exposed_names() -> dict[str, bool]:
    """Return each ``"module.function"``, and whether it is idempotent."""
    return {one.full_name: one.idempotent for one in list(_table.values())}


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Undo in the end what is exposed in a block; what was before stays."""
    before = dict(_table)
    try:
        yield
    finally:
        _table.clear()
        _table.update(before)


def _hint(module: str, name: str) -> str:
    names = [key[1] for key in list(_table) if key[0] == module]
    near = difflib.get_close_matches(name, names, n=_MOST_NEAR)
    if near:
        return f": is it {' or '.join(near)}?"
    return f": {len(names)} other functions of {module} are" if names else ""


def _module_of(fn: Callable[..., Any]) -> str:
    if fn.__module__ != "__main__":
        return str(fn.__module__)
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:  # python -m package.module
        return str(spec.name).removesuffix(".__main__")
    path = getattr(main, "__file__", None)
    return Path(path).stem if path else "__main__"


def _is_reloaded(before: Callable[..., Any], after: Callable[..., Any]) -> bool:
    """Whether it is the same function, as when its module is loaded again."""
    return _identity(before) == _identity(after)


def _identity(fn: Callable[..., Any]) -> tuple[Any, ...]:
    return fn.__module__, getattr(fn, "__qualname__", id(fn))
