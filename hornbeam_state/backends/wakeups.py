"""Waking up whoever waits for messages: a datagram socket in a folder for each subscription.

A datagram says "look" and no more. What there is to find lies in the store, so one that comes for
nothing does no harm, and what a lost one announced is found with the next. No datagram to a full
socket is needed, and one to a socket that nobody has open says that its owner is dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import termios
import threading
import weakref
from typing import TYPE_CHECKING, Final

from hornbeam_state.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_LONGEST_ADDRESS: Final = 103  # 107 on Linux
_LONGEST_NAME: Final = 16
_AT_A_TIME: Final = 64
_INT: Final = struct.Struct("i")
_NOBODY_THERE: Final = (ConnectionRefusedError, FileNotFoundError, BrokenPipeError)


class SocketFolder:
    """Where the sockets of a store's subscriptions lie.

    Args:
        path: The folder; it is made where there is none.

    Raises:
        StoreUnavailable: it cannot be made or opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._base = str(path)
        try:
            path.mkdir(mode=0o700, exist_ok=True)
            if len(os.fsencode(path)) + 1 + _LONGEST_NAME > _LONGEST_ADDRESS:
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                weakref.finalize(self, os.close, descriptor)
                self._base = f"/proc/self/fd/{descriptor}"
        except OSError as error:
            raise StoreUnavailable(f"cannot use the folder {path}: {error.strerror}") from error

    def address(self, name: str) -> str:
        """Return the address of a socket, short enough for the kernel."""
        return f"{self._base}/{name}"

    def names(self, before: float) -> list[str]:
        """Return the names of the sockets that were made before that time."""
        found = []
        for path in self.path.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.lstat().st_mtime < before:
                    found.append(path.name)
        return found


class WakeupSocket:
    """A socket that wake-ups come to.

    Nobody can be woken through it once it is closed or collected, or its process has died. A
    forked child has it closed: it would keep it alive for a parent that is dead.

    Args:
        folder: Where it is to lie.
        name: Its name there: 16 characters at most, of nobody else.

    Raises:
        StoreUnavailable: it cannot be made.
    """

    def __init__(self, folder: SocketFolder, name: str) -> None:
        self._folder = folder
        self._name = name
        try:
            with _making:
                self._socket = _make_socket()
                _sockets.add(self._socket)
            weakref.finalize(self, _end, self._socket, folder.path / name, os.getpid())
            self._socket.bind(folder.address(name))
        except OSError as error:
            raise StoreUnavailable(
                f"cannot make a socket in {folder.path}: {error.strerror}"
            ) from error

    def fileno(self) -> int:
        """Return the descriptor: readable from a wake-up until `silence`; for good once closed."""
        return self._socket.fileno()

    def silence(self) -> bool:
        """Take the wake-ups away that have come so far; return whether there were any."""
        for count in range(_AT_A_TIME):
            if not _bytes(self._socket, termios.FIONREAD):  # cheaper than an exception
                return count > 0
            self._socket.recv(1)
        return True

    def wake(self) -> None:
        """Send itself a wake-up."""
        with contextlib.suppress(OSError):  # full is as good, and closed is readable anyway
            self._socket.sendto(b"!", self._folder.address(self._name))

    def close(self) -> None:
        """Let nobody reach it any more, and whoever waits for it go on; its descriptor stays."""
        with contextlib.suppress(OSError):
            (self._folder.path / self._name).unlink(missing_ok=True)
        self._socket.shutdown(socket.SHUT_RD)


class Waker:
    """Wakes others up, without ever waiting. Safe to use from any thread.

    Args:
        folder: Where their sockets lie.

    Raises:
        StoreUnavailable: there is no descriptor left for a socket of its own.
    """

    def __init__(self, folder: SocketFolder) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        try:
            self._senders = [_make_socket()]  # one at a time
        except OSError as error:
            raise StoreUnavailable(f"cannot make a socket: {error.strerror}") from error
        weakref.finalize(self, _close_all, self._senders)

    def wake(self, names: Iterable[str]) -> list[str]:
        """Wake up the owners of these sockets; return the names of those that are dead."""
        with self._lock:
            return [name for name in names if not self._wake(self.folder.address(name))]

    def remove_orphans(self, names: Iterable[str]) -> None:
        """Remove those of the sockets that nobody has open."""
        for name in self.wake(names):
            (self.folder.path / name).unlink(missing_ok=True)

    def _wake(self, address: str) -> bool:
        try:
            self._send(address)
        except _NOBODY_THERE:
            return False
        except OSError:  # no memory for it, or the like: the next one finds what this one meant
            return True
        return True

    def _send(self, address: str) -> None:
        try:
            self._senders[0].sendto(b"!", address)
        except BlockingIOError:
            # Its queue is full, so it will look; unless ours is, of what others leave unread.
            if not _is_clogged(self._senders[0]):
                return
            fresh = _make_socket()
            self._senders.append(fresh)
            self._senders.pop(0).close()
            fresh.sendto(b"!", address)


def _make_socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    made.setblocking(False)
    return made


def _is_clogged(sender: socket.socket) -> bool:
    """Return whether much of what a socket sent still lies unread in others.

    The kernel counts all of that against the sender's buffer: some dozen stopped receivers fill
    it, and then nobody can be reached.
    """
    return _bytes(sender, termios.TIOCOUTQ) * 2 >= sender.getsockopt(
        socket.SOL_SOCKET, socket.SO_SNDBUF
    )


def _bytes(one: socket.socket, request: int) -> int:
    """Return a number of bytes that the kernel knows of a socket."""
    return int(_INT.unpack(fcntl.ioctl(one, request, bytes(_INT.size)))[0])


def _close_all(sockets: list[socket.socket]) -> None:
    for one in sockets:
        one.close()


def _end(owned: socket.socket, path: Path, process: int) -> None:
    owned.close()
    if os.getpid() == process:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
_making = threading.RLock()  # held during a fork: no child gets a socket that is not noted yet


def _close_inherited() -> None:
    for one in list(_sockets):
        one.close()
    _making.release()


os.register_at_fork(
    before=_making.acquire, after_in_parent=_making.release, after_in_child=_close_inherited
)
