"""Normalises with variables that are given, and keeps their statistics up to date.

    is_training   output normalised with   moving statistics
    True          batch statistics         updated (see `update`)
    False         moving statistics        not touched, no moments in the graph
    bool tensor   either, at run time      updated when it is true, otherwise left
                                           bit for bit as they are

This is what every layer of the library has in common, whatever its variables are
called and however its arguments are spelled.

Sources: Ioffe & Szegedy, "Batch Normalization", 2015 (arXiv:1502.03167); those of
`bn_tf1.statistics` for weighted, ghost-batch and renormalised statistics.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, NamedTuple, Sequence

import tensorflow.compat.v1 as tf

from bn_tf1 import statistics
from bn_tf1.control_flow import inside_of_control_flow, may_switch, switch
from bn_tf1.moving_averages import (
    applied_rate,
    assign_moving_value,
    update_moving_average,
)
from bn_tf1.records import BatchNormCall, record_call


class LayerVariables(NamedTuple):
    """The variables of a layer: float32, or float64 for float64 inputs.

    Their shape is [channels], or that with sizes of 1 for the axes in between, such as
    [1, 1, 1, channels].

    Attributes:
        gamma, beta: None for 1 and 0.
        moving_mean, moving_variance: never None.
        moving_stddev, renorm_mean, renorm_stddev: None without renormalisation.
    """

    gamma: Any
    beta: Any
    moving_mean: Any
    moving_variance: Any
    moving_stddev: Any = None
    renorm_mean: Any = None
    renorm_stddev: Any = None


class _Options(NamedTuple):
    """What `_normalize` takes from the arguments of `normalize_and_update`."""

    layer: str
    axis: Any
    epsilon: float
    ema_variance: str
    trainable: Any
    weights: Any
    ghost_batch_size: Any
    renorm: Any
    adjustment: Any
    kernel: str
    fold: Any


def normalize_and_update(
    x: tf.Tensor,
    is_training: bool | tf.Tensor,
    variables: LayerVariables,
    *,
    layer: str,
    axis: int | tuple[int, ...],
    decay: float | tf.Tensor,
    epsilon: float,
    zero_debias: Sequence[str],
    ema_variance: str,
    update: str,
    updates_collection: Any,
    skip_nonfinite: bool,
    rate: tf.Tensor | None,
    kernel: str = "auto",
    trainable: bool | tf.Tensor = True,
    weights: tf.Tensor | None = None,
    ghost_batch_size: int | None = None,
    renorm: statistics.Renormalization | None = None,
    adjustment: Callable | None = None,
    fold: bool | str = False,
) -> tf.Tensor:
    """The output of a layer; makes and records its updates.

    Its arguments are those of `batch_norm`, checked, and:

    Args:
        variables: the layer's variables.
        layer: the layer's variable scope, for errors and records.
        axis: the channel axis, or several of them.
        zero_debias: which of "moving_mean" and "moving_variance" are bias-corrected.
        updates_collection: a collection, or a list of them.
        rate: what `update_rate` gave for `decay`, made just before; None makes no
            updates.
        trainable: a scalar bool tensor switches the gradients of gamma and beta, and
            the updates, at run time. Whether the variables are trainable is theirs.

    Returns:
        A tensor of the shape and dtype of `x`.
    """
    options = _Options(
        layer,
        axis,
        epsilon,
        ema_variance,
        trainable,
        weights,
        ghost_batch_size,
        renorm,
        adjustment,
        kernel,
        fold,
    )
    # A scope of its own leaves the names of the layer's to the output and the updates.
    with tf.name_scope("normalize"):
        normalized = _normalize(x, variables, is_training, options)
    updates = ()
    if rate is not None:
        apply = _and(is_training, trainable)
        if skip_nonfinite:
            apply = _and(apply, _all_finite(normalized))
        updates = _update_operations(
            variables, normalized, decay, rate, zero_debias, renorm, epsilon, apply
        )
    y = _with_updates(normalized.y, updates, update, updates_collection)
    in_batch = is_training is not False
    record_call(
        BatchNormCall(
            name=layer,
            gamma=variables.gamma,
            beta=variables.beta,
            moving_mean=variables.moving_mean,
            moving_variance=variables.moving_variance,
            batch_mean=normalized.mean if in_batch else None,
            batch_variance=normalized.variance if in_batch else None,
            updates=updates,
        )
    )
    return y


def _with_updates(y, updates, update, updates_collection):
    """`y`, which takes the updates along unless a collection does."""
    if update == "collection":
        for operation in updates:
            tf.add_to_collections(updates_collection, operation)
    elif updates:
        with tf.control_dependencies(updates):
            return tf.identity(y)
    return y


def _normalize(x, variables, is_training, options):
    """A `statistics.BatchOutput`, of the moving statistics in inference."""
    kernel, dtype = _kernel(x, options), x.dtype
    # All that needs a gradient is cast and read outside of the cond: TensorFlow 1.15
    # gives none to bfloat16 tensors that enter it, and fails for resource variables
    # that are read in it, if it is itself in a loop.
    if kernel == "composed" and is_training is not False:
        x = tf.cast(x, statistics.statistics_dtype(x.dtype))
    channels = [
        tf.dimension_value(x.shape[a])
        for a in statistics.channel_axes(x.shape.ndims, options.axis)
    ]
    gamma, beta = (
        None
        if variable is None
        else _passing_gradient(_read(variable, channels), options.trainable)
        for variable in (variables.gamma, variables.beta)
    )

    def with_batch_statistics(x, gamma, beta, *_):
        if _is_plain(options):
            return _plain(x, gamma, beta, kernel, is_training, options)
        return _with_own_statistics(
            x, gamma, beta, variables, channels, is_training, options
        )

    def with_moving_statistics(x, gamma, beta, mean, variance):
        normalize = functools.partial(statistics.normalize_constant, axis=options.axis)
        if options.fold:
            normalize = statistics.normalize_folded
        if options.fold == "once":
            normalize = functools.partial(normalize, keep=_keep)
        y = normalize(x, mean, variance, gamma, beta, epsilon=options.epsilon)
        return statistics.BatchOutput(y, mean, variance)

    def moving():
        return [
            _read(variable, channels)
            for variable in (variables.moving_mean, variables.moving_variance)
        ]

    normalized = _by_mode(
        is_training,
        with_batch_statistics,
        with_moving_statistics,
        [x, gamma, beta],
        moving,
        _is_plain(options),
    )
    normalized.y.set_shape(x.shape)
    return normalized._replace(y=tf.cast(normalized.y, dtype))


def _by_mode(is_training, with_batch, with_moving, inputs, moving, takes_inputs_alone):
    """Builds what `is_training` asks for: one of the two, or both and a switch.

    Args:
        with_batch, with_moving: functions of `inputs`; of those and what `moving` reads.
        takes_inputs_alone: whether `with_batch` reads no other tensor.
    """
    if is_training is True:
        return with_batch(*inputs)
    if is_training is False:
        return with_moving(*inputs, *moving())
    if takes_inputs_alone and may_switch():
        outputs = switch(is_training, with_batch, with_moving, [*inputs, *moving()])
    else:
        outputs = tf.cond(
            is_training,
            lambda: with_batch(*inputs),
            lambda: with_moving(*inputs, *moving()),
        )
    return statistics.BatchOutput(*outputs)


def _keep(value):
    """A local variable that starts as `value`: whoever initialises it computes that."""
    if inside_of_control_flow():
        raise ValueError(
            "`fold` is 'once', but the layer is built inside of a tf.cond, "
            "tf.while_loop or function body, where no variable can be initialised from "
            "others; use fold=True"
        )
    return tf.convert_to_tensor(
        tf.Variable(
            value,
            trainable=False,
            collections=[tf.GraphKeys.LOCAL_VARIABLES],
            name="folded",
        )
    )


def _is_plain(options):
    """Whether the statistics and the output are those of the whole batch."""
    rich = (options.weights, options.ghost_batch_size, options.renorm)
    return rich == (None, None, None) and options.adjustment is None


def _kernel(x, options):
    if _is_plain(options):
        return statistics.choose_kernel(
            options.kernel, x, options.axis, options.epsilon
        )
    if options.kernel == "fused":
        raise ValueError(
            "`kernel` is 'fused', but the fused kernel has no weights, ghost batches, "
            "renormalisation or adjustment; use kernel='auto' or 'composed'"
        )
    return "composed"


def _plain(x, gamma, beta, kernel, is_training, options):
    axes = statistics.reduction_axes(x.shape.ndims, options.axis)
    return statistics.normalize_batch(
        _with_several_values(x, axes, options.layer, is_training),
        gamma,
        beta,
        kernel=kernel,
        axis=options.axis,
        epsilon=options.epsilon,
        unbiased=options.ema_variance == "unbiased",
    )


def _with_own_statistics(x, gamma, beta, variables, channels, is_training, options):
    """With weighted, ghost-batch or renormalised statistics, or an adjustment."""
    batch, axis, weights = x, options.axis, None
    size = options.ghost_batch_size
    if size is not None:
        # A second axis counts the ghost batches, as one more of the channel axes.
        channel_axes = statistics.channel_axes(x.shape.ndims, axis)
        axis = (1,) + tuple(a + 1 for a in channel_axes)
        batch = statistics.split_ghost_batches(x, size, layer=options.layer)
    axes = statistics.reduction_axes(batch.shape.ndims, axis)
    batch = _with_several_values(batch, axes, options.layer, is_training)
    if options.weights is None:
        moments = statistics.batch_moments(batch, axes)
    else:
        weights = statistics.weights_like(x, options.weights)
        moments = statistics.weighted_moments(batch, axes, weights)
    averaged = _averaged_statistics(moments, options)
    correction = None
    if options.renorm is not None:
        correction = _correction(averaged, variables, channels, options)
        # The updates of what it read must wait for it.
        with tf.control_dependencies(correction):
            averaged = tuple(tf.identity(statistic) for statistic in averaged)
    y = _output(batch, moments, weights, gamma, beta, correction, axis, options)
    if size is not None:
        y = statistics.join_ghost_batches(y, like=x)
    return statistics.BatchOutput(y, *averaged)


def _averaged_statistics(moments, options):
    """The mean and the variance that enter the moving averages, [channels]."""
    mean, variance = moments.mean, moments.variance
    if options.ema_variance == "unbiased":
        variance = statistics.unbiased_variance(moments)
    if options.ghost_batch_size is not None:
        mean, variance = tf.reduce_mean(mean, 0), tf.reduce_mean(variance, 0)
    return mean, variance


def _correction(averaged, variables, channels, options):
    mean, variance = averaged
    return statistics.renorm_correction(
        mean,
        tf.sqrt(variance + options.epsilon),
        _read(variables.renorm_mean, channels),
        _read(variables.renorm_stddev, channels),
        renorm=options.renorm,
        epsilon=options.epsilon,
    )


def _output(batch, moments, weights, gamma, beta, correction, axis, options):
    def normalize(scale, offset):
        if options.ghost_batch_size is not None:
            scale, offset = (
                None if values is None else values * tf.ones_like(moments.mean)
                for values in (scale, offset)
            )
        return statistics.normalize_with_moments(
            batch,
            moments,
            scale,
            offset,
            axis=axis,
            epsilon=options.epsilon,
            weights=weights,
        )

    if options.adjustment is not None:
        y = normalize(*(correction or (None, None)))
        scale, offset = options.adjustment(tf.shape(batch))
        y = y * tf.cast(scale, y.dtype) + tf.cast(offset, y.dtype)
        y.set_shape(batch.shape)
        return statistics.scale_and_shift(y, gamma, beta, axis=axis)
    if correction is None:
        return normalize(gamma, beta)
    scale, offset = correction
    if gamma is not None:
        scale, offset = scale * gamma, offset * gamma
    return normalize(scale, offset if beta is None else offset + beta)


def _passing_gradient(value, trainable):
    """`value`, which passes a gradient when `trainable` is true."""
    if isinstance(trainable, bool):
        return value
    return tf.where_v2(trainable, value, tf.stop_gradient(value))


def _read(variable, shape):
    """The value of a variable, without the sizes of 1 that it may have in between."""
    value = tf.convert_to_tensor(variable)
    return value if value.shape.as_list() == shape else tf.reshape(value, shape)


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
    # Of this very tensor even if it is known: the check must not run without `x`.
    shape = tf.raw_ops.Shape(input=x)
    several = tf.not_equal(tf.reduce_prod(tf.gather(shape, list(axes))), 1)
    message = problem + ", but batch statistics need 2 or more; shape of `x`:"
    with tf.control_dependencies([tf.Assert(several, [message, shape])]):
        return tf.identity(x)


def _and(one, other):
    """one and other: True, or scalar bool tensors. A False of Python counts as True:
    there is nothing to switch at run time."""
    if isinstance(other, bool):
        return one
    return other if one is True else tf.logical_and(one, other)


def _all_finite(normalized):
    # The variance is made of distances from the mean: finite only if that is.
    return tf.reduce_all(tf.is_finite(normalized.variance))


def _update_operations(
    variables, normalized, decay, rate, zero_debias, renorm, epsilon, apply
):
    mean, variance = normalized.mean, normalized.variance
    rate = applied_rate(rate, apply)

    def update(key, batch, decay=decay, rate=rate):
        moving = getattr(variables, key)
        if moving.shape.ndims != batch.shape.ndims:
            batch = tf.reshape(batch, moving.shape)
        return update_moving_average(
            moving, batch, decay, apply=apply, zero_debias=key in zero_debias, rate=rate
        )

    if renorm is None:
        return update("moving_mean", mean), update("moving_variance", variance)
    stddev = tf.sqrt(variance + epsilon)
    # Whoever runs either of the two operations updates these, too.
    with tf.control_dependencies(
        [
            update("renorm_mean", mean, renorm.decay, None),
            update("renorm_stddev", stddev, renorm.decay, None),
        ]
    ):
        mean, stddev = tf.identity(mean), tf.identity(stddev)
    with tf.control_dependencies([update("moving_stddev", stddev)]):
        squared = tf.square(variables.moving_stddev.read_value())
    return update("moving_mean", mean), assign_moving_value(
        variables.moving_variance, tf.nn.relu(squared - epsilon), apply=apply
    )
