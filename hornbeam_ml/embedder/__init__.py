"""Texts to vectors: tokens, batches of similar length, the fastest engine there is."""

from hornbeam_ml.embedder.embedder import Embedder as Embedder
