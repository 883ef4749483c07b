"""Constant statistics, folded into the weights of the linear operation before them.

    gamma * (conv(x, w) + bias - mean) / sqrt(variance + epsilon) + beta
        = conv(x, w * scale) + (beta + (bias - mean) * scale),
    scale = gamma / sqrt(variance + epsilon)

Contract: for the output of a convolution or matrix product, with a bias or without, this
is what `formula.normalize` gives, up to rounding, with no pass over the output but the
one that adds a bias. The product with the weights costs their size, whatever the batch,
unless somebody keeps it. The first operation stays in the graph, where nothing runs it
unless something else needs it.

Source: Jacob et al., "Quantization and Training of Neural Networks", 2017
(arXiv:1712.05877), section 3.2.
"""

from __future__ import annotations

from typing import Callable

import tensorflow.compat.v1 as tf

# How the names of the operations begin that bring a graph its input.
_INPUTS = ("Placeholder", "IteratorGetNext", "QueueDequeue")
_FOLDABLE = ("Conv2D", "DepthwiseConv2dNative", "MatMul")


def why_not_folded(
    x: tf.Tensor, axes: tuple[int, ...], *, once: bool = False
) -> str | None:
    """What keeps `x` from being folded into what made it, in words; None if nothing.

    Weights that are scaled `once`, and kept, must not depend on an input.
    """
    linear, bias = _linear_before(x)
    if linear.type not in _FOLDABLE:
        return f"`x` is made by {linear.type}, and not by one of {', '.join(_FOLDABLE)}"
    if x.dtype.base_dtype not in (tf.float32, tf.float64):
        return f"`x` has dtype {x.dtype.name}, in which folded weights would be rounded"
    if axes != (_output_axis(linear),):
        given = ", ".join(map(str, axes))
        return f"the channels of {linear.type} are on axis {_output_axis(linear)}, not {given}"
    if not once:
        return None
    # An initialiser runs without a feed, and its value would be that of one batch.
    for what, tensor in (("weights", linear.inputs[1]), ("bias", bias)):
        source = _input_behind(tensor) if tensor is not None else None
        if source is not None:
            return f"the {what} depend on {source.name!r}, which changes with each step"
    return None


def _linear_before(x):
    """The operation with the weights that `x` is the result of, and the bias or None."""
    if x.op.type != "BiasAdd":
        return x.op, None
    return x.op.inputs[0].op, x.op.inputs[1]


def _input_behind(weights):
    """An operation that feeds `weights` with what changes in each step, or None."""
    seen, pending = set(), [weights.op]
    while pending:
        operation = pending.pop()
        if operation.type.startswith(_INPUTS):
            return operation
        if operation not in seen:
            seen.add(operation)
            pending += [tensor.op for tensor in operation.inputs]
    return None


def normalize(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    *,
    epsilon: float,
    keep: Callable[[tf.Tensor], tf.Tensor] = tf.convert_to_tensor,
) -> tf.Tensor:
    """As `formula.normalize`, for an `x` of which `why_not_folded` says None.

    Args:
        x, mean, variance, gamma, beta, epsilon: as there, with one channel axis.
        keep: called with the scaled weights, and with the bias, which do not depend on
            the input: returns tensors to take in their place.
    """
    scale = tf.rsqrt(variance + epsilon)
    if gamma is not None:
        scale *= gamma
    linear, bias = _linear_before(x)
    offset = -mean * scale if bias is None else (bias - mean) * scale
    if beta is not None:
        offset += beta
    data_format = "NCHW" if _output_axis(linear) != x.shape.ndims - 1 else "NHWC"
    y = _with_weights(linear, keep(_scaled_weights(linear, scale)))
    return tf.nn.bias_add(y, keep(offset), data_format)


def _output_axis(operation):
    is_middle = (
        operation.type != "MatMul" and operation.get_attr("data_format") == b"NCHW"
    )
    return 1 if is_middle else operation.outputs[0].shape.ndims - 1


def _scaled_weights(operation, scale):
    """The weights of `operation` times `scale`, by output channel."""
    weights = operation.inputs[1]
    if operation.type == "DepthwiseConv2dNative":
        # Its channels are those of the input times a multiplier, in this order.
        scale = tf.reshape(scale, tf.shape(weights)[2:])
    elif operation.type == "MatMul" and operation.get_attr("transpose_b"):
        scale = tf.expand_dims(scale, 1)
    return weights * scale


def _with_weights(operation, weights):
    """The output of `operation` with other weights."""
    definition = operation.op_def
    inputs = [argument.name for argument in definition.input_arg]
    # All as it was, strides and dilations too; T follows from the inputs.
    settings = {
        attribute.name: operation.get_attr(attribute.name)
        for attribute in definition.attr
        if attribute.name != "T"
    }
    settings.update(zip(inputs, (operation.inputs[0], weights)))
    return getattr(tf.raw_ops, operation.type)(**settings)
