"""The moments of a batch that lies on several workers.

    forward    one gather of [count, mean, count * variance], combined in one order
    backward   one gather of the gradients for the joint mean and variance

Contract: unequal and empty batches count as what they are, nothing cancels, and the bits
are the same on all workers.

Source: Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
Sample Variances", 1979.
"""

from __future__ import annotations

import tensorflow.compat.v1 as tf

from bn_tf1.statistics.joint import joint_of_rows
from bn_tf1.statistics.moments import Moments
from bn_tf1.statistics.registered_gradients import (
    gradient_of,
    settings_of,
    with_gradient,
)
from bn_tf1.workers.collectives import Group, gathered

_JOINT_MOMENTS = "bn_tf1.joint_moments"


def joint_moments(moments: Moments, group: Group) -> Moments:
    """The moments of what all workers of `group` have together.

    Args:
        moments: of this worker's values; those of none may be NaN.

    Returns:
        `Moments` of the same dtype. A gradient for them reaches those of every worker.
    """
    count = tf.convert_to_tensor(moments.count, moments.mean.dtype)
    mean, variance = (
        tf.where_v2(count > 0, statistic, tf.zeros_like(statistic))
        for statistic in (moments.mean, moments.variance)
    )
    flat = [tf.reshape(t, [-1]) for t in (count, mean, count * variance)]
    rows = gathered(tf.concat(flat, 0), group)
    joint = joint_of_rows(rows)
    joint = [
        tf.reshape(joint.mean, tf.shape(mean)),
        tf.reshape(joint.variance, tf.shape(mean)),
        joint.count,
    ]
    for tensor, like in zip(joint, (mean, mean)):
        tensor.set_shape(like.shape)
    joint_mean, joint_variance = with_gradient(
        _JOINT_MOMENTS,
        joint[:2],
        [count, mean, variance, joint[2]],
        (0.0, group.size, group.key),
    )
    return Moments(joint_mean, joint_variance, joint[2])


@gradient_of(_JOINT_MOMENTS)
def _joint_gradients(operation, dmean, dvariance, *_):
    """Every worker's output depends on this worker's moments."""
    _, *group = settings_of(operation, 2)
    joint_mean, _, _, count, mean, _, total = operation.inputs
    flat = tf.concat([tf.reshape(t, [-1]) for t in (dmean, dvariance)], 0)
    with tf.name_scope("joint_gradients"):
        sums = tf.reduce_sum(gathered(flat, Group(*group)), 0)
        dmean, dvariance = (
            tf.reshape(part, tf.shape(mean)) for part in tf.split(sums, 2)
        )
        share = count / total
        from_mean = share * (dmean + 2 * dvariance * (mean - joint_mean))
        return None, None, None, None, from_mean, share * dvariance, None
