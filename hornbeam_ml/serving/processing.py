"""What happens to items and results in the caller's thread or task, outside of the model."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from hornbeam_ml.streams import finish

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Processing:
    """The `preprocess` and `postprocess` of a serving: plain functions, coroutine functions, None.

    Args:
        before: Called with each item.
        after: Called with each result.
    """

    def __init__(
        self, before: Callable[[Any], Any] | None, after: Callable[[Any], Any] | None
    ) -> None:
        self._before = before
        self._after = after

    @property
    def awaits(self) -> bool:
        """Whether preparing an item has to be awaited."""
        call = getattr(type(self._before), "__call__", None)  # noqa: B004 - an object's own code
        return inspect.iscoroutinefunction(self._before) or inspect.iscoroutinefunction(call)

    def prepare(self, items: Iterable[Any]) -> list[Any]:
        """Return what the model gets for the items of a caller; blocks."""
        if self._before is None:
            return list(items)
        return [finish(self._before(item)) for item in items]

    async def aprepare(self, items: Iterable[Any]) -> list[Any]:
        """Awaitable twin of `prepare`."""
        if self._before is None:
            return list(items)
        return [await _awaited(self._before(item)) for item in items]

    def finish(self, result: Any) -> Any:
        """Return what a caller gets for a result of the model; blocks."""
        return result if self._after is None else finish(self._after(result))

    async def afinish(self, result: Any) -> Any:
        """Awaitable twin of `finish`."""
        return result if self._after is None else await _awaited(self._after(result))

    def finish_all(self, results: list[Any]) -> list[Any]:
        """Return what a caller gets for some results; blocks."""
        return results if self._after is None else [self.finish(result) for result in results]

    async def afinish_all(self, results: list[Any]) -> list[Any]:
        """Awaitable twin of `finish_all`."""
        if self._after is None:
            return results
        return [await self.afinish(result) for result in results]


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
