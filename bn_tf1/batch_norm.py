"""The graph builder: variables, mode, statistics, output, updates.

    is_training   output normalised with   moving statistics
    True          batch statistics         updated (see `update`)
    False         moving statistics        not touched, no moments in the graph
    bool tensor   either, at run time      updated when it is true, otherwise left
                                           bit for bit as they are

    y      = gamma * (x - mean) / sqrt(variance + epsilon) + beta
    moving = moving - (1 - decay) * (moving - batch)

Source: Ioffe & Szegedy, "Batch Normalization", 2015 (arXiv:1502.03167).
"""

from __future__ import annotations

import numbers
from typing import Any, Callable, Mapping, NamedTuple

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1 import statistics
from bn_tf1.calls import BatchNormCall, record_call
from bn_tf1.moving_averages import UPDATE_OPS_COLLECTION, update_moving_average

_INITIALIZERS = {
    "gamma": tf.ones_initializer,
    "beta": tf.zeros_initializer,
    "moving_mean": tf.zeros_initializer,
    "moving_variance": tf.ones_initializer,
}
_FLOATS = (tf.float16, tf.bfloat16, tf.float32, tf.float64)
_EMA_VARIANCES = ("biased", "unbiased")
_UPDATES = ("collection", "in_place", "skip")


class _Variables(NamedTuple):
    gamma: Any
    beta: Any
    moving_mean: Any
    moving_variance: Any


class _Normalized(NamedTuple):
    """The output, and the statistics that the moving averages shall take in."""

    y: tf.Tensor
    mean: tf.Tensor
    variance: tf.Tensor


