"""Batch statistics and output out of several operations, for any input.

    mean     = sum(x) / N
    variance = sum((x - mean)^2) / N
    y        = gamma * (x - mean) / sqrt(variance + epsilon) + beta

Contract: the moments are plain, differentiable operations. The gradient of the output
for x is the total derivative, through the moments too (`output_gradients`): nothing flows
back through them. It is made of the moments as they entered the output, so that gradients
of gradients see what they depend on. The largest error there is when a mean is hundreds of
times larger than the deviation is that of the sum of x: it is made of sums over parts, or,
where it cannot be, corrected by the sum of the residues x - mean.

Source: Ioffe & Szegedy, "Batch Normalization", 2015 (arXiv:1502.03167), section 3.
"""

from __future__ import annotations

from typing import Callable

import tensorflow.compat.v1 as tf

from bn_tf1.statistics.channels import (
    IS_TENSORFLOW_1,
    UNFOLDED,
    Channels,
    fixed_by_kernel,
)
from bn_tf1.statistics.moments import BatchOutput, Moments, count_of, unbiased_variance
from bn_tf1.statistics.output_gradients import output_gradients
from bn_tf1.statistics.plan import Plan, channels_for_arithmetic, statistics_dtype
from bn_tf1.statistics.registered_gradients import (
    NORMALIZE_BATCH,
    gradient_of,
    settings_of,
    with_gradient,
)


def normalize_batch(
    x: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    plan: Plan,
    *,
    epsilon: float,
    unbiased: bool,
) -> BatchOutput:
    """The output with the statistics of the batch `x`, and these statistics.

    Args:
        x: float tensor of known rank.
        gamma, beta: tensors of the dtype and shape of the statistics, or None for 1 and 0.
        plan: for `x`.
        epsilon: added to the variance; in the unit of the variance.
        unbiased: which variance is returned; the output always uses the biased one.
    """
    moments = batch_moments(x, plan.channels)
    y = normalize_with_moments(x, moments, gamma, beta, plan.channels, epsilon=epsilon)
    variance = unbiased_variance(moments) if unbiased else moments.variance
    return BatchOutput(y, moments.mean, variance)


def batch_moments(x: tf.Tensor, channels: Channels) -> Moments:
    """Mean, biased variance and count of `x`, a float tensor of known rank, by channel."""
    # A sum in float16 ends at 65,504, and one in bfloat16 stands still after 256 ones.
    x = tf.cast(x, statistics_dtype(x.dtype))
    count = count_of(x, channels.axes)
    divisor = tf.convert_to_tensor(count, x.dtype)
    values = channels.enter(x)
    mean = channels.average(values, divisor)
    # Two passes, and not E[x^2] - E[x]^2 in one: at a mean of 300 and a deviation of 0.05,
    # float32 made 0.0234 or -0.0078 of a variance of 0.0025 that way, by the draw.
    # What the output is made of, too: TensorFlow merges the two, and computes it once.
    centred = channels.centre(values, mean)
    if channels.has_short_sums:
        return Moments(mean, channels.sum_of_squares(centred) / divisor, count)
    # One long sum has left an error in the mean. That of the residues, which are as small
    # as the deviation, tells it; in the variance it is its square, and does not count.
    residues, squares = channels.both_sums(centred)
    return Moments(mean + residues / divisor, squares / divisor, count)


def normalize_with_moments(
    x: tf.Tensor,
    moments: Moments,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    channels: Channels,
    *,
    epsilon: float,
    weights: tf.Tensor | None = None,
) -> tf.Tensor:
    """The output for statistics of the batch `x` itself.

    Args:
        x, gamma, beta, epsilon: as for `normalize_batch`.
        moments: of `x`: mean, biased variance, and their count.
        channels: how to see `x`.
        weights: where the moments are weighted, the weights: a tensor that broadcasts
            to `x` and has a sum by channel of `count`.
    """
    mean, variance, count = moments
    x, dtype = tf.cast(x, mean.dtype), x.dtype
    gamma = tf.ones_like(mean) if gamma is None else gamma
    beta = tf.zeros_like(mean) if beta is None else beta

    operands = x, mean, variance, gamma, beta, channels
    y = normalize_fixed(*operands, epsilon=epsilon, kernel=UNFOLDED)
    # The gradient by hand is given for all inputs at once: TensorFlow's own would go through
    # the moments, too, and keep a centred and a scaled copy of `x` until the backward pass.
    inputs = [x, mean, variance, gamma, beta]
    if weights is not None:
        inputs += [weights, tf.convert_to_tensor(count, mean.dtype)]
    (y,) = with_gradient(NORMALIZE_BATCH, [y], inputs, (epsilon, channels.axes))
    return tf.cast(y, dtype)


@gradient_of(NORMALIZE_BATCH)
def _gradients(operation, dy, *_):
    epsilon, axes = settings_of(operation.inputs[1])
    x, mean, variance, gamma, _, *weighting = operation.inputs[2:]
    weights, count = weighting or (None, count_of(x, axes))
    moments = Moments(mean, variance, count)
    slopes = output_gradients(
        x, dy, moments, gamma, axes=axes, epsilon=epsilon, weights=weights
    )
    # None for the moments: that of x has gone through them.
    gradients = (None, None, slopes.x, None, None, slopes.gamma, slopes.beta)
    if not weighting:
        return gradients
    deviations = tf.rsqrt(variance + epsilon)
    dmean = -gamma * deviations * slopes.beta
    dvariance = -0.5 * gamma * deviations**2 * slopes.gamma
    channels = channels_for_arithmetic(x, axes)
    dweights = _weights_gradient(channels, x, moments, weights, dmean, dvariance)
    return (*gradients, dweights, None)


def _weights_gradient(channels, x, moments, weights, dmean, dvariance):
    """Of the weights, which enter both moments with their share of the sum."""
    mean, variance, count = moments
    centred = channels.centre(channels.enter(x), mean)
    through_variance = channels.scale(
        channels.add(tf.square(centred), -variance), dvariance
    )
    by_value = channels.scale(centred, dmean) + through_variance
    by_value = tf.math.divide_no_nan(channels.leave(by_value, x), count)
    # A mask of size 1 on some axes has been broadcast to `x`: its gradient is summed there.
    broadcast = tf.raw_ops.BroadcastGradientArgs(s0=tf.shape(weights), s1=tf.shape(x))
    return tf.reshape(tf.reduce_sum(by_value, broadcast.r0), tf.shape(weights))


def normalize_fixed(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    channels: Channels,
    *,
    epsilon: float,
    kernel: Callable = tf.raw_ops.FusedBatchNormV3,
) -> tf.Tensor:
    """As `formula.normalize`, for a mean and a variance that need no gradient."""
    x, dtype = tf.cast(x, mean.dtype), x.dtype
    gamma = tf.ones_like(mean) if gamma is None else gamma
    beta = tf.zeros_like(mean) if beta is None else beta
    values = channels.enter(x)
    if IS_TENSORFLOW_1 and channels.places > 1:
        values = tf.identity(values)  # `tf.contrib.quantize` stops here
    if channels.takes_kernel and x.dtype == tf.float32:
        wide = map(channels.for_places, (gamma, beta, mean, variance))
        y = fixed_by_kernel(values, *wide, epsilon=epsilon, kernel=kernel)
    else:
        # Centred before it is scaled: x * scale and mean * scale, each rounded, would cancel.
        centred = channels.centre(values, mean)
        y = channels.scale_last_read(centred, gamma * tf.rsqrt(variance + epsilon))
        y = channels.add(y, beta)
    return tf.cast(channels.leave(y, x), dtype)
