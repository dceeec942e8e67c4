"""A web app whose texts are embedded on the nodes that are there, or here when none is.

gunicorn -k hornbeam app:app
"""

from dataclasses import asdict
from typing import Annotated

from fastapi import FastAPI
from ml_worker import embedder
from pydantic import BaseModel, Field

from hornbeam_ml import DistributedInference, install_error_handlers

inference = DistributedInference(
    "gpu", module="ml_worker", function="predict", local=embedder.encode
)
app = FastAPI()

Text = Annotated[str, Field(min_length=1, max_length=10_000)]


class EmbedRequest(BaseModel):
    texts: Annotated[list[Text], Field(min_length=1, max_length=10_000)]


class EmbedResponse(BaseModel):
    embeddings: list[list[float]]


@app.post("/embed")
async def embed(request: EmbedRequest) -> EmbedResponse:
    vectors = await inference.predict_batch(request.texts)
    return EmbedResponse(embeddings=[vector.tolist() for vector in vectors])


@app.get("/nodes")
async def nodes():
    """Say which nodes are there, and what became of the batches of this worker."""
    return {"nodes": await inference.aget_worker_nodes(), "stats": asdict(inference.stats())}


install_error_handlers(app)  # 503 and 504; the worker does it anyway, other servers do not
