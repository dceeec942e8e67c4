"""What the workers of one server know of each other: a small table in shared memory.

The arbiter makes it before its first fork and gives each worker a row, its *slot*. From then on
only the worker writes to its row, and every worker reads all of them. A row outlives its worker:
it says how that one ended, until the arbiter gives the slot to another.

Whether a worker lives is not written down, since nobody could after a ``kill -9``: it holds a lock
on a byte of a file, which the kernel frees with the process.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import mmap
import os
import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_MOST_WORKERS: Final = 4096
_BIRTH_S: Final = 10.0  # who holds no lock so long after its fork has died before it could


class State(enum.IntEnum):
    """Where a worker is in its life."""

    BOOTING = 1
    """It loads. The row of one that has died says that it could not."""
    PAUSED = 2
    """It waits before it boots, since others of its generation could not."""
    READY = 3
    RETIRING = 4
    """It was asked to stop, and serves until workers of a newer generation are ready."""
    LEAVING = 5
    """It takes no new connections, and finishes what it has."""
    GONE = 6
    """It has left."""
    STOPPED = 7
    """It was told to stop before it was ready."""
    FAILED = 8
    """It could not boot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A worker as the board shows it.

    Attributes:
        slot: Its number among the workers that live at one time: the lowest that was free.
        age: gunicorn's number for it; younger workers have higher ones.
        pid: Its process, 0 as long as that was only forked.
        generation: How many configurations the server had had when it was forked: 1, and one
            more after each SIGHUP.
        state: What it said last.
        since: When, in seconds of `time.monotonic`.
        alive: Whether the process runs.
    """

    slot: int
    age: int
    pid: int
    generation: int
    state: State
    since: float
    alive: bool = True


class _Head(enum.IntEnum):
    """The cells in front of the rows."""

    GENERATION = 0
    WANTED = 1
    LISTENER = 2
    EVER_READY = 3
    FAILURES = 4
    USED = 5  # rows that were ever given out
    SIZE = 6


class _Cell(enum.IntEnum):
    """The cells of a row."""

    AGE = 0
    PID = 1
    GENERATION = 2
    STATE = 3
    SINCE = 4
    SIZE = 5


class Board:
    """The table of one arbiter and its workers; every thread may read it."""

    def __init__(self) -> None:
        cells = _Head.SIZE + _MOST_WORKERS * _Cell.SIZE
        self._cells = memoryview(mmap.mmap(-1, cells * 8)).cast("q")
        self._locks = os.memfd_create("hornbeam-board")
        weakref.finalize(self, os.close, self._locks).atexit = False
        self._slot: int | None = None
        self._configuration: Any = None
        self._seated: dict[int, Any] = {}

    # In the arbiter.

    def seat(self, worker: Any, configuration: Any) -> int:
        """Return a slot for a worker object, the process of which is forked next.

        Args:
            worker: gunicorn's object. Its `tmp` is closed once the process has been reaped.
            configuration: What it was made with. Another object than the last time begins a new
                generation.
        """
        if configuration is not self._configuration:
            self._begin_generation(worker, configuration)
        self._free_slots()
        slot = next(slot for slot in range(_MOST_WORKERS) if slot not in self._seated)
        self._seated[slot] = worker
        self._write(slot, worker.age, 0, self.generation, State.BOOTING, time.monotonic_ns())
        self._cells[_Head.USED] = max(self._cells[_Head.USED], slot + 1)
        return slot

    def _begin_generation(self, worker: Any, configuration: Any) -> None:
        self._configuration = configuration
        self._cells[_Head.GENERATION] += 1
        self._cells[_Head.WANTED] = configuration.workers
        self._cells[_Head.FAILURES] = 0
        sockets = worker.sockets
        self._cells[_Head.LISTENER] = os.fstat(sockets[0].fileno()).st_ino if sockets else 0

    def _free_slots(self) -> None:
        for slot in [slot for slot, worker in self._seated.items() if _is_reaped(worker)]:
            del self._seated[slot]
            row = self._row(slot, alive=False)
            could_not_boot = row.state in {State.BOOTING, State.FAILED}
            if could_not_boot and row.generation == self.generation:
                self._cells[_Head.FAILURES] += 1

    # In a worker.

    def take(self, slot: int) -> None:
        """Make a row this process's own, for as long as that lives."""
        self._slot = slot
        self._seated.clear()
        # Locks of POSIX belong to the process, not to the descriptor that a fork shares. This
        # waits for a moment at most, while somebody looks whether the last owner lives.
        fcntl.lockf(self._locks, fcntl.LOCK_EX, 1, 1 + slot)
        self._cells[_start(slot) + _Cell.PID] = os.getpid()

    def say(self, state: State) -> None:
        """Write down where this worker is."""
        start = _start(self._own_slot())
        if state is State.READY:
            self._cells[_Head.EVER_READY] = 1
            if self._cells[start + _Cell.GENERATION] == self.generation:
                self._cells[_Head.FAILURES] = 0
        self._cells[start + _Cell.SINCE] = time.monotonic_ns()
        self._cells[start + _Cell.STATE] = state

    @contextlib.contextmanager
    def deciding(self) -> Iterator[bool]:
        """Be the only worker that decides for the length of the block.

        Yields:
            False: another one does at this moment.
        """
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, 0)

    # Everywhere.

    @property
    def generation(self) -> int:
        """The newest generation."""
        return self._cells[_Head.GENERATION]

    @property
    def wanted(self) -> int:
        """How many workers the newest configuration asks for."""
        return self._cells[_Head.WANTED]

    @property
    def listener(self) -> int:
        """The inode of a socket on which the arbiter listens until it stops; 0: of none."""
        return self._cells[_Head.LISTENER]

    @property
    def ever_ready(self) -> bool:
        """Whether any worker of this server has ever been ready."""
        return bool(self._cells[_Head.EVER_READY])

    @property
    def failures(self) -> int:
        """How many boots of the newest generation have failed since the last that did not."""
        return self._cells[_Head.FAILURES]

    def own(self) -> Row:
        """Return this worker's row."""
        return self._row(self._own_slot(), alive=True)

    def rows(self) -> list[Row]:
        """Return all rows, also those of workers that have ended."""
        used = range(self._cells[_Head.USED])
        return [self._row(slot, alive=self._is_alive(slot)) for slot in used]

    def workers(self) -> list[Row]:
        """Return the rows of the workers that live, the oldest first."""
        return sorted((row for row in self.rows() if row.alive), key=lambda row: row.age)

    def _own_slot(self) -> int:
        if self._slot is None:
            raise RuntimeError("this process has no slot on the board")
        return self._slot

    def _is_alive(self, slot: int) -> bool:
        if slot == self._slot:
            return True
        row = self._row(slot, alive=False)
        if not row.pid:
            return time.monotonic() - row.since < _BIRTH_S
        try:  # shared: two that look must not take each other for the owner
            fcntl.lockf(self._locks, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 1 + slot)
        except OSError:
            return True
        fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, 1 + slot)
        return False

    def _row(self, slot: int, *, alive: bool) -> Row:
        start = _start(slot)
        age, pid, generation, state, since = self._cells[start : start + _Cell.SIZE]
        return Row(
            slot=slot,
            age=age,
            pid=pid,
            generation=generation,
            state=State(state),
            since=since / 1e9,
            alive=alive,
        )

    def _write(self, slot: int, *values: int) -> None:
        for cell, value in enumerate(values, _start(slot)):
            self._cells[cell] = value


def _start(slot: int) -> int:
    return _Head.SIZE + slot * _Cell.SIZE


def _is_reaped(worker: Any) -> bool:
    try:
        worker.tmp.fileno()
    except ValueError:  # closed
        return True
    return False


_board: tuple[int, Board] | None = None


def arbiters_board() -> Board:
    """Return the board of the arbiter that this process is, made with the first call."""
    global _board  # noqa: PLW0603 - there is one arbiter in a process
    if _board is None or _board[0] != os.getpid():
        _board = os.getpid(), Board()
    return _board[1]


def workers() -> list[Row]:
    """Return the workers of this process's server that live, the oldest first.

    Outside of gunicorn there are none.
    """
    return [] if _board is None else _board[1].workers()
