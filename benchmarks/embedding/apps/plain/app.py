"""What one writes without a model server: FastAPI, and the model called in the handler."""

import os

import torch
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

torch.set_num_threads(int(os.environ["THREADS"]))
model = SentenceTransformer(os.environ["MODEL"], device="cpu")
app = FastAPI()


class Text(BaseModel):
    text: str


class Embedding(BaseModel):
    embedding: list[float]


@app.post("/embed")
async def embed(request: Text) -> Embedding:
    return Embedding(embedding=model.encode(request.text).tolist())
