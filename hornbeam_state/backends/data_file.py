"""Whether an LMDB data file is sound, found out without handing it to LMDB."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Final

from lmdb import verify

from hornbeam_state.errors import StoreUnavailable

if TYPE_CHECKING:
    from pathlib import Path

# An LMDB 0.9 data file starts with two meta pages: a 16-byte page header, then magic, version,
# map address, map size, two 48-byte database records (the first starts with the page size), the
# number of the last page and the transaction id.
_META: Final = struct.Struct("<16xIIQQ I44x 48x QQ")
_MAGIC: Final = 0xBEEFC0DE
_LMDB_VERSION: Final = 1
_THOROUGH_UP_TO: Final = 64 * 1024 * 1024  # about 0.3 s for values of 1 KB


def check_data_file(path: Path, *, thorough: bool, whatever_its_size: bool = False) -> None:
    """Refuse a data file that LMDB could not map safely.

    LMDB trusts its file: reading a page past the end of a truncated one kills the process with
    SIGBUS. This reads the two meta pages and compares them with the file's size. A missing or
    empty file is fine: it is a new store.

    Args:
        path: The data file.
        thorough: Verify the whole structure too, where the file is small enough for that to take
            less than about half a second. Nobody else may have it open.
        whatever_its_size: Verify the structure of a large file too.

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
    if problem is None and thorough and (whatever_its_size or size <= _THOROUGH_UP_TO):
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
