"""The drop-in for `tf.contrib.layers.batch_norm`, which is tf_slim's, too."""

from bn_tf1.slim.contrib_batch_norm import batch_norm

__all__ = ["batch_norm"]
