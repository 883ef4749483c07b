"""Statistics that several batches have together: those of towers, or of workers.

    N        = sum(count_i)
    mean     = sum(count_i * mean_i) / N
    variance = sum(count_i * (variance_i + (mean_i - mean)^2)) / N

Contract: unequal and empty batches count as what they are, and nothing cancels. The
gradient for x is made in two parts, one through the output and one through the moments:
between them lies what the others contribute. Second derivatives are refused.

Source: Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
Sample Variances", 1979.
"""

from __future__ import annotations

from typing import Sequence

import tensorflow.compat.v1 as tf

from bn_tf1.statistics.channels import IS_TENSORFLOW_1, Channels
from bn_tf1.statistics.composed import batch_moments, normalize_fixed
from bn_tf1.statistics.moments import Moments, count_of
from bn_tf1.statistics.plan import channels_for_arithmetic
from bn_tf1.statistics.registered_gradients import (
    NORMALIZE_PART,
    PART_MOMENTS,
    gradient_of,
    settings_of,
    with_gradient,
)
from bn_tf1.statistics.weighted import weighted_moments

NO_SECOND_DERIVATIVES = (
    "batch norm with statistics of several batches has no second derivatives"
)


def part_moments(
    x: tf.Tensor, channels: Channels, weights: tf.Tensor | None = None
) -> Moments:
    """The moments of one of the batches; 0 where it is empty or has no weight.

    Args:
        x: float32 or float64 tensor of known rank.
        channels: how to see it.
        weights: as for `weighted_moments`; they get no gradient.
    """
    own = []
    if weights is None:
        moments = batch_moments(x, channels)
    else:
        weights = tf.cast(tf.stop_gradient(weights), x.dtype)
        moments = weighted_moments(x, channels, weights)
        own = [weights]
    count = tf.convert_to_tensor(moments.count, moments.mean.dtype)
    mean, variance = (
        tf.where_v2(count > 0, statistic, tf.zeros_like(statistic))
        for statistic in (moments.mean, moments.variance)
    )
    mean, variance = with_gradient(
        PART_MOMENTS, [mean, variance], [x, count, *own], (0.0, channels.axes)
    )
    return Moments(mean, variance, count)


@gradient_of(PART_MOMENTS)
def _part_gradients(operation, dmean, dvariance, *_):
    # A gradient is built outside of the device of its layer.
    with tf.device(operation.inputs[3].device):
        return _part_slopes(operation, dmean, dvariance)


def _part_slopes(operation, dmean, dvariance):
    mean, _, constant, x, count, *weights = operation.inputs
    _, axes = settings_of(constant)
    channels = channels_for_arithmetic(x, axes)
    inverse = tf.math.divide_no_nan(tf.ones_like(count), count)
    scale, offset = 2 * inverse * dvariance, inverse * dmean
    values = channels.enter(x)
    if channels.takes_kernel and x.dtype == tf.float32:
        # One pass over the data in place of three.
        dx = _scaled_by_kernel(channels, values, mean, scale, offset)
    else:
        dx = channels.scale_last_read(channels.centre(values, mean), scale)
        dx = channels.add(dx, offset)
    dx = channels.leave(dx, x)
    if weights:
        dx *= weights[0]
    return (None, None, None, _once(dx), None, *[None] * len(weights))


def _scaled_by_kernel(channels, values, mean, scale, offset):
    """(values - mean) * scale + offset."""
    return tf.raw_ops.FusedBatchNormV3(
        x=values,
        scale=channels.for_places(scale),
        offset=channels.for_places(offset),
        mean=channels.for_places(mean),
        # With an epsilon of 0, a deviation of 1.
        variance=channels.for_places(tf.ones_like(mean)),
        epsilon=0.0,
        is_training=False,
    ).y


def joint_of(parts: Sequence[Moments]) -> Moments:
    """The moments of several batches together; plain operations, with gradients.

    Args:
        parts: `part_moments` of each.
    """
    counts = tf.stop_gradient(tf.stack([part.count for part in parts]))
    return joint_of_rows(
        counts,
        tf.stack([part.mean for part in parts]),
        tf.stack([part.variance for part in parts]),
    )


def joint_of_rows(counts: tf.Tensor, means: tf.Tensor, variances: tf.Tensor) -> Moments:
    """As `joint_of`, for tensors of [batches], [batches, channels], [batches, channels]."""
    total = tf.reduce_sum(counts)
    shares = tf.math.divide_no_nan(counts, total)
    shares = tf.reshape(shares, [-1] + [1] * (means.shape.ndims - 1))
    mean = tf.reduce_sum(shares * means, 0)
    squares = variances + tf.square(means - mean)
    return Moments(mean, tf.reduce_sum(shares * squares, 0), total)


def normalize_part(
    x: tf.Tensor,
    moments: Moments,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    channels: Channels,
    *,
    epsilon: float,
) -> tf.Tensor:
    """The output for one of the batches, with gradients for the joint moments.

    Args:
        x: float32 or float64 tensor of known rank.
        moments: the joint ones.
        gamma, beta: tensors like the mean, or None for 1 and 0.
        channels: how to see `x`.
        epsilon: added to the variance; in the unit of the variance.
    """
    mean, variance, _ = moments
    gamma = tf.ones_like(mean) if gamma is None else gamma
    beta = tf.zeros_like(mean) if beta is None else beta
    y = normalize_fixed(x, mean, variance, gamma, beta, channels, epsilon=epsilon)
    inputs = [x, mean, variance, gamma, beta]
    return with_gradient(NORMALIZE_PART, [y], inputs, (epsilon, channels.axes))[0]


@gradient_of(NORMALIZE_PART)
def _gradients(operation, dy, *_):
    with tf.device(operation.inputs[2].device):
        return _output_slopes(operation, dy)


def _output_slopes(operation, dy):
    _, constant, x, mean, variance, gamma, _ = operation.inputs
    epsilon, axes = settings_of(constant)
    channels = channels_for_arithmetic(x, axes)
    inverse = tf.rsqrt(variance + epsilon)
    values, direct = channels.enter(x), channels.enter(dy)
    if channels.takes_kernel and x.dtype == tf.float32 and not IS_TENSORFLOW_1:
        dx, dgamma, dbeta, _, _ = tf.raw_ops.FusedBatchNormGradV3(
            y_backprop=direct,
            x=values,
            scale=channels.for_places(gamma),
            reserve_space_1=channels.for_places(mean),
            reserve_space_2=channels.for_places(variance),
            reserve_space_3=tf.constant([], tf.float32),
            epsilon=epsilon,
            is_training=False,
        )
        dgamma, dbeta = map(channels.over_places, (dgamma, dbeta))
    else:
        dbeta = channels.sum(direct)
        dgamma = channels.dot(channels.centre(values, mean), direct) * inverse
        dx = channels.scale_last_read(direct, gamma * inverse)
    # The sums of nothing are whatever was in memory, with the operations of 1.15.
    count = count_of(x, axes)
    if not isinstance(count, int) or not count:
        some = tf.convert_to_tensor(count, mean.dtype) > 0
        dgamma, dbeta = (
            tf.where_v2(some, sums, tf.zeros_like(sums)) for sums in (dgamma, dbeta)
        )
    dmean = -gamma * inverse * dbeta
    dvariance = -0.5 * gamma * inverse**2 * dgamma
    slopes = [channels.leave(dx, x), dmean, dvariance, dgamma, dbeta]
    return (None, None, *map(_once, slopes))


def _once(slope):
    return tf.raw_ops.PreventGradient(input=slope, message=NO_SECOND_DERIVATIVES)
