"""BentoML: adaptive batching in front of the service's worker processes."""

import os

import bentoml
import torch
from sentence_transformers import SentenceTransformer


@bentoml.service(
    workers=int(os.environ["WORKERS"]),
    threads=int(os.environ["THREADS"]),
    traffic={"timeout": 60},
)
class Embed:
    def __init__(self) -> None:
        torch.set_num_threads(int(os.environ["THREADS"]))
        self.model = SentenceTransformer(os.environ["MODEL"], device="cpu")

    @bentoml.api(
        batchable=True,
        max_batch_size=int(os.environ["BATCH_SIZE"]),
        max_latency_ms=int(os.environ["MAX_LATENCY_MS"]),
    )
    def embed(self, texts: list[str]) -> list[list[float]]:
        vectors = self.model.encode(texts, batch_size=len(texts), show_progress_bar=False)
        return vectors.tolist()
