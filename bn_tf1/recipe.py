"""Batch normalization as the article has it, with TensorFlow's own operations.

    y      = gamma * (x - mean) / sqrt(variance + epsilon) + beta
    moving = moving - (1 - decay) * (moving - batch)

    is_training   mean and variance      update operations
    True          those of the batch     move the moving statistics
    False         the moving ones        none
    bool tensor   either, at run time    move them when it is true, else with a decay of 1

This page says what batch normalization means: every other way through the library is
tested against it. `bn_tf1.batch_norm(..., kernel="recipe")` draws this graph, for tools
that read graphs; its other kernels are faster, closer to float64, and guarded against
batches that spoil the statistics.

Source: Ioffe & Szegedy, "Batch Normalization", 2015 (arXiv:1502.03167).
"""

import tensorflow.compat.v1 as tf
from tensorflow.python.training.moving_averages import assign_moving_average


def batch_norm(x, is_training, *, axis=-1, decay=0.99, epsilon=1e-3, name=None):
    """Normalises `x`, float32 or float64 of known rank, over all axes but `axis`.

    The variables `gamma`, `beta`, `moving_mean` and `moving_variance`, [channels], are
    under the scope `name`. A train op must run the operations in `UPDATE_OPS`.
    """
    shape, dtype = [tf.dimension_value(x.shape[axis])], x.dtype.base_dtype
    ones, zeros = tf.ones_initializer(), tf.zeros_initializer()
    with tf.variable_scope(name, "batch_norm", [x]):
        gamma = tf.get_variable("gamma", shape, dtype, ones)
        beta = tf.get_variable("beta", shape, dtype, zeros)
        moving = [
            tf.get_variable("moving_mean", shape, dtype, zeros, trainable=False),
            tf.get_variable("moving_variance", shape, dtype, ones, trainable=False),
        ]
        y, values = normalize(x, is_training, gamma, beta, moving, axis, epsilon)
        if is_training is not False:
            for update in updates_of(moving, values, decay, is_training):
                tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, update)
    return y


def normalize(x, is_training, gamma, beta, moving, axis, epsilon):
    """The output, and the [mean, variance] that it is made with."""
    channels = axis % x.shape.ndims
    # No gradient trains the moving statistics; and where a tool that freezes graphs puts
    # constants in the place of variables, a branch must not return one as it is.
    moving = tuple(tf.stop_gradient(tf.identity(variable)) for variable in moving)

    def of_the_batch():
        return tf.nn.moments(x, [a for a in range(x.shape.ndims) if a != channels])

    if isinstance(is_training, bool):
        values = of_the_batch() if is_training else moving
    else:
        values = tf.cond(is_training, of_the_batch, lambda: moving)
    operands = [*values, beta, gamma]
    if channels != x.shape.ndims - 1:
        shape = [-1] + [1] * (x.shape.ndims - 1 - channels)
        operands = [None if v is None else tf.reshape(v, shape) for v in operands]
    return tf.nn.batch_normalization(x, *operands, epsilon), values


def updates_of(moving, values, decay, is_training):
    """The operations that move the moving mean and variance towards `values`.

    They are outside of the cond: a train op that waits for a branch which is not taken
    does nothing.
    """
    if not isinstance(is_training, bool):
        decay = tf.convert_to_tensor(decay, values[0].dtype)
        decay = tf.where_v2(is_training, decay, 1)
    return [
        assign_moving_average(variable, value, decay, zero_debias=False).op
        for variable, value in zip(moving, values)
    ]
