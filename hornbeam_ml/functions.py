"""What kind of function something that can be called is."""

from __future__ import annotations

import inspect
from typing import Any


def is_coroutine_function(function: Any) -> bool:
    """Return whether calling it makes a coroutine, also of an object whose class says how."""
    call = getattr(type(function), "__call__", None)  # noqa: B004 - an object's own code
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)
