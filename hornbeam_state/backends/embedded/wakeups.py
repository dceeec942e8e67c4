"""Waking up whoever waits for messages: a datagram socket in a folder for each subscription.

A datagram says "look" and no more. What there is to find lies in the store, so one that comes for
nothing does no harm, and what a lost one announced is found with the next. No datagram to a full
socket is needed, and one to a socket that nobody has open says that its owner is dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
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
_NOBODY_THERE: Final = (ConnectionRefusedError, FileNotFoundError, BrokenPipeError)


class SocketFolder:
    """Where the sockets of a store's subscriptions lie.

    Args:
        path: The folder; it is made where there is none.

    Attributes:
        base: What the address of a socket is, up to its name: short enough for the kernel.

    Raises:
        StoreUnavailable: it cannot be made or opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.base = f"{path}/"
        try:
            path.mkdir(mode=0o700, exist_ok=True)
            if len(os.fsencode(path)) + 1 + _LONGEST_NAME > _LONGEST_ADDRESS:
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                weakref.finalize(self, os.close, descriptor)
                self.base = f"/proc/self/fd/{descriptor}/"
        except OSError as error:
            raise StoreUnavailable(f"cannot use the folder {path}: {error.strerror}") from error

    def remove(self, name: str) -> None:
        """Remove a socket."""
        with contextlib.suppress(OSError):
            (self.path / name).unlink(missing_ok=True)

    def names(self, before: float) -> list[str]:
        """Return the names of the sockets that were made before that time."""
        found = []
        for path in self.path.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.lstat().st_mtime < before:
                    found.append(path.name)
        return found


class WakeupSocket:
    """A socket that wake-ups come to. One thread at a time may use it.

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
            self._socket.bind(folder.base + name)
            self._poller = select.poll()
            self._poller.register(self._socket, select.POLLIN)
        except OSError as error:
            raise StoreUnavailable(
                f"cannot make a socket in {folder.path}: {error.strerror}"
            ) from error

    def fileno(self) -> int:
        """Return the descriptor: readable while there are wake-ups, and for good once closed."""
        return self._socket.fileno()

    def is_awake(self) -> bool:
        """Return whether a wake-up has come that was not taken away."""
        return bool(self._poller.poll(0))  # a tenth of what the exception of `recv` would cost

    def silence(self) -> bool:
        """Take a wake-up away; return whether there was one."""
        if not self.is_awake():
            return False
        self._socket.recv(1)
        return True

    def wake(self) -> None:
        """Have the descriptor readable."""
        if not self.is_awake():
            with contextlib.suppress(OSError):
                self._socket.sendto(b"!", self._folder.base + self._name)

    def close(self) -> None:
        """Let nobody reach it any more, and whoever waits for it go on; its descriptor stays."""
        self._folder.remove(self._name)
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
        """Wake up the owners of these sockets; remove those of the dead, and return their names."""
        dead = []
        with self._lock:
            for name in names:
                try:
                    self._senders[0].sendto(b"!", self.folder.base + name)
                except BlockingIOError:
                    # Its queue is full, so it will look; unless ours is, of what others leave.
                    if self._replace_if_clogged():
                        dead.extend(self.wake([name]))
                except _NOBODY_THERE:
                    dead.append(name)
                    self.folder.remove(name)
                except OSError:  # no memory, or the like: it finds with the next what this meant
                    continue
        return dead

    def _replace_if_clogged(self) -> bool:
        """Send through another socket where much of what this one sent still lies unread.

        The kernel counts all of that against the sender's buffer: some dozen stopped receivers
        fill it, and then nobody can be reached.
        """
        sender = self._senders[0]
        unread = struct.unpack("i", fcntl.ioctl(sender, termios.TIOCOUTQ, bytes(4)))[0]
        if unread * 2 < sender.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF):
            return False
        try:
            self._senders.append(_make_socket())
        except OSError:  # no descriptor left
            return False
        self._senders.pop(0).close()
        return True


def _make_socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    made.setblocking(False)
    return made


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
