"""The directory of an embedded store: who owns it, what format it has, whether its files are sound.

Everything here happens once, when a process opens the store, and never changes what is already
stored: a directory or file that does not look right is refused with a message that says what to
do with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lmdb import verify

from hornbeam_state.errors import StoreUnavailable

if TYPE_CHECKING:
    from hornbeam_state.config import StoreConfig

FORMAT_FILE: Final = "format.json"
FORMAT: Final = {"format": "hornbeam-store", "version": 1}
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
        if not config.fallback:
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
        if foreign:
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
    except (OSError, ValueError, KeyError, TypeError):
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


# An LMDB 0.9 data file starts with two meta pages: a 16-byte page header, then magic, version,
# map address, map size, two 48-byte database records (the first starts with the page size), the
# number of the last page and the transaction id.
_META: Final = struct.Struct("<16xIIQQ I44x 48x QQ")
_MAGIC: Final = 0xBEEFC0DE
_LMDB_VERSION: Final = 1
_THOROUGH_UP_TO: Final = 64 * 1024 * 1024  # about 0.3 s for values of 1 KB


def check_data_file(path: Path, *, thorough: bool) -> None:
    """Refuse a data file that LMDB could not map safely.

    LMDB trusts its file: reading a page past the end of a truncated one kills the process with
    SIGBUS. This reads the two meta pages and compares them with the file's size. A missing or
    empty file is fine: it is a new store.

    Args:
        path: The data file.
        thorough: Verify the whole structure too, where the file is small enough for that to take
            less than about half a second. Nobody else may have it open.

    Raises:
        StoreUnavailable: the file is damaged; it was not touched.
    """
    try:
        with path.open("rb") as file:
            first = file.read(_META.size)
            if not first:
                return
            problem = _meta_problem(first)
            if problem is None:
                page_size = _META.unpack(first)[4]
                file.seek(page_size)
                second = file.read(_META.size)
                problem = _meta_problem(second)
            if problem is None:
                newest = max(_META.unpack(first), _META.unpack(second), key=lambda meta: meta[-1])
                size = os.fstat(file.fileno()).st_size
                if size < (newest[5] + 1) * page_size:
                    problem = f"it has {size} bytes and should have {(newest[5] + 1) * page_size}"
    except FileNotFoundError:
        return
    if problem is None and thorough and size <= _THOROUGH_UP_TO:
        problem = _structural_problem(path)
    if problem is not None:
        raise damaged(path, problem)


def _structural_problem(path: Path) -> str | None:
    try:
        findings = verify.verify(str(path), subdir=False)  # type: ignore[no-untyped-call]
    except verify.VerifyError as error:
        return str(error)
    return str(findings[0]) if findings else None


def damaged(path: Path, problem: str) -> StoreUnavailable:
    """Return the error for a damaged data file."""
    return StoreUnavailable(
        f"the store file {path} is damaged: {problem}. Nothing was changed. Restore it from a "
        f"backup, or start afresh by moving it away: mv {path} {path}.damaged"
    )


def _meta_problem(page: bytes) -> str | None:
    if len(page) < _META.size:
        return "its header is cut off"
    magic, version, _, _, page_size, _, _ = _META.unpack(page)
    if magic != _MAGIC:
        return "it does not start with an LMDB header"
    if version != _LMDB_VERSION:
        return f"its LMDB format is {version} instead of {_LMDB_VERSION}"
    if page_size < 512 or page_size & (page_size - 1):  # noqa: PLR2004
        return "its header makes no sense"
    return None
