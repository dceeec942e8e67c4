"""Counters of all worker processes of a machine, exact and without a lock between processes.

Every process owns a *slot*: a small file of 64-bit cells that it alone writes, through a memory
map, so a figure survives ``kill -9`` the moment it is counted. Reading sums over all slots. When a
process ends, the kernel frees its slot, and the next process goes on counting in it: the number
of files is the largest number of processes there ever was at a time, and totals count since the
directory was made.

A slot file is a header (magic, bytes used) and blocks: the sizes of a name and of its cells, the
name, padding to eight bytes, the cells.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import threading
import warnings
import weakref
from collections import defaultdict
from typing import TYPE_CHECKING, Final

from hornbeam_state.backends.kernel_locks import lock_range
from hornbeam_state.backends.mapped_file import map_file

if TYPE_CHECKING:
    from pathlib import Path

_MAGIC: Final = b"HBSLOT01"
_HEADER: Final = struct.Struct("8sQ")
_BLOCK: Final = struct.Struct("II")
_CELL: Final = struct.Struct("q")  # native: written by one store instruction, never torn
_SLOT_NAME: Final = "slot-"
_SLOT_BYTES: Final = 512 * 1024
_MOST_SLOTS: Final = 4096
_LONGEST_NAME: Final = 256


class Metrics:
    """Named blocks of counters, shared by the processes that use one directory.

    Safe to use from any thread. After a fork, the child counts in a slot of its own.

    Args:
        directory: Where the slot files lie; made when it is missing. None: this process counts
            for itself.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._slot: _Slot | None = None
        _all_metrics.add(self)

    def add(self, name: str, *deltas: int) -> None:
        """Add to the cells of a block, one delta each.

        Args:
            name: The block's name. A name has as many cells as its first use in the slot gave it.
            *deltas: What to add to each cell.
        """
        with self._lock:  # `+=` on a cell is a read and a write: threads would lose counts
            self._claimed().add(name, deltas)

    def totals(self) -> dict[str, list[int]]:
        """Return the cells of every block, summed over all processes, dead ones too."""
        totals: defaultdict[str, list[int]] = defaultdict(list)
        with self._lock:
            if self._slot is not None and self._slot.path is None:
                _merge(totals, self._slot.blocks())
        for path in sorted(self._directory.glob(f"{_SLOT_NAME}*")) if self._directory else ():
            try:
                with path.open("rb") as file:
                    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (FileNotFoundError, ValueError):
                continue  # being made this moment
            with content:
                _merge(totals, _read_blocks(content))
        return dict(totals)

    def _claimed(self) -> _Slot:
        if self._slot is None:
            self._slot = _claim(self._directory) if self._directory else _Slot(_blank())
        return self._slot

    def forget_after_fork(self) -> None:
        """Leave, in a forked child, the parent's slot to the parent."""
        self._lock = threading.Lock()
        slot, self._slot = self._slot, None
        if slot is not None:
            slot.close()


class _Slot:
    """The cells this process writes."""

    def __init__(
        self, memory: mmap.mmap | bytearray, path: Path | None = None, descriptor: int | None = None
    ) -> None:
        self.path = path
        self._memory = memory
        self._descriptor = descriptor
        self._places = {name: (start, count) for name, start, count in _walk(memory)}

    def add(self, name: str, deltas: tuple[int, ...]) -> None:
        place = self._places.get(name) or self._append(name, len(deltas))
        if place is None:
            return
        start, count = place
        for index, delta in enumerate(deltas[:count]):
            if delta:
                offset = start + index * _CELL.size
                value = _CELL.unpack_from(self._memory, offset)[0]
                _CELL.pack_into(self._memory, offset, value + delta)

    def blocks(self) -> dict[str, list[int]]:
        return _read_blocks(self._memory)

    def close(self) -> None:
        if isinstance(self._memory, mmap.mmap):
            self._memory.close()
        if self._descriptor is not None:
            os.close(self._descriptor)

    def _append(self, name: str, count: int) -> tuple[int, int] | None:
        """Add a block; its size is written last, so a kill in the middle leaves no half block."""
        encoded = name.encode()[:_LONGEST_NAME]
        used = _used(self._memory)
        start = used + _BLOCK.size + _padded(len(encoded))
        end = start + count * _CELL.size
        if end > len(self._memory):
            self._places[name] = (start, 0)
            warnings.warn(
                f"too many different metrics: {name!r} and further new ones are not counted",
                RuntimeWarning,
                stacklevel=4,
            )
            return None
        _BLOCK.pack_into(self._memory, used, len(encoded), count)
        self._memory[used + _BLOCK.size : used + _BLOCK.size + len(encoded)] = encoded
        _HEADER.pack_into(self._memory, 0, _MAGIC, end)
        self._places[name] = (start, count)
        return start, count


