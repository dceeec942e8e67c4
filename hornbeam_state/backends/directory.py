"""The directory of an embedded store: whose it is, where it lies, what format it has.

Everything here happens once, when a process opens the store, and never changes what is already
stored: a directory that does not look right is refused with a message that says what to
do with it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hornbeam_state.errors import StoreUnavailable

if TYPE_CHECKING:
    from hornbeam_state.config import StoreConfig

FORMAT_FILE: Final = "format.json"
FORMAT: Final = {"format": "hornbeam-store", "version": 1}
_NO_PERMISSION: Final = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT)
_HINT: Final = "set HORNBEAM_STORE=lmdb:///another/directory"


def prepare_directory(config: StoreConfig) -> Path:
    """Create or check the directory of an embedded store.

    Returns:
        The directory to use: ``config.path``, or a temporary one (the same for every process of
        this user) when ``config.fallback`` allows it and the path cannot be written.

    Raises:
        StoreUnavailable: it cannot be created or written, belongs to another user, or holds
            something other than a store of this format.
    """
    path = config.path
    if path is None:
        raise StoreUnavailable(f"the store {config.safe_url} has no directory")
    try:
        _make(path)
        _require_writable(path)
    except OSError as error:
        if not config.fallback or error.errno not in _NO_PERMISSION:
            raise StoreUnavailable(
                f"cannot write to the store directory {path}: {error.strerror}; make it writable "
                f"or {_HINT}"
            ) from error
        fallback = _temporary_directory(str(path))
        warnings.warn(
            f"cannot write to {path} ({error.strerror}): keeping the store in {fallback}, which "
            f"may not survive a reboot; {_HINT} to choose a place",
            RuntimeWarning,
            stacklevel=2,
        )
        path = fallback
        _make(path)
    _check_owner(path)
    _check_filesystem(path)
    _check_format(path)
    return path


def runtime_directory(config: StoreConfig) -> Path:
    """Create or check a directory of this machine for a store that lives elsewhere.

    Returns:
        The same directory for every process of this user that uses the same store.

    Raises:
        StoreUnavailable: it cannot be made, or belongs to someone else.
    """
    path = _temporary_directory(config.safe_url)  # a digest of a password could be guessed
    try:
        _make(path)
    except OSError as error:
        raise StoreUnavailable(f"cannot use the directory {path}: {error.strerror}") from error
    _check_owner(path)
    return path


def _make(path: Path) -> None:
    """Create the directory, closed to other users; its parents as the umask says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        if not path.is_dir():
            raise NotADirectoryError(20, "it is not a directory") from None


def _require_writable(path: Path) -> None:
    """Raise the error that writing would raise; root passes `os.access` on read-only mounts."""
    if path.stat().st_uid != os.geteuid():
        return  # the owner check has the better message
    descriptor, name = tempfile.mkstemp(prefix=".probe-", dir=path)
    os.close(descriptor)
    Path(name).unlink()


def _temporary_directory(name: str) -> Path:
    digest = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"hornbeam-{os.geteuid()}-{digest}"


def _check_owner(path: Path) -> None:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) and not path.is_dir():
        raise StoreUnavailable(f"the store path {path} is not a directory; {_HINT}")
    if path.stat().st_uid != os.geteuid():
        raise StoreUnavailable(
            f"the store directory {path} belongs to user id {path.stat().st_uid}, and this process "
            f"runs as {os.geteuid()}: run both as one user, or {_HINT}"
        )


def _check_format(path: Path) -> None:
    marker = path / FORMAT_FILE
    if not marker.exists():
        foreign = [entry.name for entry in path.iterdir() if not _is_ours(entry.name)]
        if foreign and not marker.exists():  # else another process has just made the store
            raise StoreUnavailable(
                f"{path} is not a hornbeam store: it holds other files, such as "
                f"{min(foreign)!r}; {_HINT}"
            )
        path.chmod(0o700)
        _create(path / ".gitignore", "*\n")
        _create(marker, json.dumps(FORMAT) + "\n")
    try:
        found = json.loads(marker.read_text("utf-8"))
        version = found["version"] if found["format"] == FORMAT["format"] else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        version = None
    if version != FORMAT["version"]:
        raise StoreUnavailable(
            f"{marker} is not that of a version {FORMAT['version']} store (found: {version}): "
            f"the directory was written by another version of hornbeam or damaged; nothing was "
            f"changed. Use the version that wrote it, or {_HINT}"
        )


def _is_ours(name: str) -> bool:
    """Whether a file may lie in a directory whose format file is not written yet."""
    return name == ".gitignore" or name.startswith((".new-", ".probe-"))


def _create(target: Path, text: str) -> None:
    """Write a file that appears complete or not at all; the first of several writers wins."""
    descriptor, name = tempfile.mkstemp(prefix=".new-", dir=target.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        try:
            os.link(name, target)
        except FileExistsError:
            return
    finally:
        Path(name).unlink()


def write_note(path: Path, text: str) -> None:
    """Write a small file that only this user may read; one that says so already stays.

    So opening a store anew takes no room, and a full disk does not leave an empty note.
    """
    with contextlib.suppress(OSError, ValueError):
        if path.read_text("ascii") == text:
            return
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)


def check_namespace(directory: Path, *, alone: bool) -> None:
    """Refuse to share a store with processes of another container.

    LMDB tells living readers from dead ones by their process ids, which mean something else in
    another pid namespace.

    Args:
        directory: The store's directory.
        alone: Whether nobody else has the store open.

    Raises:
        StoreUnavailable: others have it open, in another pid namespace.
    """
    note = directory / "pid-namespace"
    try:
        own = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return  # no /proc: nothing to compare
    if alone:
        write_note(note, own)
    elif note.exists() and note.read_text("ascii") != own:
        raise StoreUnavailable(
            f"the store in {directory} is in use by another container (pid namespace): an embedded "
            f"store is for one. Use Redis between containers, share the pid namespace, or {_HINT}"
        )


_NETWORK_FILESYSTEMS: Final = frozenset(
    "9p afs ceph cifs fuse.glusterfs fuse.sshfs glusterfs lustre nfs nfs4 smb2 smb3 smbfs".split()  # noqa: SIM905
)


def filesystem_of(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """Return the type of the file system that a path lies on, or an empty text."""
    try:
        lines = mounts.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return ""
    best, kind = "", ""
    for line in lines:
        left, _, right = line.partition(" - ")
        point = left.split(" ")[4].encode().decode("unicode_escape")
        inside = path == Path(point) or Path(point) in path.parents
        if inside and len(point) >= len(best):  # of two mounts on one point, the later counts
            best, kind = point, right.split(" ")[0]
    return kind


def _check_filesystem(path: Path) -> None:
    kind = filesystem_of(path.resolve())
    if kind in _NETWORK_FILESYSTEMS:
        raise StoreUnavailable(
            f"the store directory {path} is on a network file system ({kind}), where LMDB's shared "
            f"memory and locks do not work: {_HINT} on a local disk, or use Redis"
        )
