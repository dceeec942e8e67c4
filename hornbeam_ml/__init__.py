"""Models inside your own web app: loaded once per worker, their results shared by all workers.

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
from hornbeam_ml.errors import ModelError
from hornbeam_ml.identity import register_fingerprint
from hornbeam_ml.models import aget_model, get_model, register_model
from hornbeam_ml.web import asgi_app, wsgi_app
from hornbeam_state.errors import DeadlineExceeded, HornbeamError, Overloaded

__all__ = [
    "CacheScope",
    "DeadlineExceeded",
    "HornbeamError",
    "ModelError",
    "Overloaded",
    "acache_clear",
    "acache_stats",
    "acached_inference",
    "aget_model",
    "asgi_app",
    "cache_clear",
    "cache_scope",
    "cache_stats",
    "cached_inference",
    "get_model",
    "register_fingerprint",
    "register_model",
    "wsgi_app",
]
