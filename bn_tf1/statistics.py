"""Batch statistics and the normalisation that uses them: pure functions.

Purpose: everything of batch normalization that is arithmetic on tensors, with no
variable, no collection and no mode.

Contract: statistics have shape [channels] and are float32, or float64 for float64
inputs, whatever the precision of the input. The variance is the biased one (divided
by N). The mean is subtracted before anything is squared or scaled, so a mean hundreds
of times larger than the deviation costs no precision.

The seam: `batch_moments` is what a richer kind of statistics (masked, over ghost
batches, synchronised) replaces; anything that returns a `Moments` fits. The kernel that
computes moments and output is chosen here and nowhere else.

Source: Ioffe & Szegedy, "Batch Normalization", 2015 (arXiv:1502.03167), algorithm 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow.compat.v1 as tf


class Moments(NamedTuple):
    """Statistics of one batch, per channel.

    Attributes:
        mean: float32 or float64 tensor of shape [channels].
        variance: tensor like `mean`; the biased variance, sum((x - mean)^2) / N.
        count: N, the number of values per channel: a Python int where the shape tells
            it, otherwise a scalar tensor of the dtype of `mean`.
    """

    mean: Any
    variance: Any
    count: Any


def statistics_dtype(dtype: tf.DType) -> tf.DType:
    """The dtype of the statistics for inputs of `dtype`: at least float32."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def reduction_axes(rank: int, axis: int) -> tuple[int, ...]:
    """All axes of a tensor of `rank` but the channel axis, which may be negative."""
    channel_axis = axis % rank
    return tuple(a for a in range(rank) if a != channel_axis)


def static_count(shape: tf.TensorShape, axes: tuple[int, ...]) -> int | None:
    """The number of values per channel, or None where a reduced size is unknown."""
    count = 1
    for a in axes:
        size = tf.dimension_value(shape[a])
        if size is None:
            return None
        count *= size
    return count


def batch_moments(x: tf.Tensor, axes: tuple[int, ...]) -> Moments:
    """Mean, biased variance and count of `x` over `axes`.

    Args:
        x: float tensor of known rank.
        axes: the axes to reduce: all but the channel axis.

    Returns:
        `Moments` in float32, or float64 for float64 `x`.
    """
    dtype = statistics_dtype(x.dtype)
    mean, variance = tf.nn.moments(tf.cast(x, dtype), list(axes))
    count = static_count(x.shape, axes)
    if count is None:
        count = tf.cast(tf.reduce_prod(tf.gather(tf.shape(x), list(axes))), dtype)
    return Moments(mean, variance, count)


def unbiased_variance(moments: Moments) -> tf.Tensor:
    """The variance divided by N - 1 instead of N, shape [channels]."""
    return moments.variance * (moments.count / (moments.count - 1))


def normalize(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    *,
    axis: int,
    epsilon: float,
) -> tf.Tensor:
    """gamma * (x - mean) / sqrt(variance + epsilon) + beta, channel by channel.

    Args:
        x: float tensor of known rank with the channels on `axis`.
        mean, variance: tensors of shape [channels], float32 (float64 for float64 `x`).
        gamma, beta: tensors like `mean`, or None for 1 and 0.
        axis: the channel axis of `x`, negative or not.
        epsilon: added to the variance; in the unit of the variance.

    Returns:
        A tensor of the shape and dtype of `x`, computed in the dtype of `mean`.
    """
    scale = tf.rsqrt(variance + epsilon)
    if gamma is not None:
        scale *= gamma

    def on_axis(channels):
        return _broadcast_on_axis(channels, x.shape.ndims, axis)

    y = (tf.cast(x, mean.dtype) - on_axis(mean)) * on_axis(scale)
    if beta is not None:
        y += on_axis(beta)
    return tf.cast(y, x.dtype)


def _broadcast_on_axis(channels, rank, axis):
    trailing = rank - 1 - axis % rank
    if trailing == 0:
        return channels  # broadcasting aligns the last axis by itself
    return tf.reshape(channels, [-1] + [1] * trailing)
