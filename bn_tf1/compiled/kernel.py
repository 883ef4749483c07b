"""The output of a layer by the compiled operation, and its gradient.

Contract: the operation and its gradient take everything from their inputs and attributes, so
that a graph can be imported, and differentiated, by another process that has called
`bn_tf1.compiled.load()`. A loss on the statistics themselves has its gradient, too. Second
derivatives are an error.

Source: Ioffe & Szegedy, "Batch Normalization", 2015 (arXiv:1502.03167), section 3.
"""

from __future__ import annotations

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.compiled.library import load
from bn_tf1.statistics import BatchOutput, Plan
from bn_tf1.statistics.registered_gradients import gradient_of

# What is found in a graph.
FORWARD = "BnTf1CompiledBatchNorm"
BACKWARD = "BnTf1CompiledBatchNormGrad"
_SETTINGS = ("axis", "epsilon", "epsilon_rest", "unbiased", "activation")


def normalize_batch(
    x: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    plan: Plan,
    *,
    epsilon: float,
    unbiased: bool,
    activation: str | None = None,
    residual: tf.Tensor | None = None,
) -> BatchOutput:
    """activation(normalised x + residual) with the statistics of the batch, and these.

    Args:
        x: float tensor of known rank.
        gamma, beta: tensors of the dtype of the statistics and of shape [channels], or None
            for 1 and 0.
        plan: for `x`, with one channel axis.
        epsilon: added to the variance; in the unit of the variance.
        unbiased: which variance is returned; the output always uses the biased one.
        activation: "relu", "relu6" or None.
        residual: tensor like `x`, or None for 0.
    """
    # Ones and zeros, rather than a variant of the operation for each: they cost nothing.
    size = [tf.dimension_value(x.shape[plan.axes[0]])]
    # An attribute is a float32; float64 inputs take the rest of the digits, too.
    rounded = float(np.float32(epsilon))
    y, mean, variance, _ = load().bn_tf1_compiled_batch_norm(
        x=x,
        gamma=tf.ones(size, plan.dtype) if gamma is None else gamma,
        beta=tf.zeros(size, plan.dtype) if beta is None else beta,
        residual=[] if residual is None else [residual],
        axis=plan.axes[0],
        epsilon=rounded,
        epsilon_rest=epsilon - rounded,
        unbiased=unbiased,
        activation=activation or "none",
    )
    return BatchOutput(y, mean, variance)


@gradient_of(FORWARD)
def _gradient(operation, dy, dmean, dvariance, _):
    x, gamma, beta, *residuals = operation.inputs
    # From the node alone, which may have been imported from a file.
    settings = {name: operation.get_attr(name) for name in _SETTINGS}
    is_masked = settings["activation"] != b"none"
    # Where nothing is on the statistics, TensorFlow passes zeros that are made like them.
    is_direct = dmean.op.type == dvariance.op.type == "ZerosLike"
    dx, dgamma, dbeta, through = load().bn_tf1_compiled_batch_norm_grad(
        dy=dy,
        x=x,
        gamma=gamma,
        beta=beta,
        kept=operation.outputs[3],
        # With a residual, x alone does not tell what the activation passed on.
        y=[operation.outputs[0]] if residuals and is_masked else [],
        dmoments=[] if is_direct else [dmean, dvariance],
        **settings,
    )
    return [dx, dgamma, dbeta, *[*through, dy][: len(residuals)]]


# TensorFlow's own error, that there is no gradient, would not tell what to do.
@gradient_of(BACKWARD)
def _second_gradient(operation, *_):
    raise ValueError(
        f"{operation.name} has no gradient: kernel='compiled' has first derivatives alone; "
        "for second ones use kernel='composed'"
    )
