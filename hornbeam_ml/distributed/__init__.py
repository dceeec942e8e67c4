"""Batches over nodes, and over threads."""

from hornbeam_ml.distributed.inference import DistributedInference
from hornbeam_ml.distributed.records import DistributionStats, NodeFigures
from hornbeam_ml.distributed.thread_batches import aprocess_batch, process_batch

__all__ = [
    "DistributedInference",
    "DistributionStats",
    "NodeFigures",
    "aprocess_batch",
    "process_batch",
]
