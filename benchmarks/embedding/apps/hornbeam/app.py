"""The plain app with hornbeam in it: one line makes the embedder, one awaits it."""

import dataclasses
import os
import time

from fastapi import FastAPI
from pydantic import BaseModel

from hornbeam_ml import Embedder

embedder = Embedder(
    os.environ["MODEL"],
    backend=os.environ["BACKEND"],
    precision=os.environ["PRECISION"],
    queue_limit=int(os.environ.get("QUEUE_LIMIT", "1024")),
    cache=False,
)
app = FastAPI()


class Text(BaseModel):
    text: str


class Embedding(BaseModel):
    embedding: list[float]


@app.post("/embed")
async def embed(request: Text) -> Embedding:
    vector = await embedder.aencode(request.text)
    return Embedding(embedding=vector.tolist())


@app.get("/hello")
async def hello() -> str:
    return "hello"


class Texts(BaseModel):
    texts: list[str]


@app.post("/direct")
def direct(request: Texts) -> list[float]:
    """Return the milliseconds of a call for each text: no batching, no other thread."""
    took = []
    for text in request.texts:
        begin = time.perf_counter()
        embedder.encode(text, inline=True)
        took.append(1000 * (time.perf_counter() - begin))
    return took


@app.get("/about")
async def about() -> dict[str, object]:
    engine = {"backend": embedder.backend, "precision": embedder.precision}
    return {**engine, **dataclasses.asdict(embedder.stats())}
