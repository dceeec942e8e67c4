"""The embedded store: LMDB files of one directory, on one machine."""

from hornbeam_state.backends.embedded.backend import EmbeddedBackend

__all__ = ["EmbeddedBackend"]
