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

from typing import Any

import tensorflow.compat.v1 as tf

from bn_tf1.statistics import in_dtype

UPDATE_OPS_COLLECTION = tf.GraphKeys.UPDATE_OPS


def update_moving_average(
    variable: Any,
    value: tf.Tensor,
    decay: float | tf.Tensor,
    *,
    apply: bool | tf.Tensor = True,
    zero_debias: bool = False,
    rate: tf.Tensor | None = None,
) -> tf.Operation:
    """Makes the operation that moves `variable` towards `value`.

    Args:
        variable: float variable of any shape.
        value: tensor of the shape and dtype of `variable`.
        decay: share of the old value that is kept, in [0, 1): a float or a scalar
            float tensor.
        apply: True, or a scalar bool tensor: when it is false, nothing changes, not
            even if `value` is NaN.
        zero_debias: corrects for the start at 0, with two more variables, `biased`
            and `local_step`, named as TensorFlow's `assign_moving_average` names
            them. They belong in every checkpoint: without them the first update
            after a restore replaces the average by `value`.
        rate: what `applied_rate` gave for this decay, dtype and `apply`, where several
            variables share it.

    Returns:
        The operation.
    """
    if rate is None:
        rate = applied_rate(update_rate(decay, variable.dtype.base_dtype), apply)
    if zero_debias:
        return _zero_debiased_update(variable, value, rate, decay, apply)
    return _plain_update(variable, value, rate, apply)


def update_rate(decay: float | tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """1 - decay, a scalar of `dtype`."""
    with tf.name_scope("moving_average_rate"):
        return in_dtype(1 - decay, dtype)


def applied_rate(rate: tf.Tensor, apply: bool | tf.Tensor) -> tf.Tensor:
    """`rate`, a scalar, where `apply` is true, and 0 where it is false."""
    if apply is True:
        return rate
    with tf.name_scope("moving_average_rate"):
        return rate * tf.cast(apply, rate.dtype)


def _plain_update(variable, value, rate, apply):
    with tf.name_scope("AssignMovingAvg") as scope:
        difference = _read_when_there(variable, value) - value
        if apply is True:
            change = difference * rate
        else:
            # Exactly 0 where the rate is, even if the difference is NaN.
            change = tf.math.multiply_no_nan(difference, rate)
        return variable.assign_sub(change, name=scope).op


def _read_when_there(variable, value):
    """`variable`, read after `value` was computed.

    In a loop, the read must wait for the update of the iteration before.
    """
    handle = variable.op.outputs[0]
    if handle.dtype.base_dtype == value.dtype:
        # What takes a reference reads it when all that it takes is there.
        return handle
    with tf.control_dependencies([value]):
        return variable.read_value()


def assign_moving_value(
    variable: Any, value: tf.Tensor, *, apply: bool | tf.Tensor = True
) -> tf.Operation:
    """Makes the operation that sets `variable` to `value`, where `apply` is true.

    For a statistic that follows from a moving average. Its arguments are those of
    `update_moving_average`.
    """
    with tf.name_scope("AssignNewValue") as scope:
        if apply is not True:
            with tf.control_dependencies([value]):
                value = tf.where_v2(apply, value, variable.read_value())
        return variable.assign(value, name=scope).op


def _zero_debiased_update(variable, value, rate, decay, apply):
    """Written out because TensorFlow's own cannot hold its step counter still."""
    dtype = variable.dtype.base_dtype
    zeros = tf.zeros_initializer()
    with tf.variable_scope(variable.op.name):
        biased = tf.get_variable(
            "biased", variable.shape, dtype, zeros, trainable=False
        )
        local_step = tf.get_variable("local_step", [], dtype, zeros, trainable=False)
    accumulate = _plain_update(biased, value, rate, apply)
    count = local_step.assign_add(tf.cast(apply, dtype), read_value=False)
    with tf.control_dependencies([accumulate, count]):
        correction = 1 - tf.pow(in_dtype(decay, dtype), local_step.read_value())
        average = biased.read_value() / correction
        if apply is not True:
            # Before the first applied update both are 0: 0 / 0 must not be stored.
            average = tf.where_v2(apply, average, variable.read_value())
    return variable.assign(average).op