def batch_norm(
    x: tf.Tensor,
    is_training: bool | tf.Tensor,
    *,
    axis: int = -1,
    decay: float | tf.Tensor = 0.99,
    epsilon: float = 1e-3,
    center: bool = True,
    scale: bool = True,
    initializers: Mapping[str, Callable] | None = None,
    regularizers: Mapping[str, Callable] | None = None,
    trainable: bool = True,
    zero_debias: bool = False,
    ema_variance: str = "biased",
    update: str = "collection",
    updates_collection: str = UPDATE_OPS_COLLECTION,
    skip_nonfinite: bool = True,
    name: str | None = None,
    reuse: Any = None,
) -> tf.Tensor:
    """Normalises `x` per channel, over all its other axes.

    Creates the variables `gamma`, `beta`, `moving_mean` and `moving_variance`, of
    shape [channels], under the variable scope `name`. They are float32, or float64
    for float64 `x`; so are the statistics.

    Three switches of fine-tuning are independent: `is_training` chooses the
    statistics to normalise with, `update` whether the moving ones follow,
    `trainable` whether gamma and beta are trained. A frozen layer is
    `is_training=False, trainable=False`.

    Args:
        x: float16, bfloat16, float32 or float64 tensor of known rank, 2 or more, with
            a known number of channels; all other sizes may be unknown.
        is_training: a Python bool builds one branch; a scalar bool tensor or variable
            builds a `tf.cond` that computes the moments when it is true only.
        axis: the channel axis, in [-rank, rank).
        decay: share of the old moving statistics that an update keeps, in [0, 1): a
            number or a scalar float tensor. After n updates the initial values still
            weigh decay^n.
        epsilon: positive number added to the variance, in the unit of the variance.
        center: whether there is a `beta`.
        scale: whether there is a `gamma`.
        initializers: initializer by variable name; ones for `gamma` and
            `moving_variance`, zeros for `beta` and `moving_mean` otherwise.
        regularizers: regularizer by name, for `gamma` and `beta`. A regularizer of
            the enclosing variable scope does not apply to them.
        trainable: whether gamma and beta go to `TRAINABLE_VARIABLES`.
        zero_debias: keeps bias-corrected moving statistics, with variables `biased`
            and `local_step` for each.
        ema_variance: the variance that enters the moving average: "biased" (divided
            by N, as `tf.nn.moments` gives) or "unbiased" (by N - 1, as the fused
            kernel gives). The output always uses the biased one.
        update: "collection" puts the two update operations into
            `updates_collection`, for the train op to run; "in_place" makes the output
            depend on them, so that they run whenever it is computed; "skip" makes
            none.
        updates_collection: the collection for `update="collection"`.
        skip_nonfinite: leaves the moving statistics as they are when a batch mean or
            variance is NaN or infinite. One such batch would spoil them for ever.
        name: the variable scope; `batch_norm`, made unique, by default.
        reuse: as for `tf.variable_scope`. A layer called again makes update
            operations again: choose for one of the calls `update="skip"` where the
            statistics shall follow the other alone.

    Returns:
        A tensor of the shape and dtype of `x`.

    Raises:
        TypeError: `x` is not a float tensor, `is_training` is not a bool or bool
            tensor, `axis` is not an int.
        ValueError: any other argument is outside of what is said above; there is one
            value per channel in training, so that its variance is 0; or update
            operations for a collection would be made inside of a `tf.cond`,
            `tf.while_loop` or function body, where the train op cannot run them.
        RuntimeError: eager execution is on.
        tf.errors.InvalidArgumentError: at run time, when a training step has one value
            per channel and the shape of `x` did not tell.
    """
    if tf.executing_eagerly():
        raise RuntimeError(
            "batch_norm builds graphs, but eager execution is on: call "
            "tf.disable_eager_execution() at the start of the program"
        )
    x = tf.convert_to_tensor(x, name="x")
    is_training = _checked_is_training(is_training)
    _check_input(x, axis)
    _check_options(decay, epsilon, ema_variance, update, updates_collection)
    _check_keys("initializers", initializers, _INITIALIZERS)
    _check_keys("regularizers", regularizers, ("gamma", "beta"))
    updating = update != "skip" and is_training is not False

    with tf.variable_scope(
        name, default_name="batch_norm", values=[x], reuse=reuse
    ) as scope:
        # What an enclosing scope says about weights is not meant for these.
        scope.set_regularizer(None)
        scope.set_partitioner(None)
        if updating and update == "collection":
            _check_outside_of_control_flow(scope.name)
        variables = _get_variables(
            x, axis, center, scale, initializers, regularizers, trainable
        )
        normalized = _normalize(
            x, variables, is_training, axis, epsilon, ema_variance, scope.name
        )
        y = normalized.y
        updates = ()
        if updating:
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
                name=scope.name,
                batch_mean=normalized.mean if in_batch else None,
                batch_variance=normalized.variance if in_batch else None,
                updates=updates,
                **variables._asdict(),
            )
        )
        return y


def _checked_is_training(is_training):
    if isinstance(is_training, (bool, np.bool_)):
        return bool(is_training)
    if isinstance(is_training, (tf.Tensor, tf.Variable)):
        mode = tf.convert_to_tensor(is_training)
        if mode.dtype.base_dtype == tf.bool and mode.shape.is_compatible_with([]):
            return mode
    raise TypeError(
        f"`is_training` is {is_training!r}, but must be a Python bool or a scalar bool "
        "tensor"
    )


def _check_input(x, axis):
    if x.dtype.base_dtype not in _FLOATS:
        raise TypeError(
            "`x` has dtype {}, but must have one of {}".format(
                x.dtype.name, ", ".join(dtype.name for dtype in _FLOATS)
            )
        )
    rank = x.shape.ndims
    if rank is None or rank < 2:
        raise ValueError(
            f"`x` has shape {x.shape}, but must have a known rank of 2 or more"
        )
    if isinstance(axis, bool) or not isinstance(axis, numbers.Integral):
        raise TypeError(f"`axis` is {axis!r}, but must be an int")
    if not -rank <= axis < rank:
        raise ValueError(
            f"`axis` is {axis}, but must lie in [{-rank}, {rank}) for `x` of shape "
            f"{x.shape}"
        )
    if tf.dimension_value(x.shape[axis]) is None:
        raise ValueError(
            f"`x` has shape {x.shape}, but must have a known number of channels on axis "
            f"{axis}: call x.set_shape"
        )


