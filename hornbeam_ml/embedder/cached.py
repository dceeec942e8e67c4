"""Vectors of texts through the inference cache: an entry for each text."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from math import inf
from typing import TYPE_CHECKING, Any, Final, Protocol

from hornbeam_ml.cache import acached_inference, cached_inference

if TYPE_CHECKING:
    from collections.abc import Sequence

PREFIX: Final = "embeddings"
"""The `cache_prefix` of all vectors."""

_MOST_THREADS: Final = 64


class Vectors(Protocol):
    """What computes vectors."""

    @property
    def at_a_time(self) -> int:
        """How many texts of one call it is given at a time: it may have room for no more."""
        ...

    def compute(self, text: str) -> Any:
        """Return the vector of a text; blocks."""
        ...

    async def acompute(self, text: str) -> Any:
        """Awaitable twin of `compute`."""
        ...

    def key(self, text: str) -> Any:
        """Return what the vector depends on."""
        ...


def cached_vectors(vectors: Vectors, texts: Sequence[str], deadline: float = inf) -> list[Any]:
    """Return the vectors of some texts, those that are not known computed together; blocks.

    Each text is a call of the cache, which other callers may wait for.

    Args:
        vectors: Computes them.
        texts: The texts.
        deadline: When to stop waiting, seconds of `time.monotonic`.

    Raises:
        TimeoutError: the deadline passed, while another caller computed what this one waits for.
    """

    def one(text: str) -> Any:
        key = vectors.key(text)
        return cached_inference(vectors.compute, text, cache_key=key, cache_prefix=PREFIX)

    if len(texts) <= 1 and deadline == inf:
        return [one(text) for text in texts]
    contexts = [copy_context() for _ in texts]  # a context is for one thread at a time
    pool = ThreadPoolExecutor(max(1, min(len(texts), vectors.at_a_time, _MOST_THREADS)))
    try:
        timeout = None if deadline == inf else max(0.0, deadline - time.monotonic())
        found = pool.map(
            lambda context, text: context.run(one, text), contexts, texts, timeout=timeout
        )
        return list(found)
    finally:
        pool.shutdown(wait=deadline == inf, cancel_futures=True)


async def acached_vectors(vectors: Vectors, texts: Sequence[str]) -> list[Any]:
    """Awaitable twin of `cached_vectors`; whoever has a deadline cancels it."""
    room = asyncio.Semaphore(vectors.at_a_time)

    async def one(text: str) -> Any:
        key = vectors.key(text)
        async with room:
            return await acached_inference(
                vectors.acompute, text, cache_key=key, cache_prefix=PREFIX
            )

    if len(texts) <= 1:
        return [await one(text) for text in texts]
    tasks = [asyncio.ensure_future(one(text)) for text in texts]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:  # after an error the others are of no use
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
