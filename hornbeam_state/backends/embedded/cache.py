"""The key space of the embedded store that evicts."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final, TypeVar

import lmdb

from hornbeam_state.backends.embedded import eviction
from hornbeam_state.backends.embedded.blobs import Blob
from hornbeam_state.backends.embedded.keys import EmbeddedKeyspace
from hornbeam_state.backends.embedded.records import HASH_SIZE, full_key, parse_count, scattered_key
from hornbeam_state.errors import StoreFull

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

_EVICTIONS: Final = b"evictions"
_SPARE: Final = 0.3  # of the file's size
_SPARE_AT_LEAST: Final = 2 * 1024 * 1024


class CacheKeyspace(EmbeddedKeyspace):
    """The key space that evicts: when the file is full, the least used of some entries go.

    Its keys are scattered by a hash, so that a random sample of them is fair; listing a prefix
    therefore walks them all.
    """

    def get(self, key: bytes) -> bytes | None:
        """Return the value, or None; counts as a use."""
        value = self._read(scattered_key(key))
        if value is not None:
            self._bind()[0].sketch.note(key)
        return value

    def _stored(self, key: bytes) -> bytes:
        return scattered_key(key)

    def _under(self, txn: Any, prefix: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
        for stored, record in txn.cursor():
            key = full_key(stored[HASH_SIZE:], record)
            if key.startswith(prefix):
                yield bytes(stored), key, record

    def _store(self, txn: Any, key: bytes, value: bytes | Blob, expires: int) -> None:
        size = value.size if isinstance(value, Blob) else len(value)
        if size > self._limit // 2:
            raise StoreFull(
                f"a value of {size} bytes is too large for a cache with a cache_size of "
                f"{self._bind()[0].cache_size}"
            )
        self._evict_down_to(txn, self._limit - size)
        self._write_record(txn, key, value, expires)
        sketch = self._bind()[0].sketch
        sketch.note(key)
        sketch.age(1)

    @property
    def _limit(self) -> int:
        """Bytes that entries may take: copy-on-write needs the rest for its old pages."""
        size = self._bind()[0].cache_size
        return size - max(int(size * _SPARE), min(_SPARE_AT_LEAST, size // 3))

    def _guarded(self, patience: float, body: Callable[..., T], *args: Any) -> T:
        """Write, making more room where LMDB finds none: it needs neighbouring pages."""
        for remedy in (self._halve, self._empty):
            try:
                return super()._guarded(patience, body, *args)
            except StoreFull as error:
                if not isinstance(error.__cause__, lmdb.MapFullError):
                    raise
                with contextlib.suppress(StoreFull):
                    super()._guarded(patience, remedy)
        return super()._guarded(patience, body, *args)

    def _halve(self, txn: Any) -> None:
        self._evict_down_to(txn, self._limit // 2)

    def _empty(self, txn: Any) -> None:
        """Remove everything: dropping a database takes hardly any pages."""
        file = self._bind()[1]
        self._count_evictions(txn, txn.stat(self._db)["entries"])
        txn.drop(self._db, delete=False)
        txn.drop(file.index, delete=False)
        file.blobs.release_all(txn)

    def _evict_down_to(self, txn: Any, limit: int) -> None:
        files, file = self._bind()
        removed = eviction.make_room(
            txn, self._db, files.sketch, lambda: file.used(txn) > limit, self.remove
        )
        if removed:
            self._count_evictions(txn, removed)

    def _count_evictions(self, txn: Any, removed: int) -> None:
        total = self._evictions(txn) + removed
        txn.put(_EVICTIONS, b"%d" % total, db=self._bind()[1].meta)

    def _evictions(self, txn: Any) -> int:
        return parse_count(bytes(txn.get(_EVICTIONS, b"0", db=self._bind()[1].meta)))
