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

import contextlib
import functools
from typing import Any, NamedTuple

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1 import compiled, recipe, records, statistics
from bn_tf1.arguments import COUNTED, Arguments
from bn_tf1.control_flow import (
    each,
    inside_of_control_flow,
    may_switch,
    switch,
)
from bn_tf1.moving_averages import (
    MERGED_MARK,
    Updating,
    applied_rate,
    assign_moving_value,
    counted_rate,
    update_moving_average,
)
from bn_tf1.own_statistics import (
    MovingValues,
    may_lack_values,
    normalize_by_own_statistics,
)
from bn_tf1.statistics.channels import IS_TENSORFLOW_1
from bn_tf1.variables import LayerVariables

_NORMALIZE = {
    "composed": statistics.normalize_composed,
    "fused": statistics.normalize_fused,
    "compiled": compiled.normalize_batch,
}


class Normalized(NamedTuple):
    """What a call of a layer made.

    Attributes:
        y: the normalised values, of the shape and dtype of the input: what `activated`
            makes the output of.
        mean, variance: tensors of shape [channels] as they enter the moving averages, or
            the moving ones where `is_training` is false.
        updates: the operations that update the moving statistics, first that of the mean.
        moving: the variable that each of `updates` is of.
        to_collect: those of them that a train op must run: all, or none where the output
            depends on them.
    """

    y: tf.Tensor
    mean: tf.Tensor
    variance: tf.Tensor
    updates: tuple[tf.Operation, ...]
    moving: tuple
    to_collect: tuple[tf.Operation, ...]


class _Bank(NamedTuple):
    """A bank that a call may update; `is_chosen` as in a `BatchNormCall`."""

    number: int
    variables: LayerVariables
    is_chosen: Any = None


def normalize_and_update(
    x: tf.Tensor,
    variables: LayerVariables,
    arguments: Arguments,
    updating: Updating | None,
    *,
    layer: str,
) -> Normalized:
    """The output of a layer; makes and records its updates.

    Args:
        x: the input.
        variables: the layer's variables, those of all banks.
        arguments: checked ones. Where `trainable` is a scalar bool tensor, it switches the
            gradients of gamma and beta, and the updates, at run time. Whether the
            variables are trainable is theirs.
        updating: how it updates its statistics, decided just before; None if it does not.
        layer: the layer's variable scope, for errors and records.
    """
    banks = [_Bank(0, variables)]
    if arguments.banks is not None:
        variables, banks = _with_bank(variables, arguments, layer)
    if arguments.kernel == "recipe":
        normalized, draw = _by_recipe(x, variables, arguments)
    else:
        # A scope of its own leaves the layer's names to the output and the updates. What
        # is foldable makes the output itself in the layer's scope: behind an Identity
        # `tf.contrib.quantize` takes a residual sum for something else.
        scope = None if arguments.is_foldable else "normalize"
        with tf.name_scope(scope) if scope else contextlib.nullcontext():
            normalized, draw = _normalize(x, variables, arguments, layer), None
    y, mean, variance, _ = normalized
    in_batch = arguments.is_training is not False
    updates, moving = (), ()
    for bank in banks:
        own = ()
        if updating is not None:
            operands = x, bank, normalized, arguments, updating
            own = _made_updates(draw, layer, *operands)
        call = records.BatchNormCall(
            name=layer,
            gamma=bank.variables.gamma,
            beta=bank.variables.beta,
            moving_mean=bank.variables.moving_mean,
            moving_variance=bank.variables.moving_variance,
            batch_mean=mean if in_batch else None,
            batch_variance=variance if in_batch else None,
            updates=own,
            x=x,
            arguments=arguments,
            bank=bank.number,
            is_chosen=bank.is_chosen,
        )
        tf.add_to_collection(records.CALLS_KEY, call)
        updates += own
        moving += call.moving_mean, call.moving_variance
    to_collect = updates
    if updates and updating.in_place:
        to_collect = ()
        with tf.control_dependencies(updates):
            y = each(tf.identity, y)
    return Normalized(y, mean, variance, updates, moving, to_collect)


