"""The update of a moving average, its guards and the collection it goes to.

Contract: `update_moving_average` makes one operation that moves a variable towards a
value,

    variable <- variable - (1 - decay) * (variable - value),

or, when `apply` is false at run time, leaves it bit for bit as it is. With
`zero_debias` the variable is the bias-corrected average of Adam: an accumulator that
starts at 0, divided by 1 - decay^n after n updates.

Sources: TensorFlow's `assign_moving_average`; for `zero_debias` Kingma & Ba, "Adam",
2014 (arXiv:1412.6980), section 3.
"""

from __future__ import annotations

from typing import Any

import tensorflow.compat.v1 as tf

# The one private import of bn_tf1: this function has no public name in TensorFlow.
from tensorflow.python.training.moving_averages import assign_moving_average

UPDATE_OPS_COLLECTION = tf.GraphKeys.UPDATE_OPS


def update_moving_average(
    variable: Any,
    value: tf.Tensor,
    decay: float | tf.Tensor,
    *,
    apply: bool | tf.Tensor = True,
    zero_debias: bool = False,
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

    Returns:
        The operation.
    """
    if zero_debias:
        return _zero_debiased_update(variable, value, decay, apply)
    value, decay = _where_applied(variable, value, decay, apply)
    update = assign_moving_average(variable, value, decay, zero_debias=False)
    return update.op


def _where_applied(variable, value, decay, apply):
    """`value` and `decay`, or, where not applied, what leaves `variable` as it is."""
    if apply is True:
        return value, decay
    # In float64 `1 - decay` rounds to the same float32 as the Python float's does.
    kept = tf.where_v2(apply, tf.cast(decay, tf.float64), tf.ones([], tf.float64))
    return tf.where_v2(apply, value, variable.read_value()), kept


def _zero_debiased_update(variable, value, decay, apply):
    """Written out because TensorFlow's own cannot hold its step counter still."""
    dtype = variable.dtype.base_dtype
    zeros = tf.zeros_initializer()
    with tf.variable_scope(variable.op.name):
        biased = tf.get_variable(
            "biased", variable.shape, dtype, zeros, trainable=False
        )
        local_step = tf.get_variable("local_step", [], dtype, zeros, trainable=False)
    accumulate = update_moving_average(biased, value, decay, apply=apply)
    count = local_step.assign_add(tf.cast(apply, dtype), read_value=False)
    with tf.control_dependencies([accumulate, count]):
        correction = 1 - tf.pow(tf.cast(decay, dtype), local_step.read_value())
        average = biased.read_value() / correction
    # Before the first applied update both are 0, and 0 / 0 must not be stored.
    kept = (
        average if apply is True else tf.where_v2(apply, average, variable.read_value())
    )
    return variable.assign(kept).op
