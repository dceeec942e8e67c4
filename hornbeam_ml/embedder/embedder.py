"""`Embedder`: texts in, vectors out."""

from __future__ import annotations

import asyncio
import time
from math import inf
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import numpy as np

from hornbeam_ml import threads
from hornbeam_ml.devices import check_device, pick_device
from hornbeam_ml.embedder.cached import acached_vectors, cached_vectors
from hornbeam_ml.embedder.model import Item, TextModel, check_text
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
_LONG_FOR_A_LOOP: Final = 20_000
"""Characters whose tokens take a few milliseconds: an event loop leaves them to a thread."""


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
        if not self._model.loaded:
            self.start(_left(deadline))
        request = self._request(normalize=normalize, deadline=deadline)
        if inline:
            rows = self._serving.run_inline(request.items(texts))
        elif self._cache:
            try:
                rows = cached_vectors(request, texts, deadline)
            except TimeoutError as error:
                raise self._too_late() from error
        else:
            rows = request.compute_all(texts)
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
        if not self._model.loaded:
            await self.astart(_left(deadline))
        request = self._request(normalize=normalize, deadline=deadline)
        if inline:
            rows = await self._serving.arun_inline(await request.aitems(texts))
        elif self._cache:
            rows = await self._acached(request, texts)
        else:
            rows = await request.acompute_all(texts)
        return self._array(rows, single=single)

    async def _acached(self, request: _Request, texts: Sequence[str]) -> list[Any]:
        timeout = asyncio.timeout(_left(request.deadline))
        try:
            async with timeout:
                return await acached_vectors(request, texts)
        except TimeoutError as error:
            if timeout.expired():
                raise self._too_late() from error
            raise

    # What it is.

    @property
    def dim(self) -> int:
        """Numbers in a vector; loads the model."""
        self._serving.start()
        return self._model.dim

    @property
    def backend(self) -> str:
        """The library that runs it; loads the model."""
        return self._model.engine.backend

    @property
    def precision(self) -> str:
        """The arithmetic of its matrix products; loads the model."""
        return self._model.engine.precision

    @property
    def fingerprint(self) -> str:
        """Which model it is: a digest of its weights and configuration.

        The same on every backend and in every precision: vectors of one fingerprint can be
        compared with each other.
        """
        return self._model.source.fingerprint

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

    def _request(self, *, normalize: bool | None, deadline: float) -> _Request:
        model = self._model
        wanted = model.engine.normalizes if normalize is None else bool(normalize)
        return _Request(model, self._serving, wanted, deadline, self._at_a_time)

    def _array(self, rows: Sequence[Any], *, single: bool) -> Any:
        if single:
            return rows[0]
        return np.stack(rows) if rows else np.empty((0, self._model.dim), np.float32)


class _Request(NamedTuple):
    """How the texts of one call are to be encoded: the `Vectors` of the cache."""

    model: TextModel
    serving: Serving
    normalize: bool
    deadline: float
    at_a_time: int

    def key(self, text: str) -> tuple[Any, ...]:
        """Return the model, its numeric class, and the text."""
        engine, fingerprint = self.model.engine, self.model.source.fingerprint
        return fingerprint, engine.backend, engine.precision, self.normalize, text

    def items(self, texts: Sequence[str]) -> list[Item]:
        """Return texts as the serving takes them."""
        prepare = self.model.engine.prepare
        return [Item(prepare(text), self.normalize) for text in texts]

    async def aitems(self, texts: Sequence[str]) -> list[Item]:
        """Awaitable twin of `items`."""
        if sum(map(len, texts)) < _LONG_FOR_A_LOOP:
            return self.items(texts)
        return await asyncio.to_thread(self.items, texts)

    def compute(self, text: str) -> Any:
        """Return the vector of a text."""
        return self.compute_all([text])[0]

    async def acompute(self, text: str) -> Any:
        """Awaitable twin of `compute`."""
        return (await self.acompute_all([text]))[0]

    def compute_all(self, texts: Sequence[str]) -> list[Any]:
        """Return the vectors of some texts."""
        return self.serving.run_batch(self.items(texts), timeout_ms=self._timeout_ms())

    async def acompute_all(self, texts: Sequence[str]) -> list[Any]:
        """Awaitable twin of `compute_all`."""
        items = await self.aitems(texts)
        return await self.serving.arun_batch(items, timeout_ms=self._timeout_ms())

    def _timeout_ms(self) -> float | None:
        left = _left(self.deadline)
        return None if left is None else 1000 * left


def _left(deadline: float) -> float | None:
    """Return the seconds until a deadline; None: there is none."""
    return None if deadline == inf else max(0.0, deadline - time.monotonic())


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
