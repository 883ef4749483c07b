"""The correction of batch renormalization: training sees what inference will see.

    r = stop_gradient(clip(stddev / renorm_stddev, rmin, rmax))
    d = stop_gradient(clip((mean - renorm_mean) / renorm_stddev, -dmax, dmax))
    y = gamma * ((x - mean) / stddev * r + d) + beta,  stddev = sqrt(variance + epsilon)

Contract: with r and d not clipped, y is normalised with the moving statistics
`renorm_mean` and `renorm_stddev`; with r = 1 and d = 0 it is plain batch
normalization. Gradients flow through `mean` and `stddev`, not through r and d.

Source: Ioffe, "Batch Renormalization", 2017 (arXiv:1702.03275), algorithm 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow.compat.v1 as tf

from bn_tf1.statistics.moments import in_dtype


class Renormalization(NamedTuple):
    """How to renormalise.

    Attributes:
        decay: share of the old `renorm_mean` and `renorm_stddev` that an update keeps:
            a number or a scalar float tensor.
        rmin, rmax, dmax: bounds of r and d: numbers, scalar float tensors, or None
            for none.
    """

    decay: Any = 0.99
    rmin: Any = None
    rmax: Any = None
    dmax: Any = None


def renorm_correction(
    mean: tf.Tensor,
    stddev: tf.Tensor,
    renorm_mean: tf.Tensor,
    renorm_stddev: tf.Tensor,
    *,
    renorm: Renormalization,
    epsilon: float,
) -> tuple[tf.Tensor, tf.Tensor]:
    """r and d for the statistics of a batch, of their shape.

    `stddev` is sqrt(variance + epsilon); `renorm_stddev` counts as sqrt(epsilon) at least.
    """
    # An average of sqrt(variance + epsilon) is no less, but where its initial value is: one
    # of 0 would make r infinite.
    renorm_stddev = tf.maximum(renorm_stddev, epsilon**0.5)
    r = stddev / renorm_stddev
    d = (mean - renorm_mean) / renorm_stddev
    if renorm.rmin is not None:
        r = tf.maximum(r, in_dtype(renorm.rmin, r.dtype))
    if renorm.rmax is not None:
        r = tf.minimum(r, in_dtype(renorm.rmax, r.dtype))
    if renorm.dmax is not None:
        dmax = in_dtype(renorm.dmax, d.dtype)
        d = tf.minimum(tf.maximum(d, -dmax), dmax)
    # The paper's: constants in the backward pass, as if they were a layer's parameters.
    return tf.stop_gradient(r, name="renorm_r"), tf.stop_gradient(d, name="renorm_d")
