"""The model behind an embedder, as a serving loads it and calls it."""

from __future__ import annotations

import asyncio
import ctypes
import os
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from hornbeam_ml import threads
from hornbeam_ml.embedder.directories import directory_of
from hornbeam_ml.embedder.loading import Source
from hornbeam_ml.embedder.probe import probe_texts
from hornbeam_ml.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from hornbeam_ml.embedder.engines.base import Engine
    from hornbeam_ml.embedder.wish import Wish


_MOST_TRIES: Final = 3


class Item(NamedTuple):
    """A text as the engine takes it."""

    prepared: Any
    normalize: bool


class Facts(NamedTuple):
    """What a loaded model is.

    Attributes:
        dim: Numbers in a vector.
        backend: The library that runs it.
        precision: The arithmetic of its matrix products.
        fingerprint: Which model it is.
        normalizes: Whether its own last step makes vectors of length 1.
    """

    dim: int
    backend: str
    precision: str
    fingerprint: str
    normalizes: bool


class TextModel:
    """What a serving needs of an embedding model. It does not refer to that serving.

    Args:
        name: The directory or the name of the model.
        wish: What kind of engine is asked for.
    """

    def __init__(self, name: str, wish: Wish) -> None:
        self.name = name
        self.wish = wish
        self.dim = 0
        self._engine: Engine | None = None
        self._source: Source | None = None
        self._start: Callable[[], Callable[[], None] | None] = lambda: None
        _models.add(self)

    def started_by(self, start: Callable[[], None]) -> None:
        """Say which method has it loaded."""
        self._start = weakref.WeakMethod(start)

    @property
    def loaded(self) -> bool:
        """Whether there is an engine."""
        return self._engine is not None

    @property
    def engine(self) -> Engine:
        """What runs the weights; has it loaded if need be.

        Raises:
            ModelError: it cannot be.
        """
        start = self._start()
        if self._engine is None and start is not None:
            start()
        if self._engine is None:
            raise ModelError(f"the embedder of {self.name} is gone")
        return self._engine

    @property
    def source(self) -> Source:
        """The model on disk.

        Raises:
            ModelError: it is not there.
        """
        if self._source is None:  # two threads may both make it: they make the same
            self._source = Source(directory_of(self.name), self.name)
        return self._source

    def facts(self) -> Facts:
        """Return what it is; has it loaded if need be."""
        engine = self.engine
        return Facts(
            dim=self.dim,
            backend=engine.backend,
            precision=engine.precision,
            fingerprint=self.source.fingerprint,
            normalizes=engine.normalizes,
        )

    def forget_after_fork(self) -> None:
        """In a forked child: load anew when used, and read anew what the model is."""
        if self._engine is not None:
            # Never freed: native libraries would wait for threads that only the parent has.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._engine))
        self._engine = self._source = None

    def load(self, device: str) -> Callable[[Sequence[Item]], list[Any]]:
        """Open the engine and warm it up, for all threads and for a stream's part of them.

        Args:
            device: Where it is to run, which may be known only after a fork.

        Raises:
            ModelError: it cannot be loaded, or its files change all the time.
        """
        source, engine = self._open(replace(self.wish, device=device))
        texts = [engine.prepare(text) for text in probe_texts()[::8]]
        for parts in (1, self.wish.streams):
            if device == "cpu":
                threads.limit_this_thread(threads.process_share(parts))
            self.dim = engine.run(texts).shape[1]
        self._source, self._engine = source, engine
        return self.run

    def _open(self, wish: Wish) -> tuple[Source, Engine]:
        """Return the engine, and what it was made of: cached vectors are known by that."""
        for _ in range(_MOST_TRIES):
            source = Source(directory_of(self.name), self.name)
            engine = source.open(wish)
            if source.is_unchanged():
                return source, engine
        raise ModelError(f"the files of {self.name} changed while they were loaded")

    def run(self, batch: Sequence[Item]) -> list[Any]:
        """Return the vectors of a batch."""
        vectors = self.engine.run([item.prepared for item in batch])
        return [
            _normalized(vector) if item.normalize else vector.copy()
            for vector, item in zip(vectors, batch, strict=True)
        ]

    def item(self, text: Any) -> Item | Awaitable[Item]:
        """Return what `run` takes of a text, which may have been made before.

        Before the model is loaded that is an awaitable, so that no event loop waits for it.

        Raises:
            TypeError: it is no text.
            ValueError: it is not valid Unicode.
        """
        if isinstance(text, Item):
            return text
        if not isinstance(text, str):
            raise TypeError(f"an embedder takes a str, not {type(text).__qualname__}")
        check_text(text)
        return self._item(text) if self.loaded else asyncio.to_thread(self._item, text)

    def _item(self, text: str) -> Item:
        engine = self.engine
        return Item(engine.prepare(text), engine.normalizes)

    def pads(self) -> bool:
        """Return whether the engine pads the texts of a batch to the longest."""
        return self._engine is None or self._engine.pads

    def length(self, item: Item) -> int:
        """Return the tokens of an item."""
        return self.engine.length(item.prepared)


def check_text(text: str) -> None:
    """Raise if a text is not valid Unicode: clients can send that in JSON.

    Raises:
        ValueError: it has lone surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text has a lone surrogate at {error.start}") from None


def _normalized(vector: Any) -> Any:
    """Return a vector scaled to length 1, or left alone when it has none, as torch does it."""
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


_models: weakref.WeakSet[TextModel] = weakref.WeakSet()  # to be told of a fork


def _forget_after_fork() -> None:
    for model in list(_models):
        model.forget_after_fork()


os.register_at_fork(after_in_child=_forget_after_fork)
