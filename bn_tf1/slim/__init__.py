"""The drop-in for `tf.contrib.layers.batch_norm`, which is tf_slim's, too.

contrib_batch_norm    the function, with all that the original does
arg_scopes            how it takes the arguments of an arg_scope
"""

from bn_tf1.slim.contrib_batch_norm import batch_norm

__all__ = ["batch_norm"]
