"""The statistics of a batch, and what they are made over.

Contract: statistics have the shape of `x` on its channel axes ([channels] for one
axis) and are float32, or float64 for float64 inputs, whatever the precision of the
input. The variance is the biased one (divided by N). The mean is subtracted before
anything is squared, so a mean hundreds of times larger than the deviation costs no
precision.

Source: Ioffe & Szegedy, "Batch Normalization", 2015 (arXiv:1502.03167), algorithm 1.
"""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple, Sequence

import numpy as np
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


def in_dtype(number: float | tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """A float or a scalar tensor as a tensor of `dtype`, rounded once."""
    if tf.is_tensor(number):
        return tf.cast(number, dtype)
    return tf.constant(number, dtype)


def channel_axes(rank: int, axis: int | Sequence[int]) -> tuple[int, ...]:
    """The channel axes of a tensor of `rank`, ascending and not negative."""
    axes = (axis,) if isinstance(axis, numbers.Integral) else axis
    return tuple(sorted(a % rank for a in axes))


def reduction_axes(rank: int, axis: int | Sequence[int]) -> tuple[int, ...]:
    """All axes of a tensor of `rank` but the channel axes, which may be negative."""
    channels = channel_axes(rank, axis)
    return tuple(a for a in range(rank) if a not in channels)


def parameter_shape(shape: tf.TensorShape, axis: int | Sequence[int]) -> list[int]:
    """The shape of a layer's variables for inputs of `shape`, known on `axis`.

    [channels] for one channel axis; with several, the variables keep the rank of the
    input, with sizes of 1 on the other axes.
    """
    kept = channel_axes(shape.ndims, axis)
    if len(kept) == 1:
        return [tf.dimension_value(shape[kept[0]])]
    return [
        tf.dimension_value(shape[a]) if a in kept else 1 for a in range(shape.ndims)
    ]


def static_count(shape: tf.TensorShape, axes: tuple[int, ...]) -> int | None:
    """The number of values per channel, or None where a reduced size is unknown."""
    count = 1
    for a in axes:
        size = tf.dimension_value(shape[a])
        if size is None:
            return None
        count *= size
    return count


def count_of(x: tf.Tensor, axes: tuple[int, ...]) -> int | tf.Tensor:
    """The number of values per channel, as in `Moments`."""
    count = static_count(x.shape, axes)
    if count is not None:
        return count
    dtype = statistics_dtype(x.dtype)
    kept = [size for a, size in enumerate(x.shape.as_list()) if a not in axes]
    if None in kept:
        return tf.cast(tf.reduce_prod(tf.gather(tf.shape(x), list(axes))), dtype)
    size = tf.size(x, out_type=tf.int64)
    return tf.cast(size, dtype) / float(np.prod(kept))


def unbiased_variance(moments: Moments) -> tf.Tensor:
    """The variance divided by N - 1 instead of N, shape [channels]."""
    count = moments.count
    # Where a switch keeps one value from being trained on, the graph must still be built.
    if isinstance(count, int) and count == 1:
        return moments.variance
    return moments.variance * (count / (count - 1))
