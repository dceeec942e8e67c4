"""The settings of a serving, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeGuard

from hornbeam_ml.devices import check_device
from hornbeam_ml.serving.batch import bucket_for, signature
from hornbeam_state.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

_STUCK_AFTER_S: Final = 60.0


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
    length: Callable[[Any], int] | None
    max_batch_tokens: int | None
    pads: Callable[[], bool]
    idempotent: bool
    fingerprint: str | None

    def __post_init__(self) -> None:
        self._check_callables()
        for name in ("batch_size", "streams", "instances", "queue_limit"):
            value = getattr(self, name)
            if not _is_count(value):
                raise ConfigError(f"{name}={value!r}: give a whole number from 1 up")
        if not _is_time(self.batch_timeout_ms):
            raise ConfigError(f"batch_timeout_ms={self.batch_timeout_ms!r}: give 0 or more")
        if self.deadline_ms is not None and not (_is_time(self.deadline_ms) and self.deadline_ms):
            raise ConfigError(f"deadline_ms={self.deadline_ms!r}: give more than 0, or None")
        self._check_batches()
        self._check_lengths()
        self._check_devices()

    @property
    def label(self) -> str:
        """What errors call the serving."""
        return f"serving {self.name!r}" if self.name else "serving"

    @property
    def stuck_after_s(self) -> float:
        """How long a batch may run, or a generator may take for a step, before it counts as hung.

        That is the deadline, after which it is of no use to its callers; a minute without one.
        """
        return _STUCK_AFTER_S if self.deadline_ms is None else self.deadline_ms / 1000

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

    @property
    def max_tokens(self) -> float | None:
        """The most tokens in a batch, padding included; None: items have no length."""
        if self.length is None:
            return None
        return math.inf if self.max_batch_tokens is None else self.max_batch_tokens

    def length_of(self, item: Any) -> int:
        """Return the tokens of a prepared item; 1 when items have no length.

        Raises:
            ValueError: `length` returned something else than a whole number from 1 up.
        """
        if self.length is None:
            return 1
        length = self.length(item)
        if not _is_count(length):
            raise ValueError(f"{self.label}: length returned {length!r}, no whole number from 1 up")
        return length

    def _check_callables(self) -> None:
        if not callable(self.load):
            raise ConfigError("load is a function that returns the batch function")
        if self.name is not None and not (isinstance(self.name, str) and self.name):
            raise ConfigError(f"name={self.name!r}: give a non-empty str, or None")
        if self.fingerprint is not None and not (
            isinstance(self.fingerprint, str) and self.fingerprint
        ):
            raise ConfigError(f"fingerprint={self.fingerprint!r}: give a non-empty str, or None")
        if not callable(self.pads):
            raise ConfigError("pads is a function that returns whether the model pads")
        for name in ("preprocess", "postprocess", "length"):
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

    def _check_lengths(self) -> None:
        if self.length is not None and self.collate != "list":
            raise ConfigError("length is for collate='list': items to stack are all of one shape")
        if self.max_batch_tokens is None:
            return
        if self.length is None:
            raise ConfigError("max_batch_tokens needs length, which counts the tokens of an item")
        if not _is_count(self.max_batch_tokens):
            value = self.max_batch_tokens
            raise ConfigError(f"max_batch_tokens={value!r}: give a whole number from 1 up, or None")

    def _check_devices(self) -> None:
        if not isinstance(self.device, str) and len(self.device) != self.instances:
            raise ConfigError(
                f"device names {len(self.device)} devices for instances={self.instances}"
            )
        for device in self.devices:
            check_device(device)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_time(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value >= 0
