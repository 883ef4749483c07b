"""Statistics of a batch that are not those of all its values alike, and their output.

Weighted, in ghost batches, renormalised, joint with other batches, or with an adjustment.

Contract: where there is no value, or no weight at all, the moving statistics take the place
of those of the batch, and nothing becomes NaN.

Sources: those of `bn_tf1.statistics`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1 import statistics
from bn_tf1.arguments import Arguments
from bn_tf1.control_flow import each


class MovingValues(NamedTuple):
    """The values of the moving statistics, [channels] each; None for what is not needed."""

    mean: Any = None
    variance: Any = None
    renorm_mean: Any = None
    renorm_stddev: Any = None


def normalize_by_special_statistics(
    x: Any,
    gamma: Any,
    beta: Any,
    moving: MovingValues,
    arguments: Arguments,
    layer: str,
) -> statistics.BatchOutput:
    """With joint, weighted, ghost-batch or renormalised statistics, or an adjustment."""
    if arguments.sync is not None or arguments.towers:
        return _with_joint_statistics(x, gamma, beta, moving, arguments, layer)
    batch, axes, weights = x, arguments.plan.axes, arguments.weights
    size = arguments.ghost_batch_size
    if size is not None:
        # A second axis counts the ghost batches, as one more of the channel axes.
        batch = statistics.split_ghost_batches(x, size, layer=layer)
        axes = (1, *(a + 1 for a in axes))
    checks = checks_of_several_values(batch, axes, layer, arguments.is_training)
    if checks:
        with tf.control_dependencies(checks):
            batch = tf.identity(batch)
    channels = statistics.channels_for_arithmetic(batch, axes)
    if weights is None:
        moments = statistics.batch_moments(batch, channels)
    else:
        weights = statistics.weights_like(x, weights)
        moments = statistics.weighted_moments(batch, channels, weights)
    count = moments.count
    if size is None:
        moments = _or_moving(moments, count, moving)
    else:
        count = statistics.count_of(x, arguments.plan.axes)
    averaged, correction = _averaged_statistics(moments, count, moving, arguments)
    y = _output(batch, moments, channels, gamma, beta, weights, correction, arguments)
    if size is not None:
        y = statistics.join_ghost_batches(y, like=x)
    return _batch_output(y, averaged, count, arguments)


def checks_of_several_values(
    x: tf.Tensor, axes: tuple[int, ...], layer: str, is_training: Any
) -> list[tf.Operation]:
    """What fails at run time where a channel has just one value; none if that is known.

    The variance of one value is 0, and the output beta, whatever the input.
    """
    reduced = [a for a in range(x.shape.ndims) if a not in axes]
    sizes = [tf.dimension_value(x.shape[a]) for a in reduced]
    count = None if None in sizes else int(np.prod(sizes))
    problem = (
        f"one value per channel in the training batch of layer {layer!r}, but batch "
        "statistics need 2 or more; use a larger batch or is_training=False"
    )
    if count == 1 and is_training is True:
        raise ValueError(f"`x` has shape {x.shape}: {problem}")
    if count != 1 and any(size is not None and size > 1 for size in sizes):
        return []  # an unknown size makes N a multiple of this one
    # Of this very tensor even if it is known: the check must not run without `x`.
    shape = tf.raw_ops.Shape(input=x)
    several = tf.not_equal(tf.reduce_prod(tf.gather(shape, reduced)), 1)
    return [tf.Assert(several, [problem + ". Shape of `x`:", shape])]


def _with_joint_statistics(x, gamma, beta, moving, arguments, layer):
    """With those of several towers, or workers, or both."""
    weights = arguments.weights
    if weights is not None:
        weights = statistics.weights_like(x, weights)

    def channels_of(tower):
        return statistics.channels_for_arithmetic(tower, arguments.plan.axes)

    moments = each(lambda t: statistics.part_moments(t, channels_of(t), weights), x)
    # The towers first: what goes over the network is then one row for each worker.
    if arguments.towers:
        moments = statistics.joint_of(moments)
    if arguments.sync is not None:
        moments = arguments.sync.joint_moments(moments)
    if not _has_values(arguments, least=2):
        moments = _of_several_values(moments, layer)
    count = moments.count
    if not _has_values(arguments):
        moments = _or_moving(moments, count, moving)
    averaged, correction = _averaged_statistics(moments, count, moving, arguments)
    operands = gamma, beta, weights, correction, arguments
    y = each(lambda tower: _output(tower, moments, channels_of(tower), *operands), x)
    return _batch_output(y, averaged, count, arguments)


def may_lack_values(arguments: Arguments) -> bool:
    """Whether statistics of its own may be those of no value, or no weight, at all."""
    several = arguments.weights is not None or arguments.sync is not None
    unknown = not arguments.plan.count or arguments.towers > 0
    return not arguments.is_plain and (several or unknown)


def _has_values(arguments, least=1):
    """Whether so many are known when the graph is built: here, whatever others have.

    All workers wait for what stands between two layers: what can be left out is.
    """
    if arguments.weights is not None or arguments.towers:
        return False
    return (arguments.plan.count or 0) >= least


def _batch_output(y, averaged, count, arguments):
    mean, variance = averaged
    if not may_lack_values(arguments):
        count = None
    elif not tf.is_tensor(count):
        count = tf.constant(count, mean.dtype)
    return statistics.BatchOutput(y, mean, variance, count)


def _or_moving(moments, count, moving):
    """`moments`, or the moving statistics where `count` is 0."""
    if isinstance(count, int) and count:
        return moments
    mean, variance = (
        _where_some(count, own, tf.stop_gradient(other))
        for own, other in zip(moments[:2], moving[:2])
    )
    return moments._replace(mean=mean, variance=variance)


def _where_some(count, values, otherwise):
    some = tf.convert_to_tensor(count, values.dtype) > 0
    return tf.where_v2(some, values, otherwise)


def _averaged_statistics(moments, count, moving, arguments):
    """What enters the moving averages, [channels] each, and the renormalisation or None."""
    mean, variance = moments.mean, moments.variance
    if arguments.ema_variance == "unbiased":
        variance = statistics.unbiased_variance(moments)
    if arguments.ghost_batch_size is not None:
        # One update a step: one for each ghost batch would forget the past as many times
        # as fast, and depend on how many there are.
        mean, variance = tf.reduce_mean(mean, 0), tf.reduce_mean(variance, 0)
    if not _has_values(arguments):
        averaged = statistics.Moments(mean, variance, count)
        mean, variance, _ = _or_moving(averaged, count, moving)
    if arguments.renorm is None:
        return (mean, variance), None
    correction = statistics.renorm_correction(
        mean,
        tf.sqrt(variance + arguments.epsilon),
        moving.renorm_mean,
        moving.renorm_stddev,
        renorm=arguments.renorm,
        epsilon=arguments.epsilon,
    )
    if not isinstance(count, int):
        # Where the moving statistics are taken, there is nothing left to correct.
        correction = [_where_some(count, *pair) for pair in zip(correction, (1.0, 0.0))]
    # The updates of what it read must wait for it.
    with tf.control_dependencies(correction):
        return (tf.identity(mean), tf.identity(variance)), correction


def _output(batch, moments, channels, gamma, beta, weights, correction, arguments):
    def normalize(scale, offset):
        if arguments.ghost_batch_size is not None:
            # One row for each ghost batch, as the statistics have.
            scale, offset = (
                None if values is None else values * tf.ones_like(moments.mean)
                for values in (scale, offset)
            )
        operands = batch, moments, scale, offset, channels
        if arguments.sync is not None or arguments.towers:
            return statistics.normalize_part(*operands, epsilon=arguments.epsilon)
        return statistics.normalize_with_moments(
            *operands, epsilon=arguments.epsilon, weights=weights
        )

    if arguments.adjustment is not None:
        # It comes before gamma and beta, which then cannot be in the kernel's one pass.
        y = normalize(*(correction or (None, None)))
        scale, offset = arguments.adjustment(tf.shape(batch))
        y = y * tf.cast(scale, y.dtype) + tf.cast(offset, y.dtype)
        y.set_shape(batch.shape)
        return statistics.scale_and_shift(y, gamma, beta, axes=channels.axes)
    if correction is None:
        return normalize(gamma, beta)
    scale, offset = correction
    if gamma is not None:
        scale, offset = scale * gamma, offset * gamma
    return normalize(scale, offset if beta is None else offset + beta)


def _of_several_values(moments, layer):
    """`moments` of several batches, once it is sure that they are not of one value."""
    message = (
        f"one value per channel in all training batches of layer {layer!r}, but batch "
        "statistics need 2 or more; use larger batches or is_training=False"
    )
    several = tf.Assert(tf.not_equal(moments.count, 1), [message])
    with tf.control_dependencies([several]):
        return moments._replace(mean=tf.identity(moments.mean))
