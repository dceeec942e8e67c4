"""Devices by name, and what a stream's thread does to compute on a GPU."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hornbeam_state.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

_NAMES: Final = re.compile(r"auto|cpu|cuda(:\d+)?")
_slot = 0  # which of the workers of its server this process is; set once, at worker start


def check_device(name: str) -> str:
    """Return the name of a device.

    Raises:
        ConfigError: it is none of ``auto``, ``cpu``, ``cuda`` and ``cuda:N``.
    """
    if not isinstance(name, str) or not _NAMES.fullmatch(name):
        raise ConfigError(f"device={name!r}: use 'auto', 'cpu', 'cuda' or 'cuda:1'")
    return name


def set_worker_slot(number: int) -> None:
    """Say which worker this is, counted from 0: ``auto`` gives workers different GPUs."""
    global _slot  # noqa: PLW0603 - a fact about the process
    _slot = number


def pick_device(name: str) -> str:
    """Return the device that a name means in this process: ``auto`` is a GPU where there is one.

    Workers take turns: with two GPUs those of even slots get the first.
    """
    if name != "auto":
        return name
    count = count_gpus()
    return f"cuda:{_slot % count}" if count else "cpu"


def count_gpus() -> int:
    """Return how many GPUs torch can use.

    Without a GPU in the machine torch is not imported to find that out.
    """
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return 0
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


class CudaQueue:
    """A CUDA stream, entered in one thread and nowhere else.

    ``torch.cuda.stream()`` is a setting of the thread: on an event loop's thread it would leak
    into other tasks at every await.

    Args:
        device: ``cuda`` or ``cuda:N``.
    """

    def __init__(self, device: str) -> None:
        import torch

        self._torch = torch
        self._device = torch.device(device)
        self._stream: Any = None

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Make the CUDA stream the calling thread's own for the block."""
        with self._torch.cuda.device(self._device):
            self._stream = self._torch.cuda.Stream()
            with self._torch.cuda.stream(self._stream):
                yield

    def mark(self) -> Any:
        """Return what `begin` needs to know of the caller: its CUDA stream, and how far it is."""
        caller = self._torch.cuda.current_stream(self._device)
        return caller, caller.record_event()

    def begin(self, mark: Any = None) -> None:
        """Let work that follows wait for what the caller, or the default stream, has queued."""
        if mark is None:
            self._stream.wait_stream(self._torch.cuda.default_stream(self._device))
        else:
            self._stream.wait_event(mark[1])

    def end(self, result: Any, mark: Any = None) -> None:
        """Wait until a result is computed, and tie its memory to the stream that will read it."""
        self._stream.synchronize()
        reader = mark[0] if mark else self._torch.cuda.default_stream(self._device)
        for tensor in _tensors(result):
            if tensor.is_cuda:
                tensor.record_stream(reader)


def _tensors(value: Any) -> Iterator[Any]:
    torch = sys.modules["torch"]
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
