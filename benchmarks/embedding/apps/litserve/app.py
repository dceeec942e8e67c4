"""LitServe: an API process makes the batches, worker processes run them."""

import os

import litserve
import torch
from sentence_transformers import SentenceTransformer


class Embed(litserve.LitAPI):
    def setup(self, device):
        torch.set_num_threads(int(os.environ["THREADS"]))
        self.model = SentenceTransformer(os.environ["MODEL"], device=device)

    def decode_request(self, request):
        return request["text"]

    def predict(self, texts):
        return self.model.encode(texts, batch_size=len(texts), show_progress_bar=False)

    def encode_response(self, output):
        return {"embedding": output.tolist()}


if __name__ == "__main__":
    api = Embed(
        max_batch_size=int(os.environ["BATCH_SIZE"]),
        batch_timeout=int(os.environ["WAIT_MS"]) / 1000,
        api_path="/embed",
    )
    server = litserve.LitServer(
        api,
        accelerator="cpu",
        workers_per_device=int(os.environ["WORKERS"]),
        fast_queue=os.environ["FAST_QUEUE"] == "1",
    )
    server.run(host="127.0.0.1", port=int(os.environ["PORT"]), generate_client_file=False)
