"""mosec: its Rust server makes the batches, Python processes run them."""

import os

import torch
from mosec import Server, Worker
from sentence_transformers import SentenceTransformer


class Embed(Worker):
    def __init__(self):
        torch.set_num_threads(int(os.environ["THREADS"]))
        self.model = SentenceTransformer(os.environ["MODEL"], device="cpu")

    def forward(self, data):
        texts = [item["text"] for item in data]
        vectors = self.model.encode(texts, batch_size=len(texts), show_progress_bar=False)
        return [{"embedding": vector} for vector in vectors.tolist()]


if __name__ == "__main__":
    server = Server()
    server.append_worker(
        Embed,
        num=int(os.environ["WORKERS"]),
        max_batch_size=int(os.environ["BATCH_SIZE"]),
        max_wait_time=int(os.environ["WAIT_MS"]),
    )
    server.run()
