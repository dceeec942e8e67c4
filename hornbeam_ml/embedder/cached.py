"""Vectors of texts through the inference cache: an entry for each text."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Final, Protocol

from hornbeam_ml.cache import acached_inference, cached_inference

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

PREFIX: Final = "embeddings"
"""The `cache_prefix` of all vectors."""

_MOST_AT_A_TIME: Final = 32
"""Texts of one call that wait in the queue: the next follows when one is done."""


class Vectors(Protocol):
    """What computes vectors."""

    def compute(self, text: str) -> Any:
        """Return the vector of a text; blocks."""
        ...

    async def acompute(self, text: str) -> Any:
        """Awaitable twin of `compute`."""
        ...

    def key(self, text: str) -> Any:
        """Return what the vector depends on."""
        ...


def cached_vectors(vectors: Vectors, texts: Sequence[str]) -> list[Any]:
    """Return the vectors of some texts, those that are not known computed together; blocks.

    Each text is a call of the cache, which other callers may wait for.
    """

    def one(text: str) -> Any:
        key = vectors.key(text)
        return cached_inference(vectors.compute, text, cache_key=key, cache_prefix=PREFIX)

    if len(texts) <= 1:
        return [one(text) for text in texts]
    contexts = [copy_context() for _ in texts]  # a context is for one thread at a time
    with ThreadPoolExecutor(min(len(texts), _MOST_AT_A_TIME)) as pool:
        return list(pool.map(lambda context, text: context.run(one, text), contexts, texts))


async def acached_vectors(vectors: Vectors, texts: Sequence[str]) -> list[Any]:
    """Awaitable twin of `cached_vectors`."""

    def one(text: str) -> Awaitable[Any]:
        key = vectors.key(text)
        return acached_inference(vectors.acompute, text, cache_key=key, cache_prefix=PREFIX)

    if len(texts) <= 1:
        return [await one(text) for text in texts]
    rows: list[Any] = [None] * len(texts)
    left = iter(range(len(texts)))

    async def some() -> None:
        for index in left:
            rows[index] = await one(texts[index])

    tasks = [asyncio.create_task(some()) for _ in range(min(len(texts), _MOST_AT_A_TIME))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:  # after an error the others are of no use
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return rows