def _check_options(decay, epsilon, ema_variance, update, updates_collection):
    if isinstance(decay, (tf.Tensor, tf.Variable)):
        if not (decay.dtype.is_floating and decay.shape.is_compatible_with([])):
            raise ValueError(
                f"`decay` is {decay!r}, but must be a number or a scalar float tensor"
            )
    elif not (isinstance(decay, numbers.Real) and 0 <= decay < 1):
        raise ValueError(f"`decay` is {decay!r}, but must lie in [0, 1)")
    if not (isinstance(epsilon, numbers.Real) and 0 < epsilon < float("inf")):
        raise ValueError(f"`epsilon` is {epsilon!r}, but must be > 0")
    _check_choice("ema_variance", ema_variance, _EMA_VARIANCES)
    _check_choice("update", update, _UPDATES)
    if update == "collection" and not (
        isinstance(updates_collection, str) and updates_collection
    ):
        raise ValueError(
            f"`updates_collection` is {updates_collection!r}, but must be the name of a "
            'collection; for updates without one there is update="in_place"'
        )


def _check_choice(argument, value, choices):
    if value not in choices:
        raise ValueError(
            "`{}` is {!r}, but must be one of {}".format(
                argument, value, ", ".join(map(repr, choices))
            )
        )


def _check_keys(argument, mapping, known):
    for key in mapping or ():
        if key not in known:
            raise ValueError(
                "`{}` has the key {!r}, but its keys must be among {}".format(
                    argument, key, ", ".join(map(repr, known))
                )
            )


def _check_outside_of_control_flow(layer):
    """Raises where a train op outside could not run an update made here.

    Inside of a `tf.cond`, `tf.while_loop` or function body, an operation never takes
    an outer tensor directly: TensorFlow puts a Switch, an Enter or a captured
    placeholder in between. No public function tells, but this does.
    """
    with tf.init_scope():
        outer = tf.constant(0)
    if tf.identity(outer).op.inputs[0].op is not outer.op:
        raise ValueError(
            f'`update` is "collection", but the layer {layer!r} is built inside of a '
            "tf.cond, tf.while_loop or function body: its update operations would "
            "belong to that body, where a train op outside cannot run them (it would "
            "silently do nothing when the branch is not taken). Use "
            'update="in_place", or call batch_norm outside of the body'
        )


def _get_variables(x, axis, center, scale, initializers, regularizers, trainable):
    dtype = statistics.statistics_dtype(x.dtype)
    channels = tf.dimension_value(x.shape[axis])
    initializers = initializers or {}
    regularizers = regularizers or {}

    def variable(key, learned):
        return tf.get_variable(
            key,
            [channels],
            dtype,
            initializers.get(key) or _INITIALIZERS[key](),
            regularizers.get(key),
            trainable=learned,
        )

    return _Variables(
        gamma=variable("gamma", trainable) if scale else None,
        beta=variable("beta", trainable) if center else None,
        moving_mean=variable("moving_mean", False),
        moving_variance=variable("moving_variance", False),
    )


def _normalize(x, variables, is_training, axis, epsilon, ema_variance, layer):
    axes = statistics.reduction_axes(x.shape.ndims, axis)
    # All that needs a gradient is cast and read outside of the cond: TensorFlow 1.15
    # gives none to bfloat16 tensors that enter it, and fails for resource variables
    # that are read in it, if it is itself in a loop.
    x, dtype = tf.cast(x, statistics.statistics_dtype(x.dtype)), x.dtype
    gamma, beta = (
        None if variable is None else tf.identity(variable)
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
        mean = tf.identity(variables.moving_mean)
        variance = tf.identity(variables.moving_variance)
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
    return tuple(
        update_moving_average(
            moving, batch, decay, apply=apply, zero_debias=zero_debias
        )
        for moving, batch in (
            (variables.moving_mean, normalized.mean),
            (variables.moving_variance, normalized.variance),
        )
    )
