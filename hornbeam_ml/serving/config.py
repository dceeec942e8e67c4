"""The settings of a serving, checked when it is made."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hornbeam_ml.devices import check_device
from hornbeam_ml.serving.batch import bucket_for, signature
from hornbeam_ml.streams import finish
from hornbeam_state.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """How a serving batches, and where it runs; see `Serving`.

    Raises:
        ConfigError: a setting makes no sense; the message says what would.
    """

    load: Callable[..., Any]
    name: str | None
    batch_size: int
    batch_timeout_ms: float
    collate: Literal["list", "stack"]
    buckets: Sequence[int] | None
    batch_keys: Sequence[Hashable] | None
    preprocess: Callable[[Any], Any] | None
    postprocess: Callable[[Any], Any] | None
    streams: int
    instances: int
    device: str | Sequence[str]
    compile: Literal["torch"] | None
    warmup: Any
    queue_limit: int
    deadline_ms: float | None

    def __post_init__(self) -> None:
        self._check_callables()
        for name in ("batch_size", "streams", "instances", "queue_limit"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r}: give a whole number from 1 up")
        if not _is_time(self.batch_timeout_ms):
            raise ConfigError(f"batch_timeout_ms={self.batch_timeout_ms!r}: give 0 or more")
        if self.deadline_ms is not None and not (_is_time(self.deadline_ms) and self.deadline_ms):
            raise ConfigError(f"deadline_ms={self.deadline_ms!r}: give more than 0, or None")
        self._check_batches()
        self._check_devices()

    @property
    def label(self) -> str:
        """What errors call the serving."""
        return f"serving {self.name!r}" if self.name else "serving"

    @property
    def keys(self) -> tuple[Hashable, ...]:
        """The batch keys; None alone when none are declared."""
        return tuple(self.batch_keys) if self.batch_keys else (None,)

    @property
    def devices(self) -> tuple[str, ...]:
        """The device of each instance."""
        if isinstance(self.device, str):
            return (self.device,) * self.instances
        return tuple(self.device)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of items that the model is warmed up with."""
        return tuple(self.buckets) if self.buckets else (1,)

    def rows_for(self, count: int) -> int:
        """Return how many rows a batch of `count` items is padded to."""
        return bucket_for(count, self.buckets)

    def prepare(self, item: Any) -> Any:
        """Return what the model gets for an item of a caller."""
        return _applied(self.preprocess, item)

    async def aprepare(self, item: Any) -> Any:
        """Awaitable twin of `prepare`."""
        return await _aapplied(self.preprocess, item)

    def finish(self, result: Any) -> Any:
        """Return what a caller gets for a result of the model."""
        return _applied(self.postprocess, result)

    async def afinish(self, result: Any) -> Any:
        """Awaitable twin of `finish`."""
        return await _aapplied(self.postprocess, result)

    def _check_callables(self) -> None:
        if not callable(self.load):
            raise ConfigError("load is a function that returns the batch function")
        if self.name is not None and not (isinstance(self.name, str) and self.name):
            raise ConfigError(f"name={self.name!r}: give a non-empty str, or None")
        for name in ("preprocess", "postprocess"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise ConfigError(f"{name}={value!r}: give a function, or None")

    def _check_batches(self) -> None:
        if self.collate not in ("list", "stack"):
            raise ConfigError(f"collate={self.collate!r}: use 'list' or 'stack'")
        if self.compile not in (None, "torch"):
            raise ConfigError(f"compile={self.compile!r}: use 'torch' or None")
        if isinstance(self.batch_keys, str) or (
            self.batch_keys is not None and (not self.batch_keys or None in self.batch_keys)
        ):
            raise ConfigError("batch_keys: give a list of keys, none of them None, or no list")
        if self.buckets is not None:
            self._check_buckets(list(self.buckets))
        if self.compile and (self.collate != "stack" or self.warmup is None):
            raise ConfigError("compile='torch' needs collate='stack' and a warmup item")
        if self.collate == "stack" and self.warmup is not None:
            signature(self.warmup)

    def _check_buckets(self, buckets: list[int]) -> None:
        if self.collate != "stack":
            raise ConfigError("buckets are for collate='stack': a list needs no padding")
        whole = all(isinstance(size, int) and size > 0 for size in buckets)
        if not buckets or not whole or buckets != sorted(set(buckets)):
            raise ConfigError(f"buckets={buckets!r}: give growing whole numbers from 1 up")
        if buckets[-1] < self.batch_size:
            raise ConfigError(
                f"buckets={buckets!r}: the largest has to hold batch_size={self.batch_size}"
            )

    def _check_devices(self) -> None:
        if not isinstance(self.device, str) and len(self.device) != self.instances:
            raise ConfigError(
                f"device names {len(self.device)} devices for instances={self.instances}"
            )
        for device in self.devices:
            check_device(device)


def _applied(change: Callable[[Any], Any] | None, value: Any) -> Any:
    return value if change is None else finish(change(value))


async def _aapplied(change: Callable[[Any], Any] | None, value: Any) -> Any:
    if change is None:
        return value
    changed = change(value)
    return await changed if inspect.isawaitable(changed) else changed


def _is_time(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value >= 0
