"""Ray Serve: a proxy process in front of replicas that batch."""

import asyncio
import os

import ray
import torch
from ray import serve
from sentence_transformers import SentenceTransformer

WORKERS = int(os.environ["WORKERS"])
THREADS = int(os.environ["THREADS"])


@serve.deployment(
    num_replicas=WORKERS, ray_actor_options={"num_cpus": THREADS}, max_ongoing_requests=256
)
class Embed:
    def __init__(self):
        torch.set_num_threads(THREADS)
        self.model = SentenceTransformer(os.environ["MODEL"], device="cpu")

    @serve.batch(
        max_batch_size=int(os.environ["BATCH_SIZE"]),
        batch_wait_timeout_s=int(os.environ["WAIT_MS"]) / 1000,
    )
    async def embed(self, texts):
        return await asyncio.to_thread(self.encode, texts)

    def encode(self, texts):
        vectors = self.model.encode(texts, batch_size=len(texts), show_progress_bar=False)
        return vectors.tolist()

    async def __call__(self, request):
        text = (await request.json())["text"]
        return {"embedding": await self.embed(text)}


if __name__ == "__main__":
    ray.init(
        num_cpus=WORKERS * THREADS,
        include_dashboard=False,
        log_to_driver=True,
        _node_ip_address="127.0.0.1",
        _temp_dir=os.environ["FOLDER"],
        object_store_memory=200 << 20,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["PORT"])})
    serve.run(Embed.bind(), route_prefix="/embed", blocking=True)