def _with_bank(variables, arguments, layer):
    """(the variables to normalise with, the banks that may be updated)."""
    every = variables._replace(others=()), *variables.others
    index = arguments.bank
    if not tf.is_tensor(index):
        return every[index], [_Bank(index, every[index])]
    with tf.name_scope("bank"):
        index = tf.cast(index, tf.int64)
        message = (
            f"`bank` of layer {layer!r} must lie in [0, {len(every)}), as `banks` says, "
            "but is:"
        )
        # On a GPU, what is gathered from beyond the last bank would be zeros without a word.
        is_one = tf.logical_and(index >= 0, index < len(every))
        with tf.control_dependencies([tf.Assert(is_one, [message, index])]):
            index = tf.identity(index, name="index")
        chosen = [
            values[0] if values[0] is values[-1] else tf.gather(tf.stack(values), index)
            for values in zip(*(bank[:-1] for bank in every))
        ]
        banks = [_Bank(i, v, tf.equal(index, i)) for i, v in enumerate(every)]
    return LayerVariables(*chosen), banks


def activated(y: Any, arguments: Arguments) -> Any:
    """The output of a layer, of `y` from `Normalized`: with its residual and activation.

    Here, after the updates and whatever switches the mode, it is the same in every mode and
    for every kernel but the compiled one, which has made them in its own pass.
    """
    if arguments.plan.kernel == "compiled" and arguments.is_training is not False:
        return y
    residual = arguments.residual
    if isinstance(y, list) and residual is None:
        residual = [None] * len(y)
    activate = functools.partial(statistics.activated, activation=arguments.activation)
    return each(activate, y, residual)


def _by_recipe(x, variables, arguments):
    """A `statistics.BatchOutput`, and what draws the updates."""
    dtype, decay = arguments.plan.dtype, arguments.decay
    (axis,) = arguments.plan.axes
    moving = variables.moving_mean, variables.moving_variance
    y, (mean, variance) = recipe.normalize(
        tf.cast(x, dtype),
        arguments.is_training,
        variables.gamma,
        variables.beta,
        moving,
        axis,
        arguments.epsilon,
    )

    def draw():
        casted = tf.cast(decay, dtype) if tf.is_tensor(decay) else decay
        operands = moving, (mean, variance), casted, arguments.is_training
        return tuple(recipe.updates_of(*operands))

    return statistics.BatchOutput(tf.cast(y, x.dtype), mean, variance), draw


def _normalize(x, variables, arguments, layer):
    """A `statistics.BatchOutput`, of the moving statistics in inference."""
    plan, is_training = arguments.plan, arguments.is_training
    first = x[0] if arguments.towers else x
    dtype = first.dtype
    activation = residual = None
    if plan.kernel == "compiled" and is_training is not False:
        activation, residual = arguments.activation, arguments.residual
    # All is cast and read outside of the cond: TensorFlow 1.15 gives no gradient to
    # bfloat16 tensors that enter it, and fails for resource variables that are read in it,
    # if it is itself in a loop; and where a variable is read in it, it cannot be frozen.
    wide = statistics.statistics_dtype(dtype)
    if plan.kernel == "composed" and is_training is not False:
        if arguments.towers:
            x = each(lambda tower: tf.cast(tower, wide), x)
        else:
            x = tf.cast(x, wide)
        first = x[0] if arguments.towers else x
        if wide != dtype.base_dtype:
            plan = _plan_of(first, arguments)
    elif plan.kernel == "compiled" and IS_TENSORFLOW_1 and tf.is_tensor(is_training):
        x, residual = (None if v is None else tf.cast(v, wide) for v in (x, residual))
    channels = [tf.dimension_value(first.shape[a]) for a in plan.axes]
    gamma, beta = _read_all([variables.gamma, variables.beta], channels)
    if not isinstance(arguments.trainable, bool):
        gamma, beta = (
            _passing_gradient(value, arguments.trainable) for value in (gamma, beta)
        )
    takes = is_training is not True or not arguments.is_plain
    renorms = is_training is not False and arguments.renorm is not None
    moving = MovingValues(
        *_read_all(
            [
                variables.moving_mean if takes else None,
                variables.moving_variance if takes else None,
                variables.renorm_mean if renorms else None,
                variables.renorm_stddev if renorms else None,
            ],
            channels,
        )
    )
    how = {"plan": plan, "arguments": arguments, "activation": activation}
    normalized = _by_mode(
        is_training,
        functools.partial(_with_batch_statistics, moving=moving, layer=layer, **how),
        functools.partial(_with_moving_statistics, **how),
        [x, gamma, beta, residual],
        moving[:2],
        takes_inputs_alone=arguments.is_plain,
    )
    if arguments.towers:
        y = each(lambda y: tf.cast(y, dtype), normalized.y)
        for tower, like in zip(y, x):
            tower.set_shape(like.shape)
        return normalized._replace(y=y)
    normalized.y.set_shape(x.shape)
    return normalized._replace(y=tf.cast(normalized.y, dtype))


