"""The drop-ins for `tf.layers.batch_normalization` and `tf.layers.BatchNormalization`.

normalization_layer    the function and the class, with all that the originals do
tf_layers_module       `install()`, for code that cannot be edited
legacy_layer           what any layer of `tf.layers` does: scopes, weights, losses
"""

from bn_tf1.layers.normalization_layer import (
    BatchNorm,
    BatchNormalization,
    batch_norm,
    batch_normalization,
)
from bn_tf1.layers.tf_layers_module import install

__all__ = [
    "BatchNorm",
    "BatchNormalization",
    "batch_norm",
    "batch_normalization",
    "install",
]
