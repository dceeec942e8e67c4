"""Measures engines: how many texts a second, and how near to the vectors of fp32."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hornbeam_ml.embedder.measurements import Measurement
from hornbeam_ml.embedder.settings import Unsupported
from hornbeam_ml.threads import limit_this_thread, process_share

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hornbeam_ml.embedder.engines.base import Engine

SAME_COSINE: Final = 0.99999
"""The same, for two ways of computing in fp32."""

_BATCH: Final = 8
_PASSES: Final = 3
_SENTENCES: Final = (
    "The cat sat on the mat.",
    "How do I reset my password?",
    "Refund policy",
    "GPU nodes answer over a queue, and only they need the large weights in their memory.",
    "In 1969 two people walked on the moon while a third kept the ship in orbit around it.",
    "Ein kurzer Satz auf Deutsch.",
    "A recipe for bread needs flour, water, salt, yeast and, more than all of these, patience.",
    "SELECT name, price FROM products WHERE price < 20 ORDER BY price DESC LIMIT 5;",
    "The quarterly report shows that revenue grew by 12.5% while costs stayed where they were.",
    "Please call +1 (555) 010-0199 between 9 and 17 o'clock, or write to help@example.org.",
    "Die Katze saß auf der Matte, und draußen fiel der erste Schnee des Jahres.",
    "naïve café, 東京, Ελλάδα",
)


def probe_texts() -> list[str]:
    """Return 48 texts of 2 to about 60 words."""
    count = len(_SENTENCES)
    texts = [
        " ".join(_SENTENCES[(start + step * 5) % count] for step in range(parts))
        for parts in range(1, 5)
        for start in range(count)
    ]
    return sorted(texts, key=len)


def least_cosine(vectors: Any, reference: Any) -> float:
    """Return the least cosine of corresponding rows of two arrays (n, dim); NaN counts as -1."""
    products = (vectors * reference).sum(axis=1, dtype=np.float64)
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(reference, axis=1)
    cosines = products / np.maximum(lengths, 1e-12)
    return float(np.nan_to_num(cosines, nan=-1.0).min())


def vectors_of(engine: Engine, texts: Sequence[str]) -> Any:
    """Return the vectors of texts, in batches as they are."""
    items = [engine.prepare(text) for text in texts]
    parts = [engine.run(items[at : at + _BATCH]) for at in range(0, len(items), _BATCH)]
    return np.concatenate(parts)


def check_same(engine: Engine, reference: Any) -> None:
    """Raise unless an engine in fp32 gives the vectors that sentence-transformers gives.

    Args:
        engine: The engine.
        reference: The vectors of the probe texts.

    Raises:
        Unsupported: it does not: the model's modules do more than they say.
    """
    cosine = least_cosine(vectors_of(engine, probe_texts()), reference)
    if cosine < SAME_COSINE:
        raise Unsupported(f"on token ids its vectors differ (cosine {cosine:.5f})")


def measure(engine: Engine, reference: Any, streams: int) -> Measurement:
    """Let an engine encode the probe texts, on so many threads at a time.

    Args:
        engine: The engine.
        reference: The vectors of the probe texts in fp32.
        streams: Threads, each with its part of the cores.
    """
    texts = probe_texts()
    items = [engine.prepare(text) for text in texts]
    batches = [items[at : at + _BATCH] for at in range(0, len(items), _BATCH)]
    cosine = least_cosine(vectors_of(engine, texts), reference)
    with ThreadPoolExecutor(
        streams, initializer=limit_this_thread, initargs=(process_share(streams),)
    ) as pool:
        best = min(_seconds(pool, engine, batches, streams) for _ in range(_PASSES))
    return Measurement(
        backend=engine.backend,
        precision=engine.precision,
        texts_per_s=round(len(texts) * streams / best, 1),
        cosine=round(cosine, 6),
    )


def _seconds(
    pool: ThreadPoolExecutor, engine: Engine, batches: Sequence[Any], streams: int
) -> float:
    start = time.perf_counter()
    for _ in pool.map(engine.run, [batch for batch in batches for _ in range(streams)]):
        pass
    return time.perf_counter() - start
