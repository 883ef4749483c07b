"""Gradients and batches of several steps for one update of the weights.

    step i of k    sums += gradients of the step; statistics joined with its batch
    step k         gradients = sums / k, clipped, applied; one update of the moving
                   statistics by the k batches together; all that was kept is 0 again

Contract: the optimizer's slots and the global step move once in k steps. What is kept from
step to step are global variables, so that a saver of all of them resumes in the middle of
an accumulation with the same bits: `accumulated_steps`, how many steps were made; V/accumulated
for each variable V that is trained, a sum of gradients; for each layer the mean and the
biased variance of all batches so far as moving_mean/accumulated and
moving_variance/accumulated, and their number of values as moving_mean/accumulated_count,
float64. They are named as an optimizer's slots, which tools leave alone.

The first layer's statistics are then those of one batch with the examples of all k. Those
of a later layer are of inputs that were normalised batch by batch.
"""

from __future__ import annotations

from typing import Any, Callable, Sequence

import tensorflow.compat.v1 as tf

from bn_tf1 import statistics
from bn_tf1.statistics import Moments
from bn_tf1.train_step import joint_updates
from bn_tf1.train_step.joint_updates import Joined


def apply_every(
    steps: int,
    pairs: Sequence[tuple[Any, Any]],
    layers: Sequence[Sequence[Joined]],
    other_updates: Sequence[tf.Operation],
    apply: Callable[[list[tuple[tf.Tensor, Any]]], tf.Operation],
) -> tf.Operation:
    """The operation of one step, of which every k-th applies gradients.

    Args:
        steps: k.
        pairs: (gradient, variable) of each step. `tf.IndexedSlices` are summed up as
            dense tensors, of the size of their variable.
        layers: what `joint_updates.updates_of_layers` gave.
        other_updates: operations that every step runs.
        apply: applies mean gradients, given as (gradient, variable); called inside of a
            `tf.cond`.
    """
    made = _kept("accumulated_steps", [], tf.int64)
    number = made.read_value() + 1
    # Not only equal: who resumes in the middle may do so with fewer steps.
    is_last = tf.greater_equal(number, steps)
    with tf.control_dependencies(other_updates):
        updates = [
            operation
            for layer in layers
            for operation in _accumulated_updates(layer, is_last)
        ]
    # As without accumulation, what fails in an update leaves all else as it was.
    with tf.control_dependencies([*updates, *other_updates]):
        sums = [_sum_of(variable) for _, variable in pairs]
        added = [_add(total, gradient) for total, (gradient, _) in zip(sums, pairs)]
    with tf.control_dependencies(added):
        is_last = tf.identity(is_last)

    def applied():
        means = [
            (_mean(total, number, variable), variable)
            for total, (_, variable) in zip(sums, pairs)
        ]
        # Adam's beta1_power is named by the name scope: as without accumulation, not cond/.
        with tf.name_scope(f"{scope}/" if scope else None):
            updated = apply(means)
        with tf.control_dependencies([updated]):
            cleared = [_clear(total) for total in sums]
        with tf.control_dependencies(cleared):
            return tf.zeros([], tf.int64)

    scope = tf.get_default_graph().get_name_scope()
    # The only way to leave the optimizer's slots as they are in the other steps.
    following = tf.cond(is_last, applied, lambda: tf.identity(number))
    return made.assign(following, read_value=False)


def _accumulated_updates(layer, is_last):
    """The operations that keep, and every k-th time apply, what a layer's batches say."""
    kept = []

    def make(joined):
        with tf.name_scope("accumulated_update"):
            moments = _joined_with_kept(joined, is_last, kept)
        # A count of 0 is no update.
        due = tf.where_v2(is_last, moments.count, tf.zeros_like(moments.count))
        return joint_updates.update_by(moments._replace(count=due), joined)

    return [*joint_updates.in_order(layer, make), *kept]


def _joined_with_kept(joined, is_last, kept):
    """The moments of all batches so far; what keeps them for the next step goes to `kept`."""
    parts = joint_updates.moments_of(joined)
    variables = joined.calls[0].bank.variables
    mean, variance = variables.moving_mean.op.name, variables.moving_variance.op.name
    names = [mean + "/accumulated", variance + "/accumulated"]
    names.append(mean + "/accumulated_count")
    so_far = [
        _kept(name, tensor.shape, tensor.dtype) for name, tensor in zip(names, parts[0])
    ]
    before = Moments(*(variable.read_value() for variable in so_far))
    joint = joint_updates.joint_of_batches([before, *parts], joined)
    # 0 again at the last of k: who resumes there from a checkpoint begins anew.
    kept += [
        variable.assign(
            tf.where_v2(is_last, tf.zeros_like(value), value), read_value=False
        )
        for variable, value in zip(so_far, joint)
    ]
    return joint


def _kept(name, shape, dtype):
    """A variable for the next step, 0 at first, and saved with all others."""
    # Its initial value waits for no update. A reference would be read whenever what takes
    # it runs, before or after an assignment.
    with tf.name_scope(None), tf.control_dependencies(None):
        zeros = tf.zeros(shape, dtype)
        return tf.Variable(zeros, trainable=False, name=name, use_resource=True)


def _sum_of(variable):
    with tf.device(variable.device):
        name = variable.op.name + "/accumulated"
        # A sum may be too large for a type that its mean is not too large for.
        dtype = variable.dtype.base_dtype
        dtype = statistics.statistics_dtype(dtype) if dtype.is_floating else dtype
        return _kept(name, variable.shape, dtype)


def _add(total, gradient):
    # Row by row: a dense gradient of an embedding would be as large as that.
    if isinstance(gradient, tf.IndexedSlices):
        values = tf.cast(gradient.values, total.dtype)
        return total.scatter_add(tf.IndexedSlices(values, gradient.indices)).op
    return total.assign_add(tf.cast(gradient, total.dtype), read_value=False)


def _mean(total, number, variable):
    mean = total.read_value() / tf.cast(number, total.dtype)
    return tf.cast(mean, variable.dtype.base_dtype)


def _clear(total):
    zeros = tf.zeros(total.shape, total.dtype.base_dtype)
    return total.assign(zeros, read_value=False)
