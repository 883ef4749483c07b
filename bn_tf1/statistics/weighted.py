"""The statistics of a batch in which some values count more than others.

    mean     = sum(w * x) / sum(w)
    variance = sum(w * (x - mean)^2) / sum(w)

Contract: `batch_moments` with every value repeated w times: whole weights give exactly
that, 0 leaves a value out. Gradients flow through x and through the weights.

Source: frequency weights, as in `tf.nn.weighted_moments`.
"""

from __future__ import annotations

import tensorflow.compat.v1 as tf

from bn_tf1.statistics.moments import Moments, statistics_dtype


def weighted_moments(
    x: tf.Tensor, axes: tuple[int, ...], weights: tf.Tensor
) -> Moments:
    """Weighted mean, biased variance and sum of the weights of `x` over `axes`.

    Args:
        x: float tensor of known rank.
        axes: the axes to reduce: all but the channel axes.
        weights: float tensor of the rank of `x`: of size 1 on the channel axes, and of
            size 1 or of the size of `x` on the others.

    Returns:
        `Moments`; `count` is the sum of the weights of a channel. Where that is 0, the
        others are NaN.
    """
    dtype = statistics_dtype(x.dtype)
    x, weights = tf.cast(x, dtype), tf.cast(weights, dtype)
    # How many values of a channel share one weight.
    shared = tf.reduce_prod(tf.gather(tf.shape(x), list(axes))) // tf.size(weights)
    total = tf.reduce_sum(weights) * tf.cast(shared, dtype)

    def average(values, keepdims=False):
        return tf.reduce_sum(weights * values, list(axes), keepdims=keepdims) / total

    mean = average(x, keepdims=True)
    variance = average(tf.square(x - mean))
    return Moments(tf.squeeze(mean, list(axes)), variance, total)


def weights_like(x: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """`weights` with the rank of `x`: one weight for each example gets axes of size 1."""
    if weights.shape.ndims == 1:
        return tf.reshape(weights, [-1] + [1] * (x.shape.ndims - 1))
    return weights
