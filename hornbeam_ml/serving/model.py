"""The loaded function of a serving: how it is called with a batch, and what it may return."""

from __future__ import annotations

import inspect
from types import AsyncGeneratorType, GeneratorType
from typing import TYPE_CHECKING, Any

from hornbeam_ml.errors import ModelError
from hornbeam_ml.serving.batch import split, stack
from hornbeam_ml.streams import Stream, current_stream, finish

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from hornbeam_ml.serving.config import ServingConfig


class LoadedModel:
    """A batch function and how to call it. Calls may come from several threads at once."""

    def __init__(self, fn: Callable[..., Any], config: ServingConfig) -> None:
        if not callable(fn):
            raise ModelError(f"load of {config.label} returned {type(fn).__name__}, no function")
        self._config = config
        self._takes_key = _takes(fn, "key", needed=not config.batch_keys)
        self._stacks = config.collate == "stack"
        self._rows_for = config.rows_for
        self._fn = _compiled(fn) if config.compile else fn

    @classmethod
    def load(cls, config: ServingConfig, device: str) -> LoadedModel:
        """Load; runs on a stream's thread of that device.

        A `load` whose signature takes `device` is told; others find it as
        ``current_stream().device``.
        """
        arguments = {"device": device} if _takes(config.load, "device", needed=False) else {}
        return cls(finish(config.load(**arguments)), config)

    def warm_up(self) -> None:
        """Run the example through every bucket and key; a generator to its first step."""
        if self._config.warmup is None:
            return
        for size in self._config.sizes:
            for key in self._config.keys:
                outcome = self.run([self._config.warmup] * size, key)
                if isinstance(outcome, Steps):
                    next(outcome, None)
                    outcome.close()

    def run(self, items: Sequence[Any], key: Hashable) -> list[Any] | Steps:
        """Return a result for each item, or the steps of a model that streams; blocks.

        Raises:
            ModelError: the model did not return one result for each item.
            Exception: whatever the model raises.
        """
        count, size = len(items), self._rows_for(len(items))
        stream = current_stream()
        if stream is not None:
            stream.follow_default()
        batch = stack(items, size) if self._stacks else list(items)
        result = self._fn(batch, key=key) if self._takes_key else self._fn(batch)
        if isinstance(result, GeneratorType | AsyncGeneratorType):
            return Steps(result, count, size, trees=self._stacks)
        return self._split(finish(result), count, size, stream)

    def _split(self, result: Any, count: int, size: int, stream: Stream | None) -> list[Any]:
        rows = split(result, count, size, trees=self._stacks)
        if stream is not None:
            stream.synchronize(rows)
        return rows


class Steps:
    """The steps of a generator, sync or async: each a list of one chunk for each item."""

    def __init__(self, generator: Any, count: int, size: int, *, trees: bool) -> None:
        self._generator = generator
        self._shape = count, size, trees
        self._is_async = inspect.isasyncgen(generator)

    def __iter__(self) -> Iterator[list[Any]]:
        return self

    def __next__(self) -> list[Any]:
        """Return the next step.

        Raises:
            ModelError: it does not hold one chunk for each item.
        """
        if self._is_async:
            try:
                step = finish(anext(self._generator))
            except StopAsyncIteration:
                raise StopIteration from None
        else:
            step = next(self._generator)
        count, size, trees = self._shape
        rows = split(step, count, size, trees=trees)
        stream = current_stream()
        if stream is not None:
            stream.synchronize(rows)
        return rows

    def close(self) -> None:
        """End the generator early."""
        if self._is_async:
            finish(self._generator.aclose())
        else:
            self._generator.close()


def _takes(fn: Callable[..., Any], name: str, *, needed: bool) -> bool:
    """Return whether a function names an argument; `needed`: and has no default for it."""
    try:
        parameter = inspect.signature(fn).parameters.get(name)
    except (TypeError, ValueError):  # written in C
        return False
    if parameter is None or parameter.kind not in (
        parameter.KEYWORD_ONLY,
        parameter.POSITIONAL_OR_KEYWORD,
    ):
        return False
    return not needed or parameter.default is parameter.empty


def _compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    compiled: Callable[..., Any] = torch.compile(fn, dynamic=False)
    return compiled
