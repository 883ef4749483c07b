"""The drop-ins for `tf.layers.batch_normalization` and `tf.layers.BatchNormalization`.

normalization_layer    the function and the class, with all that the originals do
legacy_layer           what any layer of `tf.layers` does: scopes, weights, losses
"""

from bn_tf1.layers.normalization_layer import (
    BatchNorm,
    BatchNormalization,
    batch_norm,
    batch_normalization,
    install,
)

__all__ = [
    "BatchNorm",
    "BatchNormalization",
    "batch_norm",
    "batch_normalization",
    "install",
]
