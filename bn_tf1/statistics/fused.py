"""Batch statistics and output in one operation: the fused kernel.

Contract: serves every rank and the layouts that the kernel can take after a reshape,
which copies nothing. The kernel's unbiased variance becomes the biased one by a factor.
Its gradient is one operation too, for the output alone: nothing flows from a loss on the
statistics themselves. Where the version's own gradient is slow, the one that `composed`
has, written by hand, takes its place; that one knows of such a loss.

`tf.nn.fused_batch_norm` is not used because it raises an epsilon below 1.001e-5 to that.
"""

from __future__ import annotations

import tensorflow.compat.v1 as tf

from bn_tf1.statistics.channels import IS_TENSORFLOW_1, UNFOLDED, as_before
from bn_tf1.statistics.moments import BatchOutput, Moments, count_of
from bn_tf1.statistics.output_gradients import output_gradients
from bn_tf1.statistics.plan import Plan
from bn_tf1.statistics.registered_gradients import FUSED_BATCH, gradient_of


def normalize_batch(
    x: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    plan: Plan,
    *,
    epsilon: float,
    unbiased: bool,
) -> BatchOutput:
    """As `composed.normalize_batch`, for an `x` that the fused kernel takes by its plan.

    So `x` is float16, bfloat16 or float32, and gamma and beta have the shape [channels].
    """
    # In training the kernel takes no moving statistics: with a factor of its own it could
    # average them, but 1.15 has none, and no guard would be around it.
    unused = tf.constant([], tf.float32)
    # The versions are one kernel; which is taken says only whether tools may fold it.
    kernels = ("FusedBatchNormV2", "FusedBatchNormV3")
    gradients = dict.fromkeys(kernels, FUSED_BATCH) if plan.gradient_by_hand else {}
    with tf.get_default_graph().gradient_override_map(gradients):
        operands = x, unused, unused, gamma, beta, plan
        how = {"image": plan.image, "epsilon": epsilon}
        y, mean, variance, *_ = outputs_of_kernel(*operands, **how)
    # What the kernel gives is N / (N - 1) times the variance that it normalises with.
    if not unbiased:
        if plan.count is None:
            variance -= variance / count_of(x, plan.axes)
        else:
            variance *= (plan.count - 1) / plan.count
    return BatchOutput(y, mean, variance)


@gradient_of(FUSED_BATCH)
def _gradients(operation, dy, dmean, dunbiased, *_):
    # As this gradient is taken on a CPU alone, with channels last, the image says all.
    x, gamma = operation.inputs[:2]
    mean, unbiased = operation.outputs[1:3]
    count = count_of(x, (3,))
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
        axes=(3,),
        epsilon=operation.get_attr("epsilon"),
        dmoments=dmoments,
    )
    return slopes.x, slopes.gamma, slopes.beta, None, None


def outputs_of_kernel(
    x, mean, variance, gamma, beta, plan, *, image, epsilon, is_training=True
):
    """The outputs of the kernel, for the plan of `x`; the first in the shape of `x`.

    Without `is_training` it normalises with the mean and the variance that are given, which
    get no gradient.
    """
    size = [tf.dimension_value(x.shape[plan.axes[0]])]
    is_unfolded = IS_TENSORFLOW_1 and not plan.is_foldable
    values = x if image is None else tf.reshape(x, image)
    if is_unfolded and not is_training and x.shape.ndims == 2:
        values = tf.identity(values)  # `tf.contrib.quantize` stops here
    kernel = UNFOLDED if is_training and is_unfolded else tf.raw_ops.FusedBatchNormV3
    y, *others = kernel(
        x=values,
        scale=tf.ones(size) if gamma is None else gamma,
        offset=tf.zeros(size) if beta is None else beta,
        mean=mean,
        variance=variance,
        epsilon=epsilon,
        data_format=plan.data_format,
        is_training=is_training,
    )
    return (y if image is None else as_before(y, x), *others)
