"""Normalises with variables that are given, and keeps their statistics up to date.

This is what every layer of the library has in common, whatever its variables are called and
however its arguments are spelled. What each `is_training` means stands in `builder`.

Sources: those of `bn_tf1.statistics`.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple, Sequence

import tensorflow.compat.v1 as tf

from bn_tf1 import built_layers, compiled, recipe, statistics
from bn_tf1.arguments import COUNTED, Arguments
from bn_tf1.built_layers import Bank, CallUpdates
from bn_tf1.control_flow import each, inside_of_control_flow, may_switch, switch
from bn_tf1.moving_averages import (
    MERGED_MARK,
    Updating,
    applied_rate,
    assign_moving_value,
    counted_rate,
    update_moving_average,
)
from bn_tf1.special_statistics import (
    MovingValues,
    checks_of_several_values,
    may_lack_values,
    normalize_by_special_statistics,
)
from bn_tf1.statistics.channels import IS_TENSORFLOW_1
from bn_tf1.variables import LayerVariables

# The three have one signature, so that the choice of the plan is a look into a table.
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
        to_collect: (moving variable, the operation that updates it), first that of the mean,
            of those that a train op must run: all, or none where the output depends on them.
    """

    y: Any
    to_collect: Sequence[tuple[Any, tf.Operation]]


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
        x: the input, or a list of towers.
        variables: the layer's variables, those of all banks.
        arguments: checked ones. Whether the variables are trainable is theirs.
        updating: how it updates its statistics, decided just before; None if it does not.
        layer: the layer's variable scope, for errors and records.
    """
    banks = [Bank(0, variables)]
    if arguments.banks is not None:
        variables, banks = _with_bank(variables, arguments, layer)
    draw = None
    if arguments.kernel == "recipe":
        batch, draw = _by_recipe(x, variables, arguments)
    else:
        # A scope of its own leaves the layer's names to the output and the updates. What
        # is foldable makes the output itself in the layer's scope: behind an Identity
        # `tf.contrib.quantize` takes a residual sum for something else.
        scope = None if arguments.is_foldable else "normalize"
        with tf.name_scope(scope) if scope else contextlib.nullcontext():
            batch = _normalize(x, variables, arguments, layer)
    in_batch = arguments.is_training is not False
    updates = []
    for bank in banks:
        own = ()
        # Outside of the cond: a train op that waits for an operation of a branch silently
        # does nothing, the weights' update neither, when the branch is not taken.
        if updating is not None:
            own = _made_updates(draw, layer, bank, x, batch, arguments, updating)
        of_batch = (batch.mean, batch.variance) if in_batch else (None, None)
        record = layer, *bank.variables[:4], *of_batch, own, x, arguments
        call = built_layers.BatchNormCall(*record, bank.number, bank.is_chosen)
        tf.add_to_collection(built_layers.CALLS_KEY, call)
        updates += zip((call.moving_mean, call.moving_variance), own)
    if not (updates and updating.in_place):
        return Normalized(batch.y, updates)
    with tf.control_dependencies([operation for _, operation in updates]):
        return Normalized(each(tf.identity, batch.y), ())


def _with_bank(variables, arguments, layer):
    """(the variables to normalise with, the banks that may be updated)."""
    every = variables._replace(others=()), *variables.others
    index = arguments.bank
    if not tf.is_tensor(index):
        return every[index], [Bank(index, every[index])]
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
        # Stacked at run time, and not kept as [banks, channels]: so each bank is restored
        # from, and frozen to, vectors by the names that tools know.
        chosen = [
            values[0] if values[0] is values[-1] else tf.gather(tf.stack(values), index)
            for values in zip(*(bank[:-1] for bank in every))
        ]
        banks = [Bank(i, v, tf.equal(index, i)) for i, v in enumerate(every)]
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
    gamma, beta, *moving = variables[:4]
    operands = tf.cast(x, dtype), arguments.is_training, gamma, beta, moving
    y, values = recipe.normalize(*operands, arguments.plan.axes[0], arguments.epsilon)

    def draw():
        # Later: only the first call of a layer has the recipe's own updates.
        casted = tf.cast(decay, dtype) if tf.is_tensor(decay) else decay
        updates = recipe.updates_of(moving, values, casted, arguments.is_training)
        return tuple(updates)

    return statistics.BatchOutput(tf.cast(y, x.dtype), *values), draw


def _normalize(x, variables, arguments, layer):
    """A `statistics.BatchOutput`, of the moving statistics in inference."""
    plan, is_training = arguments.plan, arguments.is_training
    # Towers are alike but for their batches, and have one plan.
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
    learned = _read_all([variables.gamma, variables.beta], channels)
    if not isinstance(arguments.trainable, bool):
        learned = [
            # Chosen at run time, without a cond: a gradient of 0 where it is false.
            v if v is None else tf.where_v2(arguments.trainable, v, tf.stop_gradient(v))
            for v in learned
        ]
    # What is not plain takes the moving ones where a batch has no value, in training, too.
    takes = is_training is not True or not arguments.is_plain
    renorms = is_training is not False and arguments.renorm is not None
    v, none = variables, (None, None)
    read = (v.moving_mean, v.moving_variance) if takes else none
    read += (v.renorm_mean, v.renorm_stddev) if renorms else none
    moving = MovingValues(*_read_all(read, channels))
    how = {"plan": plan, "arguments": arguments, "activation": activation}
    normalized = _by_mode(
        is_training,
        functools.partial(_with_batch_statistics, moving=moving, layer=layer, **how),
        functools.partial(_with_moving_statistics, **how),
        [x, *learned, residual],
        moving[:2],
        takes_inputs_alone=arguments.is_plain,
    )
    # What a switch returns may have lost a size that both of its ways know.
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
    if not arguments.is_plain:
        operands = x, gamma, beta, moving
        return normalize_by_special_statistics(*operands, arguments, layer)
    unbiased = arguments.ema_variance == "unbiased"
    how = {"epsilon": arguments.epsilon, "unbiased": unbiased}
    if plan.kernel == "compiled":
        how.update(activation=activation, residual=residual)
    # A variance of 0 is no error that shows: training goes on, with beta for an output.
    checks = []
    if plan.count is None or plan.count < 2:
        mode = arguments.is_training
        checks = checks_of_several_values(x, plan.axes, layer, mode)
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
    # What is kept is computed when somebody initialises it, and not in each step.
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
    # All of either side is built inside of it: what a run does not need costs it nothing,
    # and moments that are computed for nothing cost as much as the layer.
    if takes_inputs_alone and may_switch():
        # What is plain has no count.
        outputs = switch(
            is_training,
            lambda *inputs: with_batch(*inputs)[:3],
            lambda *inputs: with_moving(*inputs)[:3],
            [*inputs, *moving],
        )
    else:
        # A cond returns tensors alone: what one way lacks, the other lacks, too.
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


def _read_all(variables, shape):
    """The values of variables, without the sizes of 1 in between; None for None."""
    values = [None if v is None else tf.convert_to_tensor(v) for v in variables]
    return [
        v if v is None or v.shape.as_list() == shape else tf.reshape(v, shape)
        for v in values
    ]


def _made_updates(draw, layer, *call):
    """The operations of the updates, which a train op can order, or must make."""
    graph_state = tf.get_collection_ref(built_layers.COLLECTED_KEY)
    if not graph_state:
        graph_state.append({})
    # By the variable: under reuse one layer is called from several scopes.
    call = CallUpdates(layer, *call, scope=tf.get_variable_scope())
    calls = graph_state[0].setdefault(call.bank.variables.moving_mean.name, [])
    if call.arguments.update == "merged":
        made = ()
        # For who reads the graph: so far, nothing updates the layer.
        tf.no_op(name=MERGED_MARK)
    # The recipe's, of TensorFlow's own function, know no lock: those of further calls, which
    # read the same old value, would move it too far.
    elif draw is not None and not calls:
        made = draw()
    else:
        made = _update_operations(call, conditions_of(call), is_shared=bool(calls))
    calls.append(call._replace(operations=made))
    return made


def updates_again(
    call: CallUpdates, moments: statistics.Moments | None = None
) -> tuple[tf.Operation, ...]:
    """Operations that do what those of `call` do, for a train op to run in an order.

    With `moments` of several batches, they move towards these in the place of the batch's;
    where those count 0, they do nothing.
    """
    if moments is not None:
        # A batch that must not count is not in them.
        call = call._replace(batch=statistics.BatchOutput(None, *moments))
    # What only an update needs, as for `zero_debias`, a merged one has not made before.
    with tf.variable_scope(
        call.scope, reuse=tf.AUTO_REUSE, auxiliary_name_scope=False
    ) as entered, tf.name_scope("updates_in_order"):
        # As when the layer was built: its statistics are whole.
        entered.set_partitioner(None)
        conditions = conditions_of(call, of_call=moments is None)
        return _update_operations(call, conditions, is_shared=False)


def conditions_of(call: CallUpdates, *, of_call: bool = True) -> list[tf.Tensor]:
    """Scalar bool tensors: where one is false, `call` updates nothing.

    Without `of_call`, whether the call is in training, and of this bank, is not among them.
    """
    arguments, is_chosen = call.arguments, call.bank.is_chosen
    conditions = [arguments.is_training, arguments.trainable] if of_call else []
    if of_call and is_chosen is not None:
        conditions.append(is_chosen)
    if arguments.skip_nonfinite:
        # The variance is made of distances from the mean: finite only if that is.
        conditions.append(tf.reduce_all(tf.is_finite(call.batch.variance)))
    # There is nothing to switch at run time in a bool of Python.
    return [c for c in conditions if not isinstance(c, bool)]


def _update_operations(call, conditions, is_shared):
    arguments, variables = call.arguments, call.bank.variables
    _, mean, variance, count = call.batch
    if not arguments.skip_nonfinite and count is None and arguments.is_plain:
        # Otherwise the NaN that an empty batch has for a variance keeps it out.
        count = None if arguments.plan.count else tf.size(call.x)
    if count is not None:
        conditions.append(count > 0)
    apply, *others = conditions or [True]
    for condition in others:
        apply = tf.logical_and(apply, condition)
    decay, rate = arguments.decay, call.updating.rate
    if isinstance(decay, COUNTED):
        rate = counted_rate(decay, variables.num_updates, apply, [mean, variance])
    how = {"apply": apply}
    if arguments.is_foldable and not is_shared:
        how.update(rate=rate, is_foldable=True)
    else:
        # The guard costs one scalar product for both variables, in the place of one of
        # the size of each.
        how.update(rate=applied_rate(rate, apply), is_shared=is_shared)
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
    # The average of the deviation leads, as in the original: its square, less epsilon, is
    # what inference takes for the variance.
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
            # Rounding may take the square below epsilon, and a variance below 0.
            tf.nn.relu(squared - arguments.epsilon),
            apply=apply,
        ),
    )