def _with_batch_statistics(
    x, gamma, beta, residual, *_, plan, arguments, activation, moving, layer
):
    is_training = arguments.is_training
    if not arguments.is_plain:
        several = functools.partial(
            _with_several_values, layer=layer, is_training=is_training
        )
        operands = x, gamma, beta, moving
        return normalize_by_own_statistics(*operands, arguments, layer, several)
    unbiased = arguments.ema_variance == "unbiased"
    how = {"epsilon": arguments.epsilon, "unbiased": unbiased}
    if plan.kernel == "compiled":
        how.update(activation=activation, residual=residual)
    checks = _checks_of_several_values(x, plan.axes, layer, is_training)
    if checks and plan.kernel == "composed":
        with tf.control_dependencies(checks):
            x, checks = tf.identity(x), []
    # Nothing stands between the kernel and what made `x`: tools look for both.
    with tf.control_dependencies(checks):
        return _NORMALIZE[plan.kernel](x, gamma, beta, plan, **how)


def _with_moving_statistics(
    x, gamma, beta, residual, mean, variance, *, plan, arguments, activation
):
    if arguments.fold or plan.constant != "fused":
        # An optimizer over all variables must not train them. The fused kernel passes no
        # gradient to them.
        mean, variance = tf.stop_gradient(mean), tf.stop_gradient(variance)
    epsilon = arguments.epsilon
    count = tf.ones([], mean.dtype) if may_lack_values(arguments) else None
    if arguments.towers:

        def normalize(tower):
            operands = tower, mean, variance, gamma, beta
            own = _plan_of(tower, arguments)
            return statistics.normalize_constant(*operands, own, epsilon=epsilon)

        return statistics.BatchOutput(each(normalize, x), mean, variance, count)
    operands = x, mean, variance, gamma, beta
    if arguments.fold:
        keep = _keep if arguments.fold == "once" else tf.convert_to_tensor
        y = statistics.normalize_folded(*operands, epsilon=epsilon, keep=keep)
    else:
        y = statistics.normalize_constant(*operands, plan, epsilon=epsilon)
    if activation is not None or residual is not None:
        y = statistics.activated(y, residual, activation)
    return statistics.BatchOutput(y, mean, variance, count)


def _plan_of(x, arguments):
    axes, epsilon = arguments.plan.axes, arguments.epsilon
    return statistics.plan_of(x, axes, epsilon=epsilon, kernel="composed")


