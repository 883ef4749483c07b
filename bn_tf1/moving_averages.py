"""The update of a moving average, its guards and the collection it goes to.

Contract: `update_moving_average` makes one operation that moves a variable towards a
value,

    variable <- variable - (1 - decay) * (variable - value),

or, when `apply` is false at run time, leaves it bit for bit as it is. With
`zero_debias` the variable is the bias-corrected average of Adam: an accumulator that
starts at 0, divided by 1 - decay^n after n updates.

TensorFlow's own `assign_moving_average` computes the same bits when it is applied. It
is not used because it has no public name and none of the guards: it turns an infinite
variable into NaN when it is told to keep it (inf - inf), reads a resource variable
before `value` is there, so that iterations of a loop overwrite each other, and takes
the decay of a float64 variable for a float32.

Sources: TensorFlow's `assign_moving_average`; for `zero_debias` Kingma & Ba, "Adam",
2014 (arXiv:1412.6980), section 3.
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple, Sequence

import tensorflow.compat.v1 as tf

from bn_tf1.arguments import COUNTED, Arguments, WarmUp
from bn_tf1.built_layers import MERGED_KEY, batch_norm_calls
from bn_tf1.control_flow import inside_of_control_flow
from bn_tf1.statistics import in_dtype
from bn_tf1.variables import OF_STATISTICS

UPDATE_OPS_COLLECTION = tf.GraphKeys.UPDATE_OPS
# The name of an operation that does nothing, in the scope of a call whose update
# `make_train_op` merges with that of others.
MERGED_MARK = "make_train_op_merges_updates"
_OF_REPLICA = re.compile(r"/replica_\d+$")
_IN_GRADIENT = re.compile(r"_grad(_\d+)?(/|$)")


class Updating(NamedTuple):
    """How a call of a layer updates its statistics.

    Attributes:
        rate: 1 - decay, a scalar of the dtype of the statistics; None where it follows
            from the number of updates (`counted_rate`).
        in_place: whether the output depends on the updates. Otherwise they are for the
            train op to run.
    """

    rate: tf.Tensor | None
    in_place: bool


def updating(
    arguments: Arguments, layer: str, *, moves_in: bool = False
) -> Updating | None:
    """How the layer that is being built updates its statistics; None if it does not.

    This is the one place where that is decided. `layer` is its variable scope, for errors.
    With `moves_in` updates are made in place inside of a `tf.cond`, `tf.while_loop` or
    function body, as the drop-ins do; otherwise that is an error.
    """
    if arguments.update == "skip" or arguments.is_training is False:
        return None
    # tf.recompute_grad builds a layer again, below the name that tf.gradients gives the
    # gradient of an operation: its updates were made with the first one.
    scope = tf.get_default_graph().get_name_scope()
    # A layer that is built for the first time in such a scope keeps its updates.
    if _IN_GRADIENT.search(scope) and layer in {c.name for c in batch_norm_calls()}:
        return None
    rate = None
    if not isinstance(arguments.decay, COUNTED):
        rate = update_rate(arguments.decay, arguments.plan.dtype)
    if arguments.update == "in_place":
        return Updating(rate, in_place=True)
    inside = inside_of_control_flow(made_here=None if rate is None else rate.op)
    is_merged = arguments.update == "merged"
    if inside and (is_merged or not moves_in):
        raise ValueError(
            f'`update` is "{arguments.update}", but the layer {layer!r} is built inside of a '
            "tf.cond, tf.while_loop or function body: its update operations would "
            "belong to that body, where a train op outside cannot run them (it would "
            "silently do nothing when the branch is not taken). Use "
            'update="in_place", or call batch_norm outside of the body'
        )
    if is_merged and layer in tf.get_collection(MERGED_KEY):
        raise ValueError(
            f'`update` is "merged", but a train op has merged the calls of the layer '
            f"{layer!r} already, and this one would be left out: call make_train_op after "
            'the last call of the layer, or give this one update="skip"'
        )
    return Updating(rate, in_place=inside)


def update_moving_average(
    variable: Any,
    value: tf.Tensor,
    decay: float | tf.Tensor,
    *,
    apply: bool | tf.Tensor = True,
    zero_debias: bool = False,
    rate: tf.Tensor | None = None,
    is_shared: bool = False,
    is_foldable: bool = False,
) -> tf.Operation:
    """Makes the operation that moves `variable` towards `value`, and returns it.

    Args:
        variable: float variable of any shape.
        value: tensor of the dtype of `variable`, and of its shape but for sizes of 1.
        decay: share of the old value that is kept, in [0, 1): a float or a scalar
            float tensor.
        apply: True, or a scalar bool tensor: when it is false, nothing changes, not
            even if `value` is NaN.
        zero_debias: corrects for the start at 0, with two more variables, `biased`
            and `local_step`, named as TensorFlow's `assign_moving_average` names them.
        rate: what `applied_rate` gave, where several variables share it.
        is_shared: whether other operations move the variable in the same step, in any
            order, so that it is moved under one lock.
        is_foldable: whether `rate` is that of `update_rate`, and the guard comes after the
            product with it, as `tf.contrib.quantize` looks for it beside a fused kernel.
    """
    # Statistics are [channels]; with several channel axes a variable keeps the rank.
    if variable.shape.ndims != value.shape.ndims:
        value = tf.reshape(value, variable.shape)
    if rate is None:
        rate = applied_rate(update_rate(decay, variable.dtype.base_dtype), apply)
    move = _locked_update
    if not is_shared:
        move = functools.partial(_plain_update, is_foldable=is_foldable)
    if zero_debias:
        return _zero_debiased_update(variable, value, rate, decay, apply, move)
    return move(variable, value, rate, apply)


def update_rate(decay: float | tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """1 - decay, a scalar of `dtype`."""
    # In float64, and rounded once: 1 - float32(0.999) is 1.3e-5 of itself off.
    rate = 1 - decay
    with tf.name_scope("moving_average_rate"):
        return tf.cast(rate, dtype) if tf.is_tensor(rate) else tf.constant(rate, dtype)


def counted_rate(
    decay: Any, counter: Any, apply: bool | tf.Tensor, after: Sequence[tf.Tensor]
) -> tf.Tensor:
    """1 - decay of the update after n others; whoever uses it has counted one more.

        "cumulative"     1 / (1 + n), with which the average is that of all batches
        WarmUp(decay)    max(1 - decay, 9 / (10 + n))

    The variable `counter` holds n; only what is applied counts. `after` is there before n is
    read: in a loop, tensors of this iteration.
    """
    dtype = counter.dtype.base_dtype
    with tf.name_scope("moving_average_rate"):
        with tf.control_dependencies(after):
            count = counter.op.outputs[0]
            if count.dtype.base_dtype != dtype:
                count = counter.read_value()
            # A sum, and no copy: that of a reference would change with the variable.
            following = count + 1
        if isinstance(decay, WarmUp):
            # (1 + n) / (10 + n) with the n of before: 1 less that is 9 / (10 + n).
            rate = tf.maximum(update_rate(decay.decay, dtype), 9 / (following + 9))
        else:
            rate = 1 / following
        # Read, then counted, then used: in a loop no iteration reads what another counts.
        with tf.control_dependencies([rate]):
            counted = counter.assign_add(tf.cast(apply, dtype), read_value=False)
        with tf.control_dependencies([counted]):
            return tf.identity(rate)


def applied_rate(rate: tf.Tensor, apply: bool | tf.Tensor) -> tf.Tensor:
    """`rate`, a scalar, where `apply` is true, and 0 where it is false."""
    if apply is True:
        return rate
    with tf.name_scope("moving_average_rate"):
        return rate * tf.cast(apply, rate.dtype)


def _plain_update(variable, value, rate, apply, *, is_foldable=False):
    with tf.name_scope("AssignMovingAvg") as scope:
        # In a loop, the read must wait for the update of the iteration before. What takes
        # a reference reads it when all that it takes is there.
        old = variable.op.outputs[0]
        if old.dtype.base_dtype != value.dtype:
            with tf.control_dependencies([value]):
                old = variable.read_value()
        difference = old - value
        # A NaN or an infinity times 0 would be NaN: `multiply_no_nan` makes it 0, so that
        # the variable keeps its bits.
        if apply is True or is_foldable:
            change = difference * rate
            if apply is not True:
                change = tf.math.multiply_no_nan(change, tf.cast(apply, rate.dtype))
        else:
            # Exactly 0 where the rate is, even if the difference is NaN.
            change = tf.math.multiply_no_nan(difference, rate)
        return variable.assign_sub(change, name=scope).op


def _locked_update(variable, value, rate, apply):
    """variable <- (variable + odds * value) / (1 + odds), with odds = rate / (1 - rate).

    TensorFlow has this as a step of proximal gradient descent, and nothing else that reads
    and writes under one lock.
    """
    with tf.name_scope("AssignMovingAvg") as scope:
        # Whatever the order in which several calls get the lock, each moves what the others
        # left. A decay of 0 comes out as near to it as float32 can tell.
        odds = rate / tf.maximum(1 - rate, 1e-12)
        zero = tf.zeros_like(rate)
        step = {
            "alpha": zero + 1,
            "l1": zero,
            "l2": odds,
            # Exactly 0 where the rate is, even if the value is NaN.
            "delta": -tf.math.multiply_no_nan(value, odds),
            "use_locking": True,
            "name": scope,
        }
        handle = variable.op.outputs[0]
        if handle.dtype == tf.resource:
            return tf.raw_ops.ResourceApplyProximalGradientDescent(var=handle, **step)
        return tf.raw_ops.ApplyProximalGradientDescent(var=handle, **step).op


def assign_moving_value(
    variable: Any, value: tf.Tensor, *, apply: bool | tf.Tensor = True
) -> tf.Operation:
    """Makes the operation that sets `variable` to `value`, where `apply` is true."""
    with tf.name_scope("AssignNewValue") as scope:
        if apply is not True:
            with tf.control_dependencies([value]):
                value = tf.where_v2(apply, value, variable.read_value())
        return variable.assign(value, name=scope).op


def _zero_debiased_update(variable, value, rate, decay, apply, move):
    """Written out because TensorFlow's own cannot hold its step counter still."""
    dtype = variable.dtype.base_dtype
    zeros = tf.zeros_initializer()
    # Under a strategy, TensorFlow names the parts of a variable itself.
    with tf.variable_scope(_OF_REPLICA.sub("", variable.op.name)):
        biased, local_step = (
            tf.get_variable(name, shape, dtype, zeros, trainable=False, **OF_STATISTICS)
            for name, shape in (("biased", variable.shape), ("local_step", []))
        )
    accumulate = move(biased, value, rate, apply)
    # Held still with the average: counted but not moved, it would correct for too many.
    count = local_step.assign_add(tf.cast(apply, dtype), read_value=False)
    with tf.control_dependencies([accumulate, count]):
        correction = 1 - tf.pow(in_dtype(decay, dtype), local_step.read_value())
        average = biased.read_value() / correction
        if apply is not True:
            # Before the first applied update both are 0: 0 / 0 must not be stored.
            average = tf.where_v2(apply, average, variable.read_value())
    return variable.assign(average).op
