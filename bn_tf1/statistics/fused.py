"""Batch statistics and output in one operation: the fused kernel.

Contract: serves every rank and the layouts that the kernel can take after a reshape,
which copies nothing. The kernel's unbiased variance becomes the biased one by a factor.
Its gradient is one operation too, for the output alone: nothing flows from a loss on the
statistics themselves. Where the version's own gradient is slow, the one that `composed`
has, written by hand, takes its place; that one knows of such a loss.

`tf.nn.fused_batch_norm` is not used because it raises an epsilon below 1.001e-5 to that.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow.compat.v1 as tf

from bn_tf1.statistics.channels import channels_of
from bn_tf1.statistics.moments import Moments, count_of, reduction_axes
from bn_tf1.statistics.output_gradients import output_gradients
from bn_tf1.statistics.registered_gradients import registered_gradient
from bn_tf1.statistics.views import channels_for_statistics

_KERNEL = "FusedBatchNormV3"


class FusedOutput(NamedTuple):
    """The output, and the statistics of the batch, float32 of shape [channels].

    `variance` is biased or unbiased, as was asked for.
    """

    y: tf.Tensor
    mean: tf.Tensor
    variance: tf.Tensor


def normalize_batch(
    x: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    *,
    axis: int,
    epsilon: float,
    unbiased: bool,
    gradient_by_hand: bool,
) -> FusedOutput:
    """The output with the statistics of the batch `x`, and these statistics.

    Args:
        x: float16, bfloat16 or float32 tensor of known rank.
        gamma, beta: float32 tensors of shape [channels], or None for 1 and 0.
        axis: the channel axis of `x`.
        epsilon: added to the variance; in the unit of the variance.
        unbiased: whether the variance is returned as the kernel gives it, divided by
            N - 1 instead of N.
        gradient_by_hand: for float32 `x` with its channels last: whether the gradient
            is the one of `composed` instead of the kernel's.
    """
    unused = tf.constant([], tf.float32)
    gradients = {}
    if gradient_by_hand:
        gradients[_KERNEL] = registered_gradient(
            "fused_batch", _gradients, epsilon=epsilon
        )
    with tf.get_default_graph().gradient_override_map(gradients):
        outputs, channels = _fused(x, unused, unused, gamma, beta, axis, epsilon, True)
    mean, variance = outputs.batch_mean, outputs.batch_variance
    if not unbiased:
        count = count_of(x, reduction_axes(x.shape.ndims, axis))
        if isinstance(count, int):
            variance *= (count - 1) / count
        else:
            variance -= variance / count
    return FusedOutput(channels.leave(outputs.y, x), mean, variance)


def _gradients(operation, dy, dmean, dunbiased, *_, epsilon):
    x, gamma = operation.inputs[:2]
    mean, unbiased = operation.outputs[1:3]
    count = count_of(x, (0, 1, 2))
    # The biased variance that the kernel also gives is another thing on a GPU.
    variance = unbiased * ((count - 1) / count)
    dmoments = None
    # Where nothing is on the statistics, TensorFlow passes zeros that are made like them.
    if not dmean.op.type == dunbiased.op.type == "ZerosLike":
        # Of one value per channel the kernel divides by 1.
        known = isinstance(count, int)
        less = max(count - 1, 1) if known else tf.maximum(count - 1, 1)
        dmoments = dmean, dunbiased * (count / less)
    slopes = output_gradients(
        x,
        dy,
        Moments(mean, variance, count),
        gamma,
        axis=-1,
        epsilon=epsilon,
        dmoments=dmoments,
    )
    return slopes.x, slopes.gamma, slopes.beta, None, None


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
    """The output for a mean and a variance that are constants: they get no gradient."""
    outputs, channels = _fused(x, mean, variance, gamma, beta, axis, epsilon, False)
    return channels.leave(outputs.y, x)


def _fused(x, mean, variance, gamma, beta, axis, epsilon, is_training):
    channels = (channels_for_statistics if is_training else channels_of)(x, axis)
    size = [tf.dimension_value(x.shape[channels.axes[0]])]
    outputs = tf.raw_ops.FusedBatchNormV3(
        x=channels.enter(x),
        scale=tf.ones(size) if gamma is None else gamma,
        offset=tf.zeros(size) if beta is None else beta,
        mean=mean,
        variance=variance,
        epsilon=epsilon,
        data_format=channels.data_format,
        is_training=is_training,
    )
    return outputs, channels
