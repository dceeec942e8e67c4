"""Acting on a module as soon as somebody has imported it, without importing it oneself."""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from importlib.machinery import ModuleSpec
    from types import ModuleType


class AfterImport(MetaPathFinder):
    """Calls a function with each of some modules: now if it is there, else once it is imported.

    An import that fails is as it would be without this. What the function raises ends the import.

    Args:
        actions: What to call, by the name of the module.
    """

    def __init__(self, actions: Mapping[str, Callable[[ModuleType], None]]) -> None:
        self._actions = dict(actions)

    def start(self) -> None:
        """Act on what is there, and wait for the others."""
        for name in list(self._actions):
            if name in sys.modules:
                self._actions.pop(name)(sys.modules[name])
        sys.meta_path.insert(0, self)

    def stop(self) -> None:
        """Wait for no more modules; again is fine."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the module as the finders after this one do, its loader wrapped."""
        if fullname not in self._actions or self not in sys.meta_path:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _ThenAct(spec, self._actions[fullname])
                return spec
        return None


class _ThenAct(Loader):
    """A loader that calls a function with what it has loaded."""

    def __init__(self, spec: ModuleSpec, action: Callable[[ModuleType], None]) -> None:
        self._spec = spec
        self._real: Any = spec.loader
        self._action = action

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._real.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The real loader is back before the module runs: some ask theirs for resources.
        self._spec.loader = module.__loader__ = self._real
        self._real.exec_module(module)
        self._action(module)
