"""`Embedder`: texts in, vectors out."""

from __future__ import annotations

import asyncio
import time
from math import inf
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from hornbeam_ml import threads
from hornbeam_ml.devices import check_device, pick_device
from hornbeam_ml.embedder.cached import acached_vectors, cached_vectors
from hornbeam_ml.embedder.model import Facts, TextModel, check_text
from hornbeam_ml.embedder.offer import EmbedderOffer, target_of
from hornbeam_ml.embedder.vectors import HostedVectors, LocalVectors, seconds_until
from hornbeam_ml.embedder.wish import Wish
from hornbeam_ml.request import current_request
from hornbeam_ml.serving.serving import Serving
from hornbeam_state.errors import DeadlineExceeded

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    from hornbeam_ml.embedder.wish import AskedPrecision, Backend
    from hornbeam_ml.serving.stats import ServingStats

_TOKENS_ON_CPU: Final = 1024
_TOKENS_ON_GPU: Final = 32_768
_TEXTS_ON_CPU: Final = 32
_TEXTS_ON_GPU: Final = 512
_MOST_STREAMS: Final = 8


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
        self._deadline_ms = deadline_ms
        on_gpu = pick_device(check_device(device)) != "cpu"
        streams = 1 if on_gpu else min(threads.process_share(1), _MOST_STREAMS)
        wish = Wish(
            backend=backend,
            precision=precision,
            device=pick_device(device),
            streams=streams,
        )
        self._model = TextModel(self.model, wish)
        batch_size = _TEXTS_ON_GPU if on_gpu else _TEXTS_ON_CPU
        if max_batch_tokens is None:
            max_batch_tokens = _TOKENS_ON_GPU if on_gpu else _TOKENS_ON_CPU
        self._at_a_time = min(queue_limit, batch_size * streams)
        self._serving = Serving(
            self._model.load,
            name=name,
            preprocess=self._model.item,
            length=self._model.length,
            batch_size=batch_size,
            max_batch_tokens=max_batch_tokens,
            pads=self._model.pads,
            streams=streams,
            device=device,
            queue_limit=queue_limit,
            deadline_ms=deadline_ms,
        )
        self._model.started_by(self._serving.start)
        self._offer = EmbedderOffer(self._model, self._serving, self._at_a_time)
        what = (self.model, backend, precision, device)
        self._serving.hosted_as(name or target_of(what), self._offer)

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
            timeout_ms: When to stop waiting, also for the model to be loaded. An inline call
                that has begun is not interrupted.

        Returns:
            float32 of shape (dim,) for a str, (n, dim) for a sequence. It is the caller's own.

        Raises:
            TypeError: what was given is no text.
            ValueError: a text has lone surrogates, which no tokenizer takes.
            Overloaded: too many texts wait.
            DeadlineExceeded: the deadline passed.
            ModelError: the model could not be loaded.
        """
        texts, single = _texts(text_or_texts)
        deadline = self._deadline(timeout_ms)
        if not self._serving.found:
            self.start(seconds_until(deadline))
        vectors = self._vectors(normalize=normalize, deadline=deadline)
        if inline:
            rows = vectors.compute_inline(texts)
        elif self._cache:
            try:
                rows = cached_vectors(vectors, texts, deadline)
            except TimeoutError as error:
                raise self._too_late() from error
        else:
            rows = vectors.compute_all(texts)
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
        deadline = self._deadline(timeout_ms)
        if not self._serving.found:
            await self.astart(seconds_until(deadline))
        vectors = self._vectors(normalize=normalize, deadline=deadline)
        if inline:
            rows = await vectors.acompute_inline(texts)
        elif self._cache:
            rows = await self._acached(vectors, texts)
        else:
            rows = await vectors.acompute_all(texts)
        return self._array(rows, single=single)

    async def _acached(
        self, vectors: LocalVectors | HostedVectors, texts: Sequence[str]
    ) -> list[Any]:
        timeout = asyncio.timeout(seconds_until(vectors.deadline))
        try:
            async with timeout:
                return await acached_vectors(vectors, texts)
        except TimeoutError as error:
            if timeout.expired():
                raise self._too_late() from error
            raise

    # What it is.

    @property
    def dim(self) -> int:
        """Numbers in a vector; loads the model."""
        return self._facts().dim

    @property
    def backend(self) -> str:
        """The library that runs it; loads the model."""
        return self._facts().backend

    @property
    def precision(self) -> str:
        """The arithmetic of its matrix products; loads the model."""
        return self._facts().precision

    @property
    def fingerprint(self) -> str:
        """Which model it is: a digest of its weights and configuration.

        The same on every backend and in every precision: vectors of one fingerprint can be
        compared with each other.
        """
        hosted = self._serving.hosted
        return self._model.source.fingerprint if hosted is None else self._facts().fingerprint

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
        self._model.source.export(path, self._model.wish)

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

    def _deadline(self, timeout_ms: float | None) -> float:
        if timeout_ms is None:
            timeout_ms = self._deadline_ms
        request = current_request()
        latest = inf if request is None else request.deadline
        return latest if timeout_ms is None else min(latest, time.monotonic() + timeout_ms / 1000)

    def _too_late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"{self!r}: the deadline passed before there was a result")

    def _vectors(self, *, normalize: bool | None, deadline: float) -> LocalVectors | HostedVectors:
        terms = {"normalize": normalize, "deadline": deadline, "at_a_time": self._at_a_time}
        hosted = self._serving.hosted
        if hosted is not None:
            return HostedVectors(hosted, **terms)
        return LocalVectors(self._model, self._serving, **terms)

    def _facts(self) -> Facts:
        """Return what the model is; loads it."""
        self._serving.start()
        hosted = self._serving.hosted
        return self._model.facts() if hosted is None else Facts(**hosted.info)

    def _array(self, rows: Sequence[Any], *, single: bool) -> Any:
        if single:
            return rows[0]
        return np.stack(rows) if len(rows) else np.empty((0, self.dim), np.float32)


def _texts(text_or_texts: Any) -> tuple[list[str], bool]:
    """Return the texts as a list, and whether there was one that was no list.

    Raises:
        TypeError: there is something else than a str.
        ValueError: a text is not valid Unicode.
    """
    if isinstance(text_or_texts, str):
        check_text(text_or_texts)
        return [text_or_texts], True
    if isinstance(text_or_texts, bytes | bytearray):
        raise TypeError("encode takes a str or a list of str, not bytes: decode them first")
    texts = list(text_or_texts)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(
                f"encode takes a str or a list of str, not {type(text).__qualname__} in a list"
            )
        check_text(text)
    return texts, False
