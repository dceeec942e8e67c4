"""What happens to items and results in the caller's thread or task, outside of the model."""

from __future__ import annotations

import asyncio
import inspect
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from hornbeam_ml.functions import is_coroutine_function
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
        self._before_blocks = before is not None and not is_coroutine_function(before)
        self._after_blocks = after is not None and not is_coroutine_function(after)

    @property
    def awaits(self) -> bool:
        """Whether preparing an item has to be awaited."""
        return self._before is not None and (_in_threads.get() or not self._before_blocks)

    def prepare(self, items: Iterable[Any]) -> list[Any]:
        """Return what the model gets for the items of a caller; blocks."""
        if self._before is None:
            return list(items)
        return [finish(self._before(item)) for item in items]

    async def aprepare(self, items: Iterable[Any]) -> list[Any]:
        """Awaitable twin of `prepare`."""
        if self._before is None:
            return list(items)
        if self._before_blocks and _in_threads.get():
            return await asyncio.to_thread(self.prepare, items)
        return [await _awaited(self._before(item)) for item in items]

    def finish(self, result: Any) -> Any:
        """Return what a caller gets for a result of the model; blocks."""
        return result if self._after is None else finish(self._after(result))

    async def afinish(self, result: Any) -> Any:
        """Awaitable twin of `finish`."""
        if self._after is None:
            return result
        if self._after_blocks and _in_threads.get():
            return await asyncio.to_thread(self.finish, result)
        return await _awaited(self._after(result))

    def finish_all(self, results: list[Any]) -> list[Any]:
        """Return what a caller gets for some results; blocks."""
        return results if self._after is None else [self.finish(result) for result in results]

    async def afinish_all(self, results: list[Any]) -> list[Any]:
        """Awaitable twin of `finish_all`."""
        if self._after is None:
            return results
        if self._after_blocks and _in_threads.get():
            return await asyncio.to_thread(self.finish_all, results)
        return [await self.afinish(result) for result in results]


_in_threads: ContextVar[bool] = ContextVar("in_threads", default=False)


def use_threads() -> None:
    """In this task awaitable twins run plain functions in threads.

    Who answers calls of other processes does: on one event loop a slow function for one of them
    would hold up all the others.
    """
    _in_threads.set(True)


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
