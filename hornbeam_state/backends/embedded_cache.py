"""The key space of the embedded store that evicts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hornbeam_state.backends import eviction
from hornbeam_state.backends.blobs import Blob
from hornbeam_state.backends.embedded_keys import EmbeddedKeyspace
from hornbeam_state.backends.records import HASH_SIZE, full_key, scattered_key
from hornbeam_state.errors import StoreFull

if TYPE_CHECKING:
    from collections.abc import Iterator

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
            self._owner.opened().sketch.note(key)
        return value

    def _stored(self, key: bytes) -> bytes:
        return scattered_key(key)

    def _under(self, txn: Any, prefix: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
        for stored, record in txn.cursor():
            key = full_key(stored[HASH_SIZE:], record)
            if key.startswith(prefix):
                yield bytes(stored), key, record

    def _store(self, txn: Any, key: bytes, value: bytes | Blob, expires: int) -> None:
        files = self._owner.opened()
        limit = int(files.cache_size * _EVICT_ABOVE)
        size = value.size if isinstance(value, Blob) else len(value)
        if size > limit // 2:
            raise StoreFull(f"a value of {size} bytes is too large for a cache of {limit}")
        super()._store(txn, key, value, expires)
        files.sketch.note(key)
        files.sketch.age(1)

        def is_too_full() -> bool:
            statistics = txn.stat(self._db)
            pages = eviction.pages(statistics) * statistics["psize"]
            return bool(pages + self._blobs.size(txn) > limit)

        removed = eviction.make_room(txn, self._db, files.sketch, is_too_full, self.remove)
        if removed:
            total = self._evictions(txn) + removed
            txn.put(_EVICTIONS, b"%d" % total, db=files.cache_meta)

    def _evictions(self, txn: Any) -> int:
        return int(bytes(txn.get(_EVICTIONS, b"0", db=self._owner.opened().cache_meta)))
