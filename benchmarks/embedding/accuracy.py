"""Answers over HTTP against `SentenceTransformer.encode` in fp32."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from embedding.load import MODEL, texts

if TYPE_CHECKING:
    from embedding.servers import Server

SAMPLE = 96
SEED = 20_000_000  # of no load
BENCHMARKS = Path(__file__).resolve().parents[1]
TOGETHER = 32  # so that they are answered in batches


def reference(folder: Path) -> np.ndarray:
    """Return what the sample's vectors are, computed in a process that then ends."""
    target = folder / "reference.npy"
    command = [sys.executable, "-m", "embedding.accuracy", str(target)]
    subprocess.run(command, cwd=BENCHMARKS, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True)
    return np.load(target)


def least_cosine(server: Server, expected: np.ndarray) -> float:
    """Send the sample to a server; return the cosine of the worst answer."""
    with ThreadPoolExecutor(TOGETHER) as pool:
        answers = np.array(list(pool.map(server.embed, texts(SAMPLE, SEED))), dtype=np.float64)
    if answers.shape != expected.shape:
        raise ValueError(f"answers of shape {answers.shape}, not {expected.shape}")
    if not np.isfinite(answers).all():
        raise ValueError("answers hold numbers that are none")
    lengths = np.linalg.norm(answers, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((answers * expected).sum(axis=1) / lengths).min())


def main() -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(MODEL), device="cpu")
    np.save(sys.argv[1], model.encode(texts(SAMPLE, SEED), show_progress_bar=False))


if __name__ == "__main__":
    main()
