"""An image classifier: requests that come together go through the network together.

gunicorn -k hornbeam --workers 2 app:app
"""

from dataclasses import asdict
from io import BytesIO
from typing import Annotated

import numpy as np
import torch
from fastapi import Depends, FastAPI, HTTPException, Request
from PIL import Image
from shapes import SHAPES, SIZE, pixels, train

from hornbeam_ml import Serving, install_error_handlers

MAX_BODY_BYTES = 100_000


class BadImage(ValueError):
    """What was sent is no image that the network could look at."""


def load(device):
    """Return what runs a batch. Your own model would be read from a file here."""
    network = train().to(device)

    @torch.inference_mode()
    def classify(images):
        return network(torch.from_numpy(images).to(device)).softmax(1).cpu().numpy()

    return classify


def decode(png):
    """Turn what a request sent into an item; runs in that request's own task."""
    try:
        image = Image.open(BytesIO(png), formats=["PNG"])
        if image.size == (SIZE, SIZE):  # known before a pixel is unpacked
            return pixels(image.convert("L"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImage("send an image: the body is no sound PNG file") from error
    raise BadImage(f"an image has {SIZE} x {SIZE} pixels, not {image.width} x {image.height}")


def answer(probabilities):
    """Turn a row of results into what is sent back; runs in that request's task, too."""
    return {
        "label": SHAPES[probabilities.argmax()],
        "probabilities": dict(zip(SHAPES, probabilities.tolist(), strict=True)),
    }


# Loaded and run through all buckets in each worker, before its first request.
classifier = Serving(
    load,
    name="shapes",
    preprocess=decode,
    postprocess=answer,
    collate="stack",  # items are arrays of one shape
    batch_size=16,
    buckets=(1, 4, 16),  # the network only ever sees batches of these sizes
    batch_timeout_ms=2,  # it is so quick that nobody would come while it runs: wait for company
    warmup=np.zeros((1, SIZE, SIZE), np.float32),
)
app = FastAPI()


async def body(request: Request) -> bytes:
    """Read a body, and stop where it is too large, whatever length the client announced."""
    read = bytearray()
    async for chunk in request.stream():
        read += chunk
        if len(read) > MAX_BODY_BYTES:
            raise HTTPException(413, f"an image has at most {MAX_BODY_BYTES:,} bytes")
    return bytes(read)


@app.post("/classify")
async def classify(png: Annotated[bytes, Depends(body)]):
    try:
        return await classifier.arun(png)
    except BadImage as error:
        raise HTTPException(422, str(error)) from error


@app.get("/stats")
async def stats():
    return asdict(classifier.stats())


install_error_handlers(app)  # 503 and 504; the worker does it anyway, other servers do not
