"""The moments of a batch that lies on several workers.

    forward    one gather of [count, mean, variance], combined in one order
    backward   one gather of the gradients for the joint mean and variance

Contract: the bits are the same on all workers. A gradient for the joint moments reaches the
parts of all of them, as every worker's output depends on every part.
"""

from __future__ import annotations

import tensorflow.compat.v1 as tf

from bn_tf1.statistics.joint_batches import joint_of_rows
from bn_tf1.statistics.moments import Moments
from bn_tf1.statistics.registered_gradients import (
    gradient_of,
    settings_of,
    with_gradient,
)
from bn_tf1.workers.collectives import Group, gathered

_JOINT_MOMENTS = "bn_tf1.joint_moments"


def joint_moments(part: Moments, group: Group) -> Moments:
    """The moments of what all workers of `group` have together.

    Args:
        part: `part_moments` of this worker's batch.
    """
    flat = [
        tf.reshape(tensor, [-1]) for tensor in (part.count, part.mean, part.variance)
    ]
    # A gather and no reduce: sums of squares would cancel, and each worker combines the
    # rows in the order of the ranks, so that all get the same bits.
    rows = gathered(tf.concat(flat, 0), group)
    size = part.mean.shape.num_elements()
    counts, means, variances = tf.split(rows, [1, size, size], 1)
    if part.mean.shape.ndims > 1:
        shape = [group.size, *part.mean.shape.as_list()]
        counts = tf.reshape(counts, [-1] + [1] * (len(shape) - 1))
        means, variances = tf.reshape(means, shape), tf.reshape(variances, shape)
    joint = joint_of_rows(counts, means, variances)
    mean, variance = with_gradient(
        _JOINT_MOMENTS,
        [joint.mean, joint.variance],
        [joint.count, *part],
        (0.0, group),
    )
    return Moments(mean, variance, joint.count)


@gradient_of(_JOINT_MOMENTS)
def _gradients(operation, dmean, dvariance, *_):
    joint_mean, _, constant, total, mean, _, count = operation.inputs
    _, group = settings_of(constant)
    # Every worker's loss depends on these moments, so that the slopes of all add up: one
    # collective for both, as for the moments.
    flat = tf.concat([tf.reshape(slope, [-1]) for slope in (dmean, dvariance)], 0)
    sums = tf.reduce_sum(gathered(flat, Group(*group)), 0)
    dmean, dvariance = (tf.reshape(s, tf.shape(mean)) for s in tf.split(sums, 2))
    # A part enters the joint mean with its share, and the joint variance by its own and by
    # how far its mean is from the joint one.
    share = count / total
    from_mean = share * (dmean + 2 * dvariance * (mean - joint_mean))
    return None, None, None, None, from_mean, share * dvariance, None
