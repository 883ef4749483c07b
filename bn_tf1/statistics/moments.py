"""The statistics of a batch, and what they are made over.

Contract: statistics have the shape of `x` on its channel axes ([channels] for one
axis) and are float32, or float64 for float64 inputs, whatever the precision of the
input. The variance is the biased one (divided by N). The mean is subtracted before
anything is squared, so a mean hundreds of times larger than the deviation costs no
precision.

Source: Ioffe & Szegedy, "Batch Normalization", 2015 (arXiv:1502.03167), algorithm 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow.compat.v1 as tf

from bn_tf1.statistics.plan import product, statistics_dtype


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


class BatchOutput(NamedTuple):
    """The output for the statistics of the batch, and these statistics.

    Attributes:
        y: like `x`.
        mean: float32 or float64 tensor of shape [channels].
        variance: like `mean`; biased or unbiased, as was asked for.
        count: of a batch that may have no value, or no weight: how many it has, a scalar
            like `mean`; otherwise None.
    """

    y: tf.Tensor
    mean: tf.Tensor
    variance: tf.Tensor
    count: Any = None


def in_dtype(number: float | tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """A float or a scalar tensor as a tensor of `dtype`, rounded once."""
    if tf.is_tensor(number):
        return tf.cast(number, dtype)
    return tf.constant(number, dtype)


def count_of(x: tf.Tensor, axes: tuple[int, ...]) -> int | tf.Tensor:
    """The number of values per channel, as in `Moments`, for the channel axes `axes`."""
    sizes = x.shape.as_list()
    reduced = [a for a in range(len(sizes)) if a not in axes]
    count = product(sizes[a] for a in reduced)
    if count is not None:
        return count
    dtype = statistics_dtype(x.dtype)
    kept = product(sizes[a] for a in axes)
    if kept is None:
        return tf.cast(tf.reduce_prod(tf.gather(tf.shape(x), reduced)), dtype)
    # In int64: beyond 2^31 values, 8 GB of float32, an int32 would count on from below 0.
    return tf.cast(tf.size(x, out_type=tf.int64), dtype) / float(kept)


def unbiased_variance(moments: Moments) -> tf.Tensor:
    """The variance divided by N - 1 instead of N, shape [channels]."""
    count = moments.count
    # Where a switch keeps one value from being trained on, the graph must still be built.
    if isinstance(count, int) and count == 1:
        return moments.variance
    if isinstance(count, int):
        # The factor is rounded once, from a float64 of Python's.
        return moments.variance * (count / (count - 1))
    return moments.variance * tf.math.divide_no_nan(count, degrees_of_freedom(count))


def degrees_of_freedom(count: tf.Tensor) -> tf.Tensor:
    """N - 1, by which an unbiased variance is divided; N where no more than one is there.

    A sum of weights may be less than 1: N - 1 would make a variance of it that is negative.
    """
    return tf.where_v2(count > 1, count - 1, count)
