"""The exceptions of hornbeam_ml; they share their root with `hornbeam_state.errors`."""

from __future__ import annotations

from hornbeam_state.errors import HornbeamError
from hornbeam_state.transports.failures import register_error


class ModelError(HornbeamError):
    """A model failed to load, broke its contract, or none is registered under the name."""


class ClientDisconnected(HornbeamError):
    """The client of the HTTP request left, so what had not started for it never runs."""


class ServingClosed(HornbeamError):
    """The serving takes no more calls; the message says whether it was closed or broke."""


class StreamClosed(HornbeamError):
    """The stream was closed, its thread ended, or it belongs to the parent of this process."""


for _error in (ModelError, ClientDisconnected, ServingClosed, StreamClosed):
    register_error(_error)  # they come from a model host as they are
