"""The statistics of a batch in which some values count more than others.

    mean     = sum(w * x) / sum(w)
    variance = sum(w * (x - mean)^2) / sum(w)

Contract: `batch_moments` with every value repeated w times: whole weights give exactly
that, 0 leaves a value out. Gradients flow through x and through the weights.

Source: frequency weights, as in `tf.nn.weighted_moments`.
"""

from __future__ import annotations

import tensorflow.compat.v1 as tf

from bn_tf1.statistics.channels import Channels
from bn_tf1.statistics.moments import Moments
from bn_tf1.statistics.plan import statistics_dtype


def weighted_moments(x: tf.Tensor, channels: Channels, weights: tf.Tensor) -> Moments:
    """Weighted mean, biased variance and sum of the weights of `x`, by channel.

    The weights have the rank of `x`: size 1 on the channel axes, and size 1 or that of `x` on
    the others. `count` is their sum for a channel; where that is 0, the others are NaN.
    """
    dtype = statistics_dtype(x.dtype)
    x, weights = tf.cast(x, dtype), tf.cast(weights, dtype)
    weights = _one_for_each_value(weights, x, channels.axes)
    # By channel all have the same: the weights have size 1 on the channel axes.
    total = tf.reduce_sum(weights)
    values = channels.enter(x)
    mean = channels.average(values, total, weights)
    centred = channels.centre(values, mean)
    variance = channels.average(tf.square(centred), total, weights)
    if not channels.has_short_sums:
        mean += channels.average(centred, total, weights)  # as in `composed`
    return Moments(mean, variance, total)


def _one_for_each_value(weights, x, channel_axes):
    """`weights` with the sizes of `x` on all axes but those of the channels."""
    wanted = [1 if a in channel_axes else n for a, n in enumerate(x.shape.as_list())]
    if None not in wanted and weights.shape.as_list() == wanted:
        return weights
    # A mask of [batch, 1, 1] counts each value of an example: as many times in the total.
    shape = tf.unstack(tf.shape(x))
    return tf.broadcast_to(
        weights, [1 if a in channel_axes else size for a, size in enumerate(shape)]
    )


def weights_like(x: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """`weights` with the rank of `x`: one weight for each example gets axes of size 1."""
    if weights.shape.ndims == 1:
        return tf.reshape(weights, [-1] + [1] * (x.shape.ndims - 1))
    return weights
