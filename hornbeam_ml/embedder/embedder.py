"""`Embedder`: texts in, vectors out."""

from __future__ import annotations

import asyncio
import contextvars
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import numpy as np

from hornbeam_ml import threads
from hornbeam_ml.cache import acached_inference, cached_inference
from hornbeam_ml.devices import check_device, pick_device
from hornbeam_ml.embedder.directories import directory_of
from hornbeam_ml.embedder.loading import Source, Wish
from hornbeam_ml.embedder.probe import probe_texts
from hornbeam_ml.serving.serving import Serving
from hornbeam_state.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    from hornbeam_ml.embedder.engines.base import Engine
    from hornbeam_ml.embedder.loading import AskedPrecision, Backend
    from hornbeam_ml.serving.stats import ServingStats

CACHE_PREFIX: Final = "embeddings"
_TOKENS_ON_CPU: Final = 1024
_TOKENS_ON_GPU: Final = 32_768
_TEXTS_ON_CPU: Final = 32
_TEXTS_ON_GPU: Final = 512
_MOST_STREAMS: Final = 8
_LONG_FOR_A_LOOP: Final = 20_000
"""Characters whose tokens take a few milliseconds: an event loop leaves them to a thread."""

_MOST_AT_A_TIME: Final = 32


class _Item(NamedTuple):
    """A text as the engine takes it."""

    prepared: Any
    normalize: bool


