"""The graph builder: what is asked for, checked, and the variables it needs.

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
from typing import Any, Callable, Mapping, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1 import statistics
from bn_tf1.control_flow import check_outside_of_control_flow
from bn_tf1.moving_averages import UPDATE_OPS_COLLECTION, update_rate
from bn_tf1.normalization import normalize_and_update
from bn_tf1.statistics import Renormalization
from bn_tf1.variables import INITIALIZERS, LEARNED, make_variables

_FLOATS = (tf.float16, tf.bfloat16, tf.float32, tf.float64)
_EMA_VARIANCES = ("biased", "unbiased")
_UPDATES = ("collection", "in_place", "skip")


def batch_norm(
    x: tf.Tensor,
    is_training: bool | tf.Tensor,
    *,
    axis: int | Sequence[int] = -1,
    decay: float | tf.Tensor = 0.99,
    epsilon: float = 1e-3,
    center: bool = True,
    scale: bool = True,
    initializers: Mapping[str, Callable] | None = None,
    regularizers: Mapping[str, Callable] | None = None,
    constraints: Mapping[str, Callable] | None = None,
    trainable: bool | tf.Tensor = True,
    weights: tf.Tensor | None = None,
    ghost_batch_size: int | None = None,
    renorm: Renormalization | None = None,
    adjustment: Callable | None = None,
    zero_debias: bool = False,
    ema_variance: str = "biased",
    update: str = "collection",
    updates_collection: str = UPDATE_OPS_COLLECTION,
    skip_nonfinite: bool = True,
    kernel: str = "auto",
    fold: bool | str = False,
    name: str | None = None,
    reuse: Any = None,
) -> tf.Tensor:
    """Normalises `x` per channel, over all its other axes.

    Creates the variables `gamma`, `beta`, `moving_mean` and `moving_variance`, of
    shape [channels], under the variable scope `name`. They are float32, or float64
    for float64 `x`; so are the statistics. With several channel axes the variables
    have the rank of `x`, with sizes of 1 on the other axes.

    Three switches of fine-tuning are independent: `is_training` chooses the
    statistics to normalise with, `update` whether the moving ones follow,
    `trainable` whether gamma and beta are trained. A frozen layer is
    `is_training=False, trainable=False`.

    Args:
        x: float16, bfloat16, float32 or float64 tensor of known rank, 2 or more, with
            a known number of channels; all other sizes may be unknown.
        is_training: a Python bool builds one branch; a scalar bool tensor or variable
            builds a `tf.cond` that computes the moments when it is true only.
        axis: the channel axis, in [-rank, rank), or several of them.
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
        constraints: projection by name, for `gamma` and `beta`: a function from the
            variable to its new value, which the optimizer applies after each step.
        trainable: whether gamma and beta go to `TRAINABLE_VARIABLES`. With a scalar
            bool tensor they do; when it is false, they get gradients of 0 and the
            moving statistics do not change.
        weights: how much an example, or a value, counts in the batch statistics: a
            float tensor [batch], or one of the rank of `x` with size 1 on the channel
            axes, such as a mask [batch, time, 1]. A batch whose weights sum to 0 has no
            statistics: its output is NaN. (`bn_tf1.statistics.weighted`)
        ghost_batch_size: normalises groups of so many examples by themselves; it must
            divide the batch in training, and does not matter in inference.
            (arXiv:1705.08741; `bn_tf1.statistics.ghost_batches` says which examples
            make a group)
        renorm: `bn_tf1.Renormalization(decay, rmin, rmax, dmax)`, so that training
            normalises nearly as inference does; adds the variables `moving_stddev`,
            `renorm_mean` and `renorm_stddev`. (arXiv:1702.03275)
        adjustment: a function from the shape of `x`, an int32 tensor, to a scale and
            an offset for the normalised values, which broadcast to it; it comes before
            gamma and beta, in training only.
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
        kernel: "fused" computes the batch's statistics and the output in one operation,
            and their gradient in another; "composed" in several, with a gradient that
            is written by hand; "auto" takes the faster one for the dtype, the layout,
            the device and the version of TensorFlow. All mean the same, but a loss on
            the statistics themselves (`batch_norm_calls`) needs "composed".
        fold: with `is_training=False`, scales the weights of the convolution or matrix
            product that `x` comes straight from, in place of its output: float32 or
            float64 `Conv2D`, `DepthwiseConv2dNative` or `MatMul`. True does it in each
            step, which costs one pass over the weights: it pays where the output is
            larger than they are. "once" does it when `tf.local_variables_initializer()`
            runs, and costs nothing in a step: run that by itself after every restore,
            since what it keeps, in local variables that no checkpoint holds, does not
            follow the others by itself. It passes no gradient to the weights, gamma and
            beta, and an exported graph would have to initialise it, too: to train, or to
            export, use True. (`bn_tf1.statistics.folded`)
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
            per channel, or a batch that `ghost_batch_size` does not divide, and the
            shape of `x` did not tell.
    """
    if tf.executing_eagerly():
        raise RuntimeError(
            "batch_norm builds graphs, but eager execution is on: call "
            "tf.disable_eager_execution() at the start of the program"
        )
    x = tf.convert_to_tensor(x, name="x")
    is_training = _checked_switch("is_training", is_training)
    _check_input(x, axis)
    _check_options(decay, epsilon, ema_variance, update, updates_collection, kernel)
    _check_keys("initializers", initializers, INITIALIZERS)
    _check_keys("regularizers", regularizers, LEARNED)
    _check_keys("constraints", constraints, LEARNED)
    trainable = _checked_switch("trainable", trainable)
    _check_ghost_batch_size(ghost_batch_size, x, axis, weights, adjustment)
    _check_renorm(renorm, ema_variance, zero_debias)
    _check_fold(fold, x, axis, is_training)
    if weights is not None:
        weights = _checked_weights(weights, x, axis)
    updating = update != "skip" and is_training is not False

    with tf.variable_scope(
        name, default_name="batch_norm", values=[x], reuse=reuse
    ) as scope:
        # What an enclosing scope says about weights is not meant for these.
        scope.set_regularizer(None)
        scope.set_partitioner(None)
        rate = None
        if updating:
            rate = update_rate(decay, statistics.statistics_dtype(x.dtype))
        if updating and update == "collection":
            check_outside_of_control_flow(scope.name, made_here=rate.op)
        variables = make_variables(
            _variable_maker(x, axis, regularizers, constraints, trainable),
            center=center,
            scale=scale,
            renorm=renorm is not None,
            initializers=initializers or {},
        )
        return normalize_and_update(
            x,
            is_training,
            variables,
            layer=scope.name,
            axis=axis,
            decay=decay,
            rate=rate,
            epsilon=epsilon,
            zero_debias=("moving_mean", "moving_variance") if zero_debias else (),
            ema_variance=ema_variance,
            update=update,
            updates_collection=updates_collection,
            skip_nonfinite=skip_nonfinite,
            trainable=trainable,
            weights=weights,
            ghost_batch_size=ghost_batch_size,
            renorm=renorm,
            adjustment=adjustment,
            kernel=kernel,
            fold=fold,
        )


def _checked_switch(argument, value):
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if tf.is_tensor(value):
        switch = tf.convert_to_tensor(value)
        if switch.dtype.base_dtype == tf.bool and switch.shape.is_compatible_with([]):
            return switch
    raise TypeError(
        f"`{argument}` is {value!r}, but must be a Python bool or a scalar bool tensor"
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
    axes = axis if isinstance(axis, (list, tuple)) and axis else (axis,)
    for a in axes:
        if isinstance(a, bool) or not isinstance(a, numbers.Integral):
            raise TypeError(f"`axis` is {axis!r}, but must be an int or several")
        if not -rank <= a < rank:
            raise ValueError(
                f"`axis` is {axis}, but must lie in [{-rank}, {rank}) for `x` of shape "
                f"{x.shape}"
            )
        if tf.dimension_value(x.shape[a]) is None:
            raise ValueError(
                f"`x` has shape {x.shape}, but must have a known number of channels on "
                f"axis {a}: call x.set_shape"
            )
    if len({a % rank for a in axes}) != len(axes):
        raise ValueError(f"`axis` is {axis}, but must not name an axis twice")


def _check_options(decay, epsilon, ema_variance, update, updates_collection, kernel):
    if tf.is_tensor(decay):
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
    _check_choice("kernel", kernel, statistics.KERNELS)
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


def _check_ghost_batch_size(size, x, axis, weights, adjustment):
    if size is None:
        return
    if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 1:
        raise ValueError(f"`ghost_batch_size` is {size!r}, but must be an int > 0")
    if 0 in statistics.channel_axes(x.shape.ndims, axis):
        raise ValueError(
            f"`axis` is {axis}, but with `ghost_batch_size` axis 0 must count the "
            "examples"
        )
    for argument, value in [("weights", weights), ("adjustment", adjustment)]:
        if value is not None:
            raise ValueError(
                f"`{argument}` is {value!r}, but must be None with `ghost_batch_size`"
            )


def _check_renorm(renorm, ema_variance, zero_debias):
    if renorm is None:
        return
    if not isinstance(renorm, Renormalization):
        raise TypeError(f"`renorm` is {renorm!r}, but must be a bn_tf1.Renormalization")
    if ema_variance != "biased" or zero_debias:
        raise ValueError(
            f"`ema_variance` is {ema_variance!r} and `zero_debias` {zero_debias}, but "
            'with `renorm` they must be "biased" and False: its averages correct the '
            "biased statistics"
        )


def _check_fold(fold, x, axis, is_training):
    if not (isinstance(fold, (bool, np.bool_)) or fold == "once"):
        raise ValueError(f"`fold` is {fold!r}, but must be False, True or 'once'")
    if not fold:
        return
    if is_training is not False:
        raise ValueError(
            f"`fold` is {fold!r}, but `is_training` is {is_training!r}: only statistics that "
            "do not change with the batch can be folded; use is_training=False"
        )
    obstacle = statistics.why_not_folded(x, axis, once=fold == "once")
    if obstacle is not None:
        raise ValueError(
            f"`fold` is {fold!r}, but cannot be: {obstacle}; use fold=False"
        )


def _checked_weights(weights, x, axis):
    weights = tf.convert_to_tensor(weights, name="weights")
    shape = x.shape[:1]
    if weights.shape.ndims != 1:
        kept = statistics.channel_axes(x.shape.ndims, axis)
        shape = [1 if a in kept else None for a in range(x.shape.ndims)]
    if not (
        weights.dtype.is_floating
        and weights.shape.ndims is not None
        and weights.shape.is_compatible_with(shape)
    ):
        raise ValueError(
            f"`weights` is {weights!r}, but must be a float tensor of shape [batch], or "
            f"of the rank of `x`, {x.shape}, with size 1 on the channel axes"
        )
    return weights


def _variable_maker(x, axis, regularizers, constraints, trainable):
    dtype = statistics.statistics_dtype(x.dtype)
    shape = statistics.parameter_shape(x.shape, axis)
    regularizers, constraints = regularizers or {}, constraints or {}

    def make(key, initializer):
        return tf.get_variable(
            key,
            shape,
            dtype,
            initializer,
            regularizers.get(key),
            trainable=key in LEARNED and trainable is not False,
            constraint=constraints.get(key),
        )

    return make
