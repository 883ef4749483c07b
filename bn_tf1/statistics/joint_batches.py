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

from bn_tf1.statistics.channels import (
    IS_TENSORFLOW_1,
    Channels,
    fixed_by_kernel,
    fixed_gradients_by_kernel,
)
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

    `x` is float32 or float64; the weights, as for `weighted_moments`, get no gradient.
    """
    own = []
    if weights is None:
        moments = batch_moments(x, channels)
    else:
        weights = tf.cast(tf.stop_gradient(weights), x.dtype)
        moments = weighted_moments(x, channels, weights)
        own = [weights]
    mean, variance, count = moments
    # Each of these small operations costs more than its work: a joint layer of workers has
    # many, while all wait for it.
    is_known = isinstance(count, int) and count > 0
    count = tf.convert_to_tensor(count, mean.dtype)
    if not is_known:
        # An empty part has NaN, and NaN times a share of 0 would spoil the sum of all.
        mean, variance = (
            tf.where_v2(count > 0, statistic, tf.zeros_like(statistic))
            for statistic in (mean, variance)
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
        # With an epsilon of 0, a deviation of 1.
        by_channel = scale, offset, mean, tf.ones_like(mean)
        wide = map(channels.for_places, by_channel)
        dx = fixed_by_kernel(values, *wide, epsilon=0.0)
    else:
        dx = channels.scale_last_read(channels.centre(values, mean), scale)
        dx = channels.add(dx, offset)
    dx = channels.leave(dx, x)
    if weights:
        dx *= weights[0]
    return (None, None, None, _once(dx), None, *[None] * len(weights))


def joint_of(parts: Sequence[Moments]) -> Moments:
    """Of several `part_moments` those of all together; plain operations, with gradients."""
    means = tf.stack([part.mean for part in parts])
    counts = tf.stop_gradient(tf.stack([part.count for part in parts]))
    counts = tf.reshape(counts, [-1] + [1] * (means.shape.ndims - 1))
    return joint_of_rows(counts, means, tf.stack([part.variance for part in parts]))


def joint_of_rows(counts: tf.Tensor, means: tf.Tensor, variances: tf.Tensor) -> Moments:
    """As `joint_of`, for tensors of [batches, 1], [batches, channels], [batches, channels].

    With several channel axes all three have as many more.
    """
    # Chan's: of the parts' own variances and the distances of their means, all of them
    # positive, so that nothing cancels as in sums of x and x^2.
    total = tf.reduce_sum(counts)
    shares = tf.math.divide_no_nan(counts, total)
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
    """As `normalize_with_moments`, with gradients for the moments, which are joint ones.

    So those of the other batches, and of other workers, get their part through them.
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
        wide = map(channels.for_places, (gamma, mean, variance))
        dx, *sums = fixed_gradients_by_kernel(direct, values, *wide, epsilon=epsilon)
        dgamma, dbeta = map(channels.over_places, sums)
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
    # TensorFlow would differentiate the operations above, which take the other batches'
    # statistics for constants, and give a second derivative that is wrong.
    return tf.raw_ops.PreventGradient(input=slope, message=NO_SECOND_DERIVATIVES)
