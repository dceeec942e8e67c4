"""The exceptions of hornbeam_ml; they share their root with `hornbeam_state.errors`."""

from __future__ import annotations

from hornbeam_state.errors import HornbeamError


class ModelError(HornbeamError):
    """A model failed to load, or none is registered under the name."""
