"""The app of `--only disconnects`: it notes when each item's batch began."""

import os
import time

from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

from hornbeam_ml import Serving

model = SentenceTransformer(os.environ["MODEL"], device="cpu")
began: dict[int, float] = {}


def load():
    def embed(items):
        now = time.monotonic()
        began.update((number, now) for number, _ in items)
        texts = [text for _, text in items]
        return model.encode(texts, batch_size=len(texts), show_progress_bar=False)

    return embed


serving = Serving(load, batch_size=int(os.environ["BATCH_SIZE"]), warmup=(-1, "warm up"))
app = FastAPI()


class Text(BaseModel):
    number: int = -1
    text: str


class Embedding(BaseModel):
    embedding: list[float]


@app.post("/embed")
async def embed(request: Text) -> Embedding:
    vector = await serving.arun((request.number, request.text))
    return Embedding(embedding=vector.tolist())


@app.get("/began")
async def begun() -> dict[int, float]:
    """Return when the batch of each item began, on the clock that all processes share."""
    return began
