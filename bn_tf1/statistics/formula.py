"""The output of batch normalization, for constant statistics, and what follows it.

    y = gamma * (x - mean) / sqrt(variance + epsilon) + beta
    activation(y + residual)

Contract: computed in the dtype of the statistics, returned in the dtype of `x`. The
mean is subtracted before anything is scaled, so a mean hundreds of times larger than
the deviation costs no precision.

Source: Ioffe & Szegedy, "Batch Normalization", 2015 (arXiv:1502.03167), algorithm 1.
"""

from __future__ import annotations

import tensorflow.compat.v1 as tf

from bn_tf1.statistics import composed, fused
from bn_tf1.statistics.channels import along
from bn_tf1.statistics.plan import Plan

ACTIVATIONS = {"relu": tf.nn.relu, "relu6": tf.nn.relu6}


def normalize(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    *,
    axes: tuple[int, ...],
    epsilon: float,
) -> tf.Tensor:
    """gamma * (x - mean) / sqrt(variance + epsilon) + beta, channel by channel.

    Args:
        x: float tensor of known rank.
        mean, variance: float32 tensors (float64 for float64 `x`) of the shape that `x`
            has on its channel axes, [channels] for one axis. At most one of several
            sizes may be unknown.
        gamma, beta: tensors like `mean`, or None for 1 and 0.
        axes: the channel axes of `x`, ascending and not negative.
        epsilon: added to the variance; in the unit of the variance.

    Returns:
        A tensor of the shape and dtype of `x`, computed in the dtype of `mean`.
    """
    scale = tf.rsqrt(variance + epsilon)
    if gamma is not None:
        scale *= gamma

    # x - mean is exact for near numbers (Sterbenz); x * scale - mean * scale is not.
    y = tf.cast(x, mean.dtype) - along(mean, x.shape, axes)
    return tf.cast(scale_and_shift(y, scale, beta, axes=axes), x.dtype)


def normalize_constant(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    plan: Plan,
    *,
    epsilon: float,
) -> tf.Tensor:
    """As `normalize`, up to rounding, in the way that the plan for `x` has for it.

    The mean and the variance get no gradient.
    """
    operands = x, mean, variance, gamma, beta
    if plan.constant == "fused":
        how = {"image": plan.constant_image, "epsilon": epsilon, "is_training": False}
        return fused.outputs_of_kernel(*operands, plan, **how)[0]
    if plan.constant == "composed":
        return composed.normalize_fixed(*operands, plan.channels, epsilon=epsilon)
    return normalize(*operands, axes=plan.axes, epsilon=epsilon)


def scale_and_shift(
    y: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    *,
    axes: tuple[int, ...],
) -> tf.Tensor:
    """gamma * y + beta, channel by channel, for arguments as `normalize` takes them."""
    if gamma is not None:
        y *= along(gamma, y.shape, axes)
    if beta is not None:
        y += along(beta, y.shape, axes)
    return y


def activated(
    y: tf.Tensor, residual: tf.Tensor | None, activation: str | None
) -> tf.Tensor:
    """activation(y + residual), with TensorFlow's own operations, in the dtype of `y`.

    Args:
        y: the normalised values.
        residual: tensor of the shape and dtype of `y`, or None for 0.
        activation: one of `ACTIVATIONS`, or None for the sum itself.
    """
    # In the dtype of `y`, as code that adds and activates after the layer does it.
    if residual is not None:
        y += residual
    return y if activation is None else ACTIVATIONS[activation](y)
