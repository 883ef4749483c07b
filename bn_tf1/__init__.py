"""Batch normalization for graph-mode TensorFlow 1 code, on TensorFlow 1.15 and 2."""

from bn_tf1.builder import batch_norm
from bn_tf1.checkpoints.restore import RestoreReport, restore
from bn_tf1.doctor.examination import audit
from bn_tf1.doctor.findings import Finding
from bn_tf1.doctor.lint import lint
from bn_tf1.doctor.linted_train_op import make_train_op
from bn_tf1.moving_averages import UPDATE_OPS_COLLECTION
from bn_tf1.population.divergence import divergence
from bn_tf1.records import BatchNormCall, batch_norm_calls
from bn_tf1.statistics import Renormalization

__version__ = "0.1.0"

__all__ = [
    "UPDATE_OPS_COLLECTION",
    "BatchNormCall",
    "Finding",
    "Renormalization",
    "RestoreReport",
    "audit",
    "batch_norm",
    "batch_norm_calls",
    "divergence",
    "lint",
    "make_train_op",
    "restore",
]