def _by_mode(is_training, with_batch, with_moving, inputs, moving, takes_inputs_alone):
    """Builds what `is_training` asks for: one of the two, or both and a switch.

    Args:
        with_batch, with_moving: functions of `inputs`, and of `moving` after them, which
            a switch passes to both.
        takes_inputs_alone: whether `with_batch` reads no other tensor.
    """
    if is_training is True:
        return with_batch(*inputs)
    if is_training is False:
        return with_moving(*inputs, *moving)
    if takes_inputs_alone and may_switch():
        # What is plain has no count.
        outputs = switch(
            is_training,
            lambda *inputs: with_batch(*inputs)[:3],
            lambda *inputs: with_moving(*inputs)[:3],
            [*inputs, *moving],
        )
    else:
        outputs = tf.cond(
            is_training,
            lambda: [v for v in with_batch(*inputs) if v is not None],
            lambda: [v for v in with_moving(*inputs, *moving) if v is not None],
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


def _passing_gradient(value, trainable):
    """`value`, which passes a gradient when `trainable` is true; None for None."""
    if value is None:
        return None
    return tf.where_v2(trainable, value, tf.stop_gradient(value))


def _read_all(variables, shape):
    """The values of variables, without the sizes of 1 in between; None for None."""
    values = [None if v is None else tf.convert_to_tensor(v) for v in variables]
    return [
        v if v is None or v.shape.as_list() == shape else tf.reshape(v, shape)
        for v in values
    ]


def _with_several_values(x, axes, layer, is_training):
    """`x`, once it is sure that a channel has not just one value."""
    checks = _checks_of_several_values(x, axes, layer, is_training)
    if not checks:
        return x
    with tf.control_dependencies(checks):
        return tf.identity(x)


def _checks_of_several_values(x, axes, layer, is_training):
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


def _made_updates(draw, layer, x, bank, normalized, arguments, updating):
    """The operations of the updates, which a train op can order, or must make."""
    graph_state = tf.get_collection_ref(records.COLLECTED_KEY)
    if not graph_state:
        graph_state.append({})
    calls = graph_state[0].setdefault(bank.variables.moving_mean.name, [])
    operands = x, bank, normalized, arguments, updating
    if arguments.update == "merged":
        made = ()
        # For who reads the graph: so far, nothing updates the layer.
        tf.no_op(name=MERGED_MARK)
    # The recipe's, of TensorFlow's own function, know no lock: those of further calls, which
    # read the same old value, would move it too far.
    elif draw is not None and not calls:
        made = draw()
    else:
        made = _update_operations(*operands, is_shared=bool(calls))
    again = None
    if not updating.in_place:
        again = functools.partial(_updates_again, tf.get_variable_scope(), *operands)
    conditions = arguments.is_training, arguments.trainable
    if bank.is_chosen is not None:
        conditions += (bank.is_chosen,)
    record = layer, bank.variables, x, normalized, arguments, conditions, made, again
    calls.append(records.CallUpdates(*record))
    return made


def _updates_again(scope, x, bank, normalized, arguments, updating, moments=None):
    """The updates again; by `moments`, if given, in the place of the batch's."""
    if moments is not None:
        normalized = statistics.BatchOutput(None, *moments)
        # A batch that must not count is not in them.
        arguments = arguments._replace(is_training=True, trainable=True)
        bank = bank._replace(is_chosen=None)
    operands = x, bank, normalized, arguments, updating
    # What only an update needs, as for `zero_debias`, a merged one has not made before.
    with tf.variable_scope(
        scope, reuse=tf.AUTO_REUSE, auxiliary_name_scope=False
    ) as entered, tf.name_scope("updates_in_order"):
        # As when the layer was built: its statistics are whole.
        entered.set_partitioner(None)
        return _update_operations(*operands, is_shared=False)


def _update_operations(x, bank, normalized, arguments, updating, is_shared):
    variables = bank.variables
    _, mean, variance, count = normalized
    conditions = [arguments.is_training, arguments.trainable]
    if bank.is_chosen is not None:
        conditions.append(bank.is_chosen)
    if arguments.skip_nonfinite:
        # The variance is made of distances from the mean: finite only if that is.
        conditions.append(tf.reduce_all(tf.is_finite(variance)))
    elif count is None and arguments.is_plain and not arguments.plan.count:
        count = tf.size(x)
    if count is not None:
        conditions.append(count > 0)
    # There is nothing to switch at run time in a bool of Python.
    apply, *others = [c for c in conditions if not isinstance(c, bool)] or [True]
    for condition in others:
        apply = tf.logical_and(apply, condition)
    decay, rate = arguments.decay, updating.rate
    if isinstance(decay, COUNTED):
        rate = counted_rate(decay, variables.num_updates, apply, [mean, variance])
    if arguments.is_foldable and not is_shared:
        how = {"apply": apply, "rate": rate, "is_foldable": True}
    else:
        rate = applied_rate(rate, apply)
        how = {"apply": apply, "rate": rate, "is_shared": is_shared}
    if arguments.renorm is not None:
        return _renormalized_updates(variables, mean, variance, arguments, **how)
    return tuple(
        update_moving_average(
            getattr(variables, key),
            value,
            decay,
            zero_debias=key in arguments.zero_debias,
            **how,
        )
        for key, value in (("moving_mean", mean), ("moving_variance", variance))
    )


def _renormalized_updates(variables, mean, variance, arguments, **how):
    stddev = tf.sqrt(variance + arguments.epsilon)
    decay, apply = arguments.decay, how["apply"]
    # Whoever runs either of the two operations updates these, too.
    with tf.control_dependencies(
        [
            update_moving_average(
                moving, value, arguments.renorm.decay, **{**how, "rate": None}
            )
            for moving, value in (
                (variables.renorm_mean, mean),
                (variables.renorm_stddev, stddev),
            )
        ]
    ):
        mean, stddev = tf.identity(mean), tf.identity(stddev)
    updated = update_moving_average(variables.moving_stddev, stddev, decay, **how)
    with tf.control_dependencies([updated]):
        squared = tf.square(variables.moving_stddev.read_value())
    return (
        update_moving_average(variables.moving_mean, mean, decay, **how),
        assign_moving_value(
            variables.moving_variance,
            tf.nn.relu(squared - arguments.epsilon),
            apply=apply,
        ),
    )
