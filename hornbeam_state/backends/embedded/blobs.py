"""Large values as files of their own, named by their content.

A large value in LMDB needs many neighbouring pages, which a file in use for long has few of,
and writing it would keep other writers waiting. So it is written to a file first, while nobody
waits, and the transaction only moves the file to its name and counts one more reference to it. A
file goes when nothing refers to it any more; one that a killed process left behind goes later.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hornbeam_state.backends.embedded.records import parse_count
from hornbeam_state.errors import StoreFull, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

LARGEST_INLINE: Final = 64 * 1024
"""Bytes up to which a value lies in LMDB."""

_BYTES_KEPT: Final = b"bytes"  # a row among the references, which are digests of 32 bytes
_ABANDONED_AFTER: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Blob:
    """A large value: its digest, its size, and the file it waits in until it is stored."""

    digest: bytes
    size: int
    waiting: Path


class Blobs:
    """The files of one LMDB environment.

    All but `write`, `read` and `discard` are called with the write guard held.

    Args:
        directory: Where the files lie.
        references: The database that counts, by digest, the records that refer to a file.
        durable: Whether a file is on the disk before it is stored.

    Attributes:
        doomed: Digests of what the running transaction leaves without a reference.
    """

    def __init__(self, directory: Path, references: Any, *, durable: bool) -> None:
        self._directory = directory
        self._references = references
        self._durable = durable
        self.doomed: set[bytes] = set()
        directory.mkdir(mode=0o700, exist_ok=True)

    def write(self, value: bytes) -> Blob:
        """Write a value to a file that nothing refers to yet.

        Raises:
            StoreFull: the disk is full.
        """
        try:
            descriptor, name = tempfile.mkstemp(prefix=".new-", dir=self._directory)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(value)
                    if self._durable:
                        file.flush()
                        os.fsync(file.fileno())
            except OSError:
                Path(name).unlink()
                raise
        except OSError as error:
            raise StoreFull(f"cannot write a large value: {error.strerror}") from error
        return Blob(digest_of(value), len(value), Path(name))

    def discard(self, blob: Blob) -> None:
        """Remove the file of a blob that was not stored after all."""
        blob.waiting.unlink(missing_ok=True)

    def read(self, digest: bytes, size: int) -> bytes | None:
        """Return a value, or None when its file is gone: the record was replaced meanwhile.

        Raises:
            StoreUnavailable: the file is not what it was.
        """
        path = self._path(digest)
        try:
            value = path.read_bytes()
        except FileNotFoundError:
            return None
        if len(value) != size:
            raise StoreUnavailable(f"the store file {path} is damaged: it has another size")
        return value

    def store(self, txn: Any, blob: Blob, references: int = 1) -> None:
        """Give a blob its name, and count the references to it."""
        blob.waiting.replace(self._path(blob.digest))
        self.doomed.discard(blob.digest)
        count = parse_count(txn.get(blob.digest, b"0", db=self._references))
        txn.put(blob.digest, b"%d" % (count + references), db=self._references)
        if count == 0:
            self._account(txn, blob.size)

    def release(self, txn: Any, digest: bytes, size: int) -> None:
        """Count one reference less; the file goes after the commit, when none is left."""
        count = parse_count(txn.get(digest, b"1", db=self._references)) - 1
        if count:
            txn.put(digest, b"%d" % count, db=self._references)
            return
        txn.delete(digest, db=self._references)
        self._account(txn, -size)
        self.doomed.add(digest)

    def release_all(self, txn: Any) -> None:
        """Drop every reference; the files go after the commit."""
        with txn.cursor(self._references) as cursor:
            digests = list(cursor.iternext(keys=True, values=False))
        self.doomed.update(digest for digest in digests if digest != _BYTES_KEPT)
        txn.drop(self._references, delete=False)

    def remove_doomed(self) -> None:
        """Remove, after the commit, the files that it left without a reference."""
        while self.doomed:
            self._path(self.doomed.pop()).unlink(missing_ok=True)

    def size(self, txn: Any) -> int:
        """Return how many bytes the stored files have together."""
        return parse_count(bytes(txn.get(_BYTES_KEPT, b"0", db=self._references)))

    def abandoned(self, txn: Any) -> Iterator[Path]:
        """Yield the files that nothing refers to and that nobody can be about to store."""
        before = time.time() - _ABANDONED_AFTER
        for path in self._directory.iterdir():
            referred = not path.name.startswith(".") and txn.get(
                bytes.fromhex(path.name), db=self._references
            )
            with contextlib.suppress(FileNotFoundError):  # its writer has just removed it
                if not referred and path.stat().st_mtime < before:
                    yield path

    def _account(self, txn: Any, size: int) -> None:
        txn.put(_BYTES_KEPT, b"%d" % (self.size(txn) + size), db=self._references)

    def _path(self, digest: bytes) -> Path:
        return self._directory / digest.hex()


def digest_of(value: bytes) -> bytes:
    """Return what names a value's file."""
    return hashlib.blake2b(value, digest_size=32).digest()
