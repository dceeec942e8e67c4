"""hornbeam's batching alone, around the same call that the peers make; no Embedder."""

import os
import time

from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

from hornbeam_ml import Serving

model = SentenceTransformer(os.environ["MODEL"], device="cpu")


def load():
    return lambda texts: model.encode(texts, batch_size=len(texts), show_progress_bar=False)


serving = Serving(
    load,
    name="minilm",
    batch_size=int(os.environ["BATCH_SIZE"]),
    queue_limit=int(os.environ.get("QUEUE_LIMIT", "1024")),
    warmup="warm up",
)
app = FastAPI()


class Text(BaseModel):
    text: str


class Embedding(BaseModel):
    embedding: list[float]


@app.post("/embed")
async def embed(request: Text) -> Embedding:
    vector = await serving.arun(request.text)
    return Embedding(embedding=vector.tolist())


@app.get("/hello")
async def hello() -> str:
    return "hello"


class Texts(BaseModel):
    texts: list[str]


@app.post("/direct")
def direct(request: Texts) -> list[float]:
    """Return the milliseconds of a call of the model for each text."""
    took = []
    for text in request.texts:
        begin = time.perf_counter()
        model.encode([text], batch_size=1, show_progress_bar=False)
        took.append(1000 * (time.perf_counter() - begin))
    return took