def _claim(directory: Path) -> _Slot:
    """Take the first slot that no living process owns; without a usable disk, count in memory."""
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        for number in range(_MOST_SLOTS):
            slot = _try_claim(directory / f"{_SLOT_NAME}{number:04d}")
            if slot is not None:
                return slot
        problem = f"all {_MOST_SLOTS} slots are taken"
    except OSError as error:
        problem = str(error.strerror)
    warnings.warn(
        f"metrics of this process are not shared: cannot use {directory}: {problem}",
        RuntimeWarning,
        stacklevel=4,
    )
    return _Slot(_blank())


def _blank() -> bytearray:
    memory = bytearray(_SLOT_BYTES)
    _HEADER.pack_into(memory, 0, _MAGIC, _HEADER.size)
    return memory


def _try_claim(path: Path) -> _Slot | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not lock_range(descriptor, fcntl.F_WRLCK):
            os.close(descriptor)
            return None
        memory = map_file(descriptor, _SLOT_BYTES)
        if bytes(memory[: len(_MAGIC)]) != _MAGIC:
            memory[:] = bytes(_SLOT_BYTES)
            _HEADER.pack_into(memory, 0, _MAGIC, _HEADER.size)
        return _Slot(memory, path, descriptor)
    except OSError:
        os.close(descriptor)
        raise


def _used(memory: mmap.mmap | bytearray) -> int:
    magic, used = _HEADER.unpack_from(memory)
    return min(int(used), len(memory)) if magic == _MAGIC else 0


def _walk(memory: mmap.mmap | bytearray) -> list[tuple[str, int, int]]:
    """Return name, place of the first cell and number of cells of each block."""
    found = []
    place, used = _HEADER.size, _used(memory)
    while place + _BLOCK.size <= used:
        length, count = _BLOCK.unpack_from(memory, place)
        text = place + _BLOCK.size
        start = text + _padded(length)
        place = start + count * _CELL.size
        if place > used:
            break  # damaged: what comes before it still counts
        found.append((bytes(memory[text : text + length]).decode("utf-8", "replace"), start, count))
    return found


def _read_blocks(memory: mmap.mmap | bytearray) -> dict[str, list[int]]:
    return {
        name: [_CELL.unpack_from(memory, start + index * _CELL.size)[0] for index in range(count)]
        for name, start, count in _walk(memory)
    }


def _merge(totals: defaultdict[str, list[int]], blocks: dict[str, list[int]]) -> None:
    for name, cells in blocks.items():
        sums = totals[name]
        sums.extend([0] * (len(cells) - len(sums)))
        for index, value in enumerate(cells):
            sums[index] += value


def _padded(length: int) -> int:
    return (length + 7) // 8 * 8


_all_metrics: weakref.WeakSet[Metrics] = weakref.WeakSet()  # to be told of a fork


def _forget_after_fork() -> None:
    for metrics in list(_all_metrics):
        metrics.forget_after_fork()


os.register_at_fork(after_in_child=_forget_after_fork)
