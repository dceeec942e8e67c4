"""Unix sockets in a directory of one's own: made, found, checked, and kept from children."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import threading
import time
import weakref
from typing import TYPE_CHECKING, Final

from hornbeam_state.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LONGEST_PATH: Final = 107
"""Bytes of the longest path of a socket on Linux."""

_CREDENTIALS: Final = struct.Struct("3i")
_BACKLOG: Final = 1024
_LOCK_WAIT_S: Final = 2.0


def check_path(path: Path) -> None:
    """Raise a ConfigError if the path is too long for a socket."""
    length = len(os.fsencode(path))
    if length > LONGEST_PATH:
        raise ConfigError(
            f"the path {path} of a socket has {length} bytes, and {LONGEST_PATH} are the most: "
            f"choose a shorter directory"
        )


def peer_uid(sock: socket.socket) -> int:
    """Return whose process is at the other end: the effective user id when it connected."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(data)
    return int(uid)


def listen(path: Path) -> socket.socket:
    """Return a socket that listens there, and does not block. Waits a moment for other servers.

    A file that a dead server left is replaced.

    Raises:
        ConfigError: the path is too long, its directory is not ours alone, or somebody listens
            there.
    """
    check_path(path)
    _make_directory(path.parent)
    made = _make_socket()
    try:
        with _only_one(path.parent):
            remove_stale(path)
            made.bind(os.fspath(path))
            path.chmod(0o600)
            made.listen(_BACKLOG)
        made.setblocking(False)
    except OSError as error:
        made.close()
        raise ConfigError(f"cannot listen at {path}: {error.strerror or error}") from error
    except BaseException:
        made.close()
        raise
    return made


def connect(path: Path, timeout: float) -> socket.socket:
    """Return a socket that is connected to a server there; it blocks for so many seconds.

    Raises:
        OSError: nobody is there.
    """
    check_path(path)
    made = _make_socket()
    try:
        made.settimeout(timeout)
        made.connect(os.fspath(path))
    except BaseException:
        made.close()
        raise
    return made


def accept(listener: socket.socket) -> socket.socket:
    """Return a socket that does not block, to the next client.

    Raises:
        OSError: there is none, or no descriptor for it.
    """
    with _making:
        made, _ = listener.accept()
        _sockets.add(made)
    made.setblocking(False)
    return made


def _make_socket() -> socket.socket:
    with _making:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        _sockets.add(made)
    return made


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError as error:
        raise ConfigError(f"cannot make the directory {directory}: {error.strerror}") from error
    if status.st_uid != os.geteuid():
        raise ConfigError(
            f"the directory {directory} belongs to user id {status.st_uid}, and this process runs "
            f"as {os.geteuid()}: choose another"
        )
    if status.st_mode & 0o077:
        raise ConfigError(
            f"the directory {directory} is open to other users: choose another, or chmod 700 it"
        )


@contextlib.contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Let one process at a time look for a dead server here and take its place."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def remove_stale(path: Path) -> None:
    """Remove the file that a dead server left, if there is one.

    Raises:
        ConfigError: somebody listens there, or it is no socket.
        OSError: it cannot be removed.
    """
    with _make_socket() as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.ECONNREFUSED:
                if error.errno != errno.EAGAIN:  # it is busy
                    raise
            elif path.is_socket():
                path.unlink()
                return
            else:
                raise ConfigError(f"{path} is no socket: choose another path") from None
    raise ConfigError(f"another server listens at {path}: stop it, or choose another path")


_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
_making = threading.RLock()  # held during a fork: no child gets a socket that is not noted yet


def _close_inherited() -> None:
    for one in list(_sockets):
        descriptor = one.detach()  # not `close`: that waits for the parent's loop to let it go
        if descriptor >= 0:
            os.close(descriptor)
    _making.release()


os.register_at_fork(
    before=_making.acquire, after_in_parent=_making.release, after_in_child=_close_inherited
)
