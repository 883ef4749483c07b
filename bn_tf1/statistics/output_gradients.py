"""The gradients of an output that was normalised with the statistics of its own batch.

    dbeta  = sum(dy)
    dgamma = sum(dy * (x - mean)) / sqrt(variance + epsilon)
    dx     = gamma / sqrt(variance + epsilon)
             * (dy - weights * (dbeta / N
                                + dgamma / N * (x - mean) / sqrt(variance + epsilon)))

Contract: the gradient for x is the total derivative, through the moments too, so that
nothing flows back through them and each tensor is read as few times as possible. All of
it has gradients of its own, of every order.

Source: Ioffe & Szegedy, "Batch Normalization", 2015 (arXiv:1502.03167), section 3.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow.compat.v1 as tf

from bn_tf1.statistics.channels import (
    IS_TENSORFLOW_1,
    fixed_by_kernel,
    fixed_gradients_by_kernel,
)
from bn_tf1.statistics.moments import Moments, count_of
from bn_tf1.statistics.plan import channels_for_arithmetic
from bn_tf1.statistics.registered_gradients import (
    OUTPUT_GRADIENTS,
    gradient_of,
    settings_of,
    with_gradient,
)


class OutputGradients(NamedTuple):
    """The gradients for the operands of an output."""

    x: tf.Tensor
    gamma: tf.Tensor
    beta: tf.Tensor


def output_gradients(
    x: tf.Tensor,
    dy: tf.Tensor,
    moments: Moments,
    gamma: tf.Tensor,
    *,
    axes: tuple[int, ...],
    epsilon: float,
    weights: tf.Tensor | None = None,
    dmoments: tuple[tf.Tensor, tf.Tensor] | None = None,
) -> OutputGradients:
    """The total derivatives, as they are written at the top of this module.

    `dy` is the gradient for the output of `x`; `dmoments` those for the mean and the biased
    variance, where a loss is on these themselves.
    """
    channels = channels_for_arithmetic(x, axes)
    # The gradient kernel of 1.15 takes longer than a whole layer of several operations.
    takes_kernel = channels.takes_kernel and x.dtype == tf.float32
    if takes_kernel and not IS_TENSORFLOW_1 and dmoments is None:
        return _by_kernel(channels, x, dy, moments, gamma, epsilon, weights)
    return _by_hand(channels, x, dy, moments, gamma, epsilon, weights, dmoments)


def _by_hand(channels, x, dy, moments, gamma, epsilon, weights, dmoments=None):
    mean, variance, count = moments
    deviations = tf.rsqrt(variance + epsilon)
    inverse = _inverse(count)
    # Made again, and not kept from the forward pass: it costs one pass, and would cost the
    # memory of `x` in every layer for as long as the step takes.
    centred = channels.centre(channels.enter(x), mean)
    direct = channels.enter(dy)
    dbeta = channels.sum(direct)
    # Of no examples it is 0, as the kernel's. Their variance is NaN, and the convolution
    # of TensorFlow 1.15 gives whatever was in memory.
    products = channels.dot(centred, direct) * deviations
    values = count if weights is None else count_of(x, channels.axes)
    some = tf.sign(tf.convert_to_tensor(values, mean.dtype))
    dgamma = tf.math.multiply_no_nan(products, some)
    # Each of these writes over the one before: no other tensor of the size of `x` is made.
    through = channels.scale_last_read(centred, -inverse * dgamma * deviations)
    through = channels.add(through, -inverse * dbeta)
    if weights is not None:
        through = channels.enter(weights * channels.leave(through, x))
    dx = channels.scale_last_read(direct + through, gamma * deviations)
    if dmoments is not None:
        dmean, dvariance = dmoments
        own = channels.scale(centred, 2 * inverse * dvariance)
        dx += channels.add(own, inverse * dmean)
    return OutputGradients(channels.leave(dx, x), dgamma, dbeta)


def _by_kernel(channels, x, dy, moments, gamma, epsilon, weights):
    """With the fused kernel for constant statistics, whose gradient is also the sums.

    TensorFlow's gradients of these take the statistics for constants: the ones by hand
    take their place.
    """
    mean, variance, count = moments
    values = channels.enter(x)
    wide = tuple(map(channels.for_places, (mean, variance)))
    direct, *sums = fixed_gradients_by_kernel(
        channels.enter(dy), values, channels.for_places(gamma), *wide, epsilon=epsilon
    )
    dgamma, dbeta = map(channels.over_places, sums)
    # Both moments move with x: one more pass of the same kernel for constants takes the
    # shares of the two sums off, since it is linear in what it scales and adds.
    share = -gamma * tf.rsqrt(variance + epsilon) * _inverse(count)
    shares = map(channels.for_places, (share * dgamma, share * dbeta))
    through_both = fixed_by_kernel(values, *shares, *wide, epsilon=epsilon)
    if weights is None:
        dx = channels.leave(direct + through_both, x)
    else:
        dx = channels.leave(direct, x) + weights * channels.leave(through_both, x)
    inputs = [x, dy, mean, variance, gamma]
    if weights is not None:
        inputs += [weights, tf.convert_to_tensor(count, mean.dtype)]
    own = epsilon, channels.axes
    slopes = with_gradient(OUTPUT_GRADIENTS, [dx, dgamma, dbeta], inputs, own)
    return OutputGradients(*slopes)


@gradient_of(OUTPUT_GRADIENTS)
def _gradients_of_gradients(operation, ddx, ddgamma, ddbeta, *_):
    epsilon, axes = settings_of(operation.inputs[3])
    # In a loop, what the gradients are made of stands for these inputs by other names.
    inputs = [tf.identity(tensor) for tensor in operation.inputs[4:]]
    x, dy, mean, variance, gamma, *weighting = inputs
    weights, count = weighting or (None, count_of(x, axes))
    # TensorFlow differentiates these once more by itself: of every order from here on.
    slopes = _by_hand(
        channels_for_arithmetic(x, axes),
        x,
        dy,
        Moments(mean, variance, count),
        gamma,
        epsilon,
        weights,
    )
    return (*[None] * 4, *tf.gradients(slopes, inputs, [ddx, ddgamma, ddbeta]))


def _inverse(count):
    # Where nothing has a weight, the statistics are constants: no share goes through them.
    if isinstance(count, int):
        return 1 / count if count else 0.0
    return tf.math.divide_no_nan(tf.ones_like(count), count)
