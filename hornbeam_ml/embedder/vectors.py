"""How the texts of one call become vectors: here, or in the model host."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from math import inf
from typing import TYPE_CHECKING, Any, Final

from hornbeam_ml.embedder.model import Facts, Item

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hornbeam_ml.embedder.model import TextModel
    from hornbeam_ml.serving.client import HostedCalls
    from hornbeam_ml.serving.serving import Serving

_LONG_FOR_A_LOOP: Final = 20_000
"""Characters whose tokens take a few milliseconds: an event loop leaves them to a thread."""


class _Vectors(ABC):
    """The texts of one call; the `Vectors` of the cache.

    Args:
        facts: What the model is.
        normalize: Whether vectors have length 1; None: as the model's own modules do.
        deadline: When to stop waiting, seconds of `time.monotonic`.
        at_a_time: How many texts of one call it is given at a time.
    """

    def __init__(
        self, facts: Facts, *, normalize: bool | None, deadline: float, at_a_time: int
    ) -> None:
        self.facts = facts
        self.normalize = facts.normalizes if normalize is None else bool(normalize)
        self.deadline = deadline
        self.at_a_time = at_a_time

    def key(self, text: str) -> tuple[Any, ...]:
        """Return the model, its numeric class, and the text."""
        facts = self.facts
        return facts.fingerprint, facts.backend, facts.precision, self.normalize, text

    def compute(self, text: str) -> Any:
        """Return the vector of a text."""
        return self.compute_all([text])[0]

    async def acompute(self, text: str) -> Any:
        """Awaitable twin of `compute`."""
        return (await self.acompute_all([text]))[0]

    @abstractmethod
    def compute_all(self, texts: Sequence[str]) -> Sequence[Any]:
        """Return the vectors of some texts."""

    @abstractmethod
    async def acompute_all(self, texts: Sequence[str]) -> Sequence[Any]:
        """Awaitable twin of `compute_all`."""

    def _timeout_ms(self) -> float | None:
        left = seconds_until(self.deadline)
        return None if left is None else 1000 * left


class LocalVectors(_Vectors):
    """Vectors that a serving of this process computes."""

    def __init__(self, model: TextModel, serving: Serving, **terms: Any) -> None:
        super().__init__(model.facts(), **terms)
        self._model = model
        self._serving = serving

    def compute_all(self, texts: Sequence[str]) -> list[Any]:
        """Return the vectors of some texts."""
        return self._serving.run_batch(self._items(texts), timeout_ms=self._timeout_ms())

    async def acompute_all(self, texts: Sequence[str]) -> list[Any]:
        """Awaitable twin of `compute_all`."""
        items = await self._aitems(texts)
        return await self._serving.here.arun_prepared(items, timeout_ms=self._timeout_ms())

    def compute_inline(self, texts: Sequence[str]) -> list[Any]:
        """Return the vectors of some texts, on the current stream where there is one."""
        return self._serving.run_inline(self._items(texts))

    async def acompute_inline(self, texts: Sequence[str]) -> list[Any]:
        """Awaitable twin of `compute_inline`."""
        return await self._serving.arun_inline(await self._aitems(texts))

    def _items(self, texts: Sequence[str]) -> list[Item]:
        prepare = self._model.engine.prepare
        return [Item(prepare(text), self.normalize) for text in texts]

    async def _aitems(self, texts: Sequence[str]) -> list[Item]:
        if sum(map(len, texts)) < _LONG_FOR_A_LOOP:
            return self._items(texts)
        return await asyncio.to_thread(self._items, texts)


class HostedVectors(_Vectors):
    """Vectors that the model host computes: texts go there, and one array comes back."""

    def __init__(self, calls: HostedCalls, **terms: Any) -> None:
        super().__init__(Facts(**calls.info), **terms)
        self._calls = calls

    def compute_all(self, texts: Sequence[str]) -> Sequence[Any]:
        """Return the vectors of some texts."""
        return self._call(texts, inline=False)

    async def acompute_all(self, texts: Sequence[str]) -> Sequence[Any]:
        """Awaitable twin of `compute_all`."""
        return await self._acall(texts, inline=False)

    def compute_inline(self, texts: Sequence[str]) -> Sequence[Any]:
        """Return the vectors of some texts, in batches of their own."""
        return self._call(texts, inline=True)

    async def acompute_inline(self, texts: Sequence[str]) -> Sequence[Any]:
        """Awaitable twin of `compute_inline`."""
        return await self._acall(texts, inline=True)

    def _call(self, texts: Sequence[str], *, inline: bool) -> Sequence[Any]:
        if not texts:
            return []
        (rows,) = self._calls.call("encode", [list(texts)], **self._options(inline=inline))
        return rows  # type: ignore[no-any-return] # an array is a sequence of its rows

    async def _acall(self, texts: Sequence[str], *, inline: bool) -> Sequence[Any]:
        if not texts:
            return []
        (rows,) = await self._calls.acall("encode", [list(texts)], **self._options(inline=inline))
        return rows  # type: ignore[no-any-return]

    def _options(self, *, inline: bool) -> dict[str, Any]:
        return {"timeout_ms": self._timeout_ms(), "normalize": self.normalize, "inline": inline}


def seconds_until(deadline: float) -> float | None:
    """Return the seconds until a deadline; None: there is none."""
    return None if deadline == inf else max(0.0, deadline - time.monotonic())
