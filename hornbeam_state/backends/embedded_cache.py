"""The key space of the embedded store that evicts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

from hornbeam_state.backends import eviction
from hornbeam_state.backends.embedded_keys import EmbeddedKeyspace
from hornbeam_state.backends.records import HASH_SIZE, full_key, scattered_key
from hornbeam_state.errors import StoreFull

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hornbeam_state.backends.blobs import Blob

T = TypeVar("T")

_EVICTIONS: Final = b"evictions"
_EVICT_ABOVE: Final = 0.7  # of the file's size: copy-on-write needs the rest for its old pages


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
        super()._store(txn, key, value, expires)
        sketch = self._bind()[0].sketch
        sketch.note(key)
        sketch.age(1)

    def _reserve(self, txn: Any, size: int) -> None:
        """Evict until there is room for a value.

        Raises:
            StoreFull: it is too large to be worth the room.
        """
        limit = int(self._bind()[0].cache_size * _EVICT_ABOVE)
        if size > limit // 2:
            raise StoreFull(f"a value of {size} bytes is too large for a cache of {limit}")
        self._evict_down_to(txn, limit - size)

    def _guarded(self, patience: float, body: Callable[..., T], *args: Any) -> T:
        """Write, making more room where LMDB finds no neighbouring pages for a value."""
        try:
            return super()._guarded(patience, body, *args)
        except StoreFull:
            limit = int(self._bind()[0].cache_size * _EVICT_ABOVE)
            super()._guarded(patience, self._evict_down_to, limit // 2)
            return super()._guarded(patience, body, *args)

    def _evict_down_to(self, txn: Any, limit: int) -> None:
        files, file = self._bind()
        removed = eviction.make_room(
            txn, self._db, files.sketch, lambda: file.used(txn) > limit, self.remove
        )
        if removed:
            txn.put(_EVICTIONS, b"%d" % (self._evictions(txn) + removed), db=file.meta)

    def _evictions(self, txn: Any) -> int:
        return int(bytes(txn.get(_EVICTIONS, b"0", db=self._bind()[1].meta)))
