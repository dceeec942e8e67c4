"""Whether an LMDB data file is sound, found out without handing it to LMDB."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Final

from lmdb import verify

from hornbeam_state.errors import StoreUnavailable

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

# An LMDB 0.9 data file starts with two meta pages: a 16-byte page header, then magic, version,
# map address, map size, two 48-byte database records (the first starts with the page size), the
# number of the last page and the transaction id.
_META: Final = struct.Struct("<16xIIQQ I44x 48x QQ")
_MAGIC: Final = 0xBEEFC0DE
_LMDB_VERSION: Final = 1
_THOROUGH_UP_TO: Final = 64 * 1024 * 1024  # about 0.3 s for values of 1 KB

_THOROUGH_WHILE_SHARED: Final = 8 * 1024 * 1024  # at most 0.2 s


def check_data_file(path: Path, *, alone: bool, whatever_its_size: bool = False) -> None:
    """Refuse a data file that LMDB could not map safely.

    LMDB trusts its file: reading a page past the end of a truncated one kills the process with
    SIGBUS. A missing or empty file is fine for the first to open it: it is a new store.

    Args:
        path: The data file.
        alone: Nobody else has it open. Then its structure is verified where that takes less than
            about half a second, and a sound file that ends early (LMDB does not write pages it
            took and freed in one transaction) is made as long as its header says.
        whatever_its_size: Verify the structure of a large file too.

    Raises:
        StoreUnavailable: the file is damaged; it was not touched.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size:
                needed = _size_by_header(path, file)
    except FileNotFoundError:
        size = 0
    if not size and not alone:
        raise damaged(path, "it is missing or empty, though another process has the store open")
    if not size or not alone:
        return
    if size < needed or whatever_its_size or size <= _THOROUGH_UP_TO:
        _verify(path)
    if size < needed:
        os.truncate(path, needed)


def check_while_shared(path: Path) -> None:
    """Refuse a data file that others write to meanwhile, if its structure is damaged.

    A large file is verified only if it ends early: every process that joins pays for this.

    Args:
        path: The data file.

    Raises:
        StoreUnavailable: the file is damaged, or was written to meanwhile.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        needed = _size_by_header(path, file)
    if _THOROUGH_WHILE_SHARED < size >= needed:
        return
    _verify(path)


def _size_by_header(path: Path, file: BinaryIO) -> int:
    """Return the size that the newer of the two meta pages asks for, in bytes."""
    first = file.read(_META.size)
    _check_meta(path, first)
    page_size = int(_META.unpack(first)[4])
    file.seek(page_size)
    second = file.read(_META.size)
    _check_meta(path, second)
    newest = max(_META.unpack(first), _META.unpack(second), key=lambda meta: meta[-1])
    return int(newest[5] + 1) * page_size


def _verify(path: Path) -> None:
    try:
        findings = verify.verify(str(path), subdir=False)  # type: ignore[no-untyped-call]
    except verify.VerifyError as error:
        raise damaged(path, str(error)) from error
    if findings:
        raise damaged(path, str(findings[0]))


def _check_meta(path: Path, page: bytes) -> None:
    problem = _meta_problem(page)
    if problem is not None:
        raise damaged(path, problem)


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
