"""Models inside your own web app: loaded once per worker, calls batched, results shared.

Example::

    from hornbeam_ml import cached_inference, get_model, register_model

    register_model("minilm", lambda: SentenceTransformer("all-MiniLM-L6-v2"))

    def embed(text):
        return cached_inference(get_model("minilm").encode, text)

Every function that waits on something has an awaitable twin with an ``a`` in front.
"""

from hornbeam_ml.cache import (
    CacheScope,
    acache_clear,
    acache_stats,
    acached_inference,
    cache_clear,
    cache_scope,
    cache_stats,
    cached_inference,
)
from hornbeam_ml.distributed import (
    DistributedInference,
    DistributionStats,
    NodeFigures,
    aprocess_batch,
    process_batch,
)
from hornbeam_ml.embedder import Embedder
from hornbeam_ml.errors import ClientDisconnected, ModelError, ServingClosed, StreamClosed
from hornbeam_ml.identity import register_fingerprint
from hornbeam_ml.models import aget_model, get_model, register_model
from hornbeam_ml.serving import DONE, KeyStats, Serving, ServingStats, apredict, predict
from hornbeam_ml.streams import Stream, awith_stream, current_stream, with_stream
from hornbeam_ml.web import asgi_app, install_error_handlers, wsgi_app
from hornbeam_state.errors import DeadlineExceeded, HornbeamError, Overloaded

__all__ = [
    "CacheScope",
    "ClientDisconnected",
    "DONE",
    "DeadlineExceeded",
    "DistributedInference",
    "DistributionStats",
    "Embedder",
    "HornbeamError",
    "KeyStats",
    "ModelError",
    "NodeFigures",
    "Overloaded",
    "Serving",
    "ServingClosed",
    "ServingStats",
    "Stream",
    "StreamClosed",
    "acache_clear",
    "acache_stats",
    "acached_inference",
    "aget_model",
    "apredict",
    "aprocess_batch",
    "asgi_app",
    "awith_stream",
    "cache_clear",
    "cache_scope",
    "cache_stats",
    "cached_inference",
    "current_stream",
    "get_model",
    "install_error_handlers",
    "predict",
    "process_batch",
    "register_fingerprint",
    "register_model",
    "with_stream",
    "wsgi_app",
]
