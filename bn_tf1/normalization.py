"""Normalises with variables that are given, and keeps their statistics up to date.

    is_training   output normalised with   moving statistics
    True          batch statistics         updated (see `update`)
    False         moving statistics        not touched, no moments in the graph
    bool tensor   either, at run time      updated when it is true, otherwise left
                                           bit for bit as they are

This is what every layer of the library has in common, whatever its variables are
called and however its arguments are spelled.

Source: Ioffe & Szegedy, "Batch Normalization", 2015 (arXiv:1502.03167).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow.compat.v1 as tf

from bn_tf1 import statistics
from bn_tf1.calls import BatchNormCall, record_call
from bn_tf1.moving_averages import update_moving_average


class LayerVariables(NamedTuple):
    """The variables of a layer: float32, or float64 for float64 inputs.

    Their shape is [channels], or that with sizes of 1 for the axes in between, such as
    [1, 1, 1, channels].

    Attributes:
        gamma, beta: None for 1 and 0.
        moving_mean, moving_variance: never None.
    """

    gamma: Any
    beta: Any
    moving_mean: Any
    moving_variance: Any


class _Normalized(NamedTuple):
    """The output, and the statistics that the moving averages shall take in."""

    y: tf.Tensor
    mean: tf.Tensor
    variance: tf.Tensor


def normalize_and_update(
    x: tf.Tensor,
    is_training: bool | tf.Tensor,
    variables: LayerVariables,
    *,
    layer: str,
    axis: int | tuple[int, ...],
    decay: float | tf.Tensor,
    epsilon: float,
    zero_debias: bool,
    ema_variance: str,
    update: str,
    updates_collection: str,
    skip_nonfinite: bool,
) -> tf.Tensor:
    """The output of a layer; makes and records its updates.

    Its arguments are those of `batch_norm`, checked, and:

    Args:
        variables: the layer's variables.
        layer: the layer's variable scope, for errors and records.
        axis: the channel axis, or several of them.

    Returns:
        A tensor of the shape and dtype of `x`.
    """
    normalized = _normalize(
        x, variables, is_training, axis, epsilon, ema_variance, layer
    )
    y = normalized.y
    updates = ()
    if update != "skip" and is_training is not False:
        updates = _update_operations(
            variables, normalized, is_training, decay, zero_debias, skip_nonfinite
        )
    if updates and update == "collection":
        for operation in updates:
            tf.add_to_collection(updates_collection, operation)
    elif updates:
        with tf.control_dependencies(updates):
            y = tf.identity(y)
    in_batch = is_training is not False
    record_call(
        BatchNormCall(
            name=layer,
            batch_mean=normalized.mean if in_batch else None,
            batch_variance=normalized.variance if in_batch else None,
            updates=updates,
            **variables._asdict(),
        )
    )
    return y


def _normalize(x, variables, is_training, axis, epsilon, ema_variance, layer):
    axes = statistics.reduction_axes(x.shape.ndims, axis)
    # All that needs a gradient is cast and read outside of the cond: TensorFlow 1.15
    # gives none to bfloat16 tensors that enter it, and fails for resource variables
    # that are read in it, if it is itself in a loop.
    x, dtype = tf.cast(x, statistics.statistics_dtype(x.dtype)), x.dtype
    channels = [
        tf.dimension_value(x.shape[a])
        for a in statistics.channel_axes(x.shape.ndims, axis)
    ]
    gamma, beta = (
        None if variable is None else _read(variable, channels)
        for variable in (variables.gamma, variables.beta)
    )

    def output(inputs, mean, variance):
        return statistics.normalize(
            inputs, mean, variance, gamma, beta, axis=axis, epsilon=epsilon
        )

    def with_batch_statistics():
        inputs = _with_several_values(x, axes, layer, is_training)
        moments = statistics.batch_moments(inputs, axes)
        averaged = moments.variance
        if ema_variance == "unbiased":
            averaged = statistics.unbiased_variance(moments)
        y = output(inputs, moments.mean, moments.variance)
        return _Normalized(y, moments.mean, averaged)

    def with_moving_statistics():
        mean = _read(variables.moving_mean, channels)
        variance = _read(variables.moving_variance, channels)
        return _Normalized(output(x, mean, variance), mean, variance)

    if is_training is True:
        normalized = with_batch_statistics()
    elif is_training is False:
        normalized = with_moving_statistics()
    else:
        normalized = _Normalized(
            *tf.cond(is_training, with_batch_statistics, with_moving_statistics)
        )
        normalized.y.set_shape(x.shape)
    return normalized._replace(y=tf.cast(normalized.y, dtype))


def _read(variable, shape):
    """The value of a variable, without the sizes of 1 that it may have in between."""
    if variable.shape.as_list() == shape:
        return tf.identity(variable)
    return tf.reshape(variable, shape)


def _with_several_values(x, axes, layer, is_training):
    """`x`, once it is sure that a channel has not just one value.

    The variance of one value is 0, and the output beta, whatever the input.
    """
    count = statistics.static_count(x.shape, axes)
    problem = f"one value per channel in the training batch of layer {layer!r}"
    if count == 1 and is_training is True:
        raise ValueError(
            f"`x` has shape {x.shape}: {problem}, but batch statistics need 2 or "
            "more; use a larger batch or is_training=False"
        )
    sizes = [tf.dimension_value(x.shape[a]) for a in axes]
    if count != 1 and any(size is not None and size > 1 for size in sizes):
        return x  # an unknown size makes N a multiple of this one
    shape = tf.shape(x)
    several = tf.not_equal(tf.reduce_prod(tf.gather(shape, list(axes))), 1)
    message = problem + ", but batch statistics need 2 or more; shape of `x`:"
    with tf.control_dependencies([tf.Assert(several, [message, shape])]):
        return tf.identity(x)


def _update_operations(
    variables, normalized, is_training, decay, zero_debias, skip_nonfinite
):
    apply = is_training
    if skip_nonfinite:
        finite = tf.reduce_all(
            tf.is_finite(tf.concat([normalized.mean, normalized.variance], 0))
        )
        apply = finite if apply is True else tf.logical_and(apply, finite)

    def update(moving, batch):
        if moving.shape.ndims != batch.shape.ndims:
            batch = tf.reshape(batch, moving.shape)
        return update_moving_average(
            moving, batch, decay, apply=apply, zero_debias=zero_debias
        )

    return (
        update(variables.moving_mean, normalized.mean),
        update(variables.moving_variance, normalized.variance),
    )
