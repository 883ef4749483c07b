"""The statistics of a batch in which some values count more than others.

    mean     = sum(w * x) / sum(w)
    variance = sum(w * (x - mean)^2) / sum(w)

Contract: `batch_moments` with every value repeated w times: whole weights give exactly
that, 0 leaves a value out. Gradients flow through x and through the weights.

Source: frequency weights, as in `tf.nn.weighted_moments`.
"""

from __future__ import annotations

import tensorflow.compat.v1 as tf

from bn_tf1.statistics.moments import Moments, reduction_axes, statistics_dtype
from bn_tf1.statistics.views import channels_for_arithmetic


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
    weights = _one_for_each_value(weights, x, axes)
    total = tf.reduce_sum(weights)
    channels = channels_for_arithmetic(x, reduction_axes(x.shape.ndims, axes))
    values = channels.enter(x)
    mean = channels.average(values, total, weights)
    centred = channels.centre(values, mean)
    variance = channels.average(tf.square(centred), total, weights)
    if not channels.has_short_sums:
        mean += channels.average(centred, total, weights)  # as in `composed`
    return Moments(mean, variance, total)


def _one_for_each_value(weights, x, axes):
    """`weights` with the sizes of `x` on `axes`."""
    sizes, wanted = (
        [tf.dimension_value(values.shape[a]) for a in axes] for values in (weights, x)
    )
    if None not in wanted and sizes == wanted:
        return weights
    shape = tf.unstack(tf.shape(x))
    return tf.broadcast_to(
        weights, [size if a in axes else 1 for a, size in enumerate(shape)]
    )


def weights_like(x: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """`weights` with the rank of `x`: one weight for each example gets axes of size 1."""
    if weights.shape.ndims == 1:
        return tf.reshape(weights, [-1] + [1] * (x.shape.ndims - 1))
    return weights