class Embedder:
    """A sentence-transformers model, several times faster, batching by itself.

    Texts become tokens in the caller's thread, wait with those of other callers, and run in
    batches of similar length on several streams that share the weights. The vectors are those of
    ``SentenceTransformer.encode`` within the precision of the backend: with ``auto`` a cosine of
    0.999 or more, with ``exact`` the same to 1e-5. Safe to use from any thread and any task.

    The first process of a machine that uses a model with ``backend="auto"`` converts it for the
    libraries that are installed and measures them, which takes some seconds; others wait for it.
    The result is kept in ``~/.cache/hornbeam`` (`HORNBEAM_CACHE`), so it is done once for a model
    and these versions of the libraries.

    Args:
        model: The directory of a SentenceTransformer, of an export of one (`export`), or a name
            in the cache of the hub.
        backend: ``torch``, ``onnx``, ``openvino``; ``auto`` takes the fastest that is installed;
            ``sentence-transformers`` calls ``SentenceTransformer.encode``.
        device: ``auto``, ``cpu``, or ``cuda:1``.
        precision: ``auto`` takes the fastest with a cosine of at least 0.999 to fp32 on built-in
            texts; ``exact`` or ``fp32``, ``bf16``, and ``int8``, which is less than that.
        max_batch_tokens: The most tokens in a batch, padding included.
        cache: Whether vectors are kept in the shared cache, one entry for each text.
        name: What `predict` knows it by.

    Raises:
        ConfigError: a setting makes no sense.

    Example:
        >>> embedder = Embedder("models/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> embedder.encode("the cat sat on the mat").shape  # doctest: +SKIP
        (384,)
    """

    def __init__(
        self,
        model: str | PathLike[str] = "sentence-transformers/all-MiniLM-L6-v2",
        *,
        backend: Backend = "auto",
        device: str = "auto",
        precision: AskedPrecision = "auto",
        max_batch_tokens: int | None = None,
        cache: bool = True,
        name: str | None = None,
        queue_limit: int = 1024,
        deadline_ms: float | None = None,
    ) -> None:
        self.model = str(model)
        self._cache = cache
        on_gpu = pick_device(check_device(device)) != "cpu"
        streams = 1 if on_gpu else min(threads.process_share(1), _MOST_STREAMS)
        self._wish = Wish(
            backend=backend,
            precision=precision,
            device=pick_device(device),
            streams=streams,
        )
        self._source: Source | None = None
        self._engine: Engine | None = None
        self._dim = 0
        self._serving = Serving(
            self._load,
            name=name,
            preprocess=self._prepared,
            length=self._length,
            batch_size=_TEXTS_ON_GPU if on_gpu else _TEXTS_ON_CPU,
            max_batch_tokens=max_batch_tokens or (_TOKENS_ON_GPU if on_gpu else _TOKENS_ON_CPU),
            streams=streams,
            device=device,
            queue_limit=queue_limit,
            deadline_ms=deadline_ms,
        )

    # Calls.

    def encode(
        self,
        text_or_texts: str | Sequence[str],
        *,
        normalize: bool | None = None,
        inline: bool = False,
        timeout_ms: float | None = None,
    ) -> Any:
        """Return the vector of a text, or the vectors of some; blocks.

        Args:
            text_or_texts: A str, or a sequence of them.
            normalize: Whether vectors have length 1; None: as the model's own modules do.
            inline: Run here, on the current stream where there is one, unmixed with other
                callers' texts and without the cache.
            timeout_ms: When to stop waiting.

        Returns:
            float32 of shape (dim,) for a str, (n, dim) for a sequence. It is the caller's own.

        Raises:
            TypeError: what was given is no text.
            Overloaded: too many texts wait.
            DeadlineExceeded: the deadline passed.
            ModelError: the model could not be loaded.
        """
        texts, single = _texts(text_or_texts)
        self._serving.start()
        wanted = self._normalizes(normalize)
        if inline:
            rows = self._serving.run_inline(self._items(texts, wanted))
        elif self._cache:
            rows = self._cached(texts, wanted, timeout_ms)
        else:
            rows = self._serving.run_batch(self._items(texts, wanted), timeout_ms=timeout_ms)
        return self._array(rows, single=single)

    async def aencode(
        self,
        text_or_texts: str | Sequence[str],
        *,
        normalize: bool | None = None,
        inline: bool = False,
        timeout_ms: float | None = None,
    ) -> Any:
        """Awaitable twin of `encode`. Cancelled, it takes back the texts that have not started."""
        texts, single = _texts(text_or_texts)
        await self._serving.astart()
        wanted = self._normalizes(normalize)
        if inline:
            rows = await self._serving.arun_inline(self._items(texts, wanted))
        elif self._cache:
            calls = [self._acached_one(text, wanted, timeout_ms) for text in texts]
            rows = [await calls[0]] if single else await _gathered(calls)
        else:
            items = await self._aitems(texts, wanted)
            rows = await self._serving.arun_batch(items, timeout_ms=timeout_ms)
        return self._array(rows, single=single)

    # What it is.

    @property
    def dim(self) -> int:
        """Numbers in a vector; loads the model."""
        self._serving.start()
        return self._dim

    @property
    def backend(self) -> str:
        """The library that runs it; loads the model."""
        return self._loaded().backend

    @property
    def precision(self) -> str:
        """The arithmetic of its matrix products; loads the model."""
        return self._loaded().precision

    @property
    def fingerprint(self) -> str:
        """Which model it is: a digest of its weights and configuration.

        The same on every backend and in every precision: vectors of one fingerprint can be
        compared with each other.
        """
        return self._found().fingerprint

    @property
    def ready(self) -> bool:
        """Whether it is loaded and takes texts."""
        return self._serving.ready

    def stats(self) -> ServingStats:
        """Return the figures of this process: batches, fill, padding, waits."""
        return self._serving.stats()

    def export(self, path: str | PathLike[str]) -> None:
        """Write the model to a directory from which `Embedder` runs it without torch.

        It holds the model for each library that is installed here (onnxruntime, openvino). To
        run it, one of these, tokenizers and numpy are enough.

        Args:
            path: The directory; it is made.

        Raises:
            ModelError: nothing is installed that could run it, or it cannot be converted.
        """
        self._found().export(path, self._wish)

    async def aexport(self, path: str | PathLike[str]) -> None:
        """Awaitable twin of `export`."""
        await asyncio.to_thread(self.export, path)

    # Life.

    def start(self, timeout: float | None = None) -> None:
        """Load the model, unless that is done, and wait until it is; see `Serving.start`."""
        self._serving.start(timeout)

    async def astart(self, timeout: float | None = None) -> None:
        """Awaitable twin of `start`."""
        await self._serving.astart(timeout)

    def close(self, *, drain: bool = True, timeout: float = 30) -> None:
        """Take no more texts; see `Serving.close`."""
        self._serving.close(drain=drain, timeout=timeout)

    async def aclose(self, *, drain: bool = True, timeout: float = 30) -> None:
        """Awaitable twin of `close`."""
        await self._serving.aclose(drain=drain, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"Embedder({self.model!r})"

    # On a stream's thread.

    def _load(self) -> Any:
        """Open the engine and warm it up, for all threads and for a stream's part of them."""
        engine = self._found().open(self._wish)
        share = threads.ThreadShare(self._wish.streams)
        texts = [engine.prepare(text) for text in probe_texts()[::8]]
        for alone in (True, False):
            if self._wish.device == "cpu":
                share.take(alone=alone)
            vectors = engine.run(texts)
        self._engine, self._dim = engine, vectors.shape[1]
        return self._run

    def _run(self, batch: Sequence[_Item]) -> list[Any]:
        vectors = self._loaded().run([item.prepared for item in batch])
        return [
            _normalized(vector) if item.normalize else vector.copy()
            for vector, item in zip(vectors, batch, strict=True)
        ]

    # Helpers.

    def _found(self) -> Source:
        if self._source is None:
            self._source = Source(directory_of(self.model))
        return self._source

    def _loaded(self) -> Engine:
        if self._engine is None:
            self._serving.start()
        if self._engine is None:
            raise ConfigError("the embedder is being loaded by the thread that asks for it")
        return self._engine

    def _normalizes(self, normalize: bool | None) -> bool:
        return self._loaded().normalizes if normalize is None else bool(normalize)

    def _prepared(self, item: Any) -> _Item:
        """Return what the engine takes: the `preprocess` of the serving."""
        if isinstance(item, _Item):
            return item
        if not isinstance(item, str):
            raise TypeError(f"an embedder takes a str, not {type(item).__qualname__}")
        return _Item(self._loaded().prepare(item), self._normalizes(None))

    def _length(self, item: _Item) -> int:
        return self._loaded().length(item.prepared)

    def _items(self, texts: Sequence[str], normalize: bool) -> list[_Item]:
        prepare = self._loaded().prepare
        return [_Item(prepare(text), normalize) for text in texts]

    async def _aitems(self, texts: Sequence[str], normalize: bool) -> list[_Item]:
        if sum(map(len, texts)) < _LONG_FOR_A_LOOP:
            return self._items(texts, normalize)
        return await asyncio.to_thread(self._items, texts, normalize)

    def _array(self, rows: Sequence[Any], *, single: bool) -> Any:
        if single:
            return rows[0]
        return np.stack(rows) if rows else np.empty((0, self._dim), np.float32)

    # The cache.

    def _key(self, text: str, normalize: bool) -> tuple[Any, ...]:
        """Return the key of a vector: the model, its numeric class, and the text."""
        engine = self._loaded()
        return self.fingerprint, engine.backend, engine.precision, normalize, text

    def _cached(self, texts: Sequence[str], normalize: bool, timeout_ms: float | None) -> list[Any]:
        def one(text: str) -> Any:
            return cached_inference(
                lambda text: self._serving.run_batch(
                    self._items([text], normalize), timeout_ms=timeout_ms
                )[0],
                text,
                cache_key=self._key(text, normalize),
                cache_prefix=CACHE_PREFIX,
            )

        if len(texts) < 2:
            return [one(text) for text in texts]
        # Each text is a call of its own that others may wait for; together they make batches.
        contexts = [contextvars.copy_context() for _ in texts]
        with ThreadPoolExecutor(min(len(texts), _MOST_AT_A_TIME)) as pool:
            return list(pool.map(lambda context, text: context.run(one, text), contexts, texts))

    async def _acached_one(self, text: str, normalize: bool, timeout_ms: float | None) -> Any:
        async def compute(text: str) -> Any:
            items = await self._aitems([text], normalize)
            return (await self._serving.arun_batch(items, timeout_ms=timeout_ms))[0]

        return await acached_inference(
            compute, text, cache_key=self._key(text, normalize), cache_prefix=CACHE_PREFIX
        )


def _texts(text_or_texts: Any) -> tuple[list[str], bool]:
    """Return the texts as a list, and whether there was one that was no list.

    Raises:
        TypeError: there is something else than a str.
    """
    if isinstance(text_or_texts, str):
        return [text_or_texts], True
    texts = list(text_or_texts)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(
                f"encode takes a str or a list of str, not {type(text).__qualname__} in a list"
            )
    return texts, False


async def _gathered(calls: Sequence[Any]) -> list[Any]:
    """Await all calls; the first error ends the others."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _normalized(vector: Any) -> Any:
    """Return a vector scaled to length 1, as torch's ``normalize`` does it: never by less."""
    return vector / max(float(np.linalg.norm(vector)), 1e-12)
