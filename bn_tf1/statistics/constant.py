"""The output for constant statistics, by the fastest of three ways.

Contract: what `formula.normalize` gives, up to rounding; the mean and the variance get no
gradient.
"""

from __future__ import annotations

import tensorflow.compat.v1 as tf

from bn_tf1.statistics import composed, formula, fused
from bn_tf1.statistics.plan import Plan


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
    """gamma * (x - mean) / sqrt(variance + epsilon) + beta, channel by channel.

    The arguments are those of `formula.normalize`, and the plan for `x`.
    """
    operands = x, mean, variance, gamma, beta
    if plan.constant == "fused":
        return fused.normalize(*operands, plan, epsilon=epsilon)
    if plan.constant == "composed":
        return composed.normalize_fixed(*operands, plan.channels, epsilon=epsilon)
    return formula.normalize(*operands, axes=plan.axes, epsilon=epsilon)
