"""Batch-norm layers of many makers, and small training graphs around them.

A maker is a function (x, is_training) -> y that builds one layer in the variable scope
"bn". Each is written as its library's documentation, or the article that made it
popular, tells; nothing of `bn_tf1` is used but in `ours`. `MAKERS` holds those that this
TensorFlow has.
"""

from __future__ import annotations

import tensorflow.compat.v1 as tf
from tensorflow.python.training.moving_averages import assign_moving_average

import bn_tf1

IS_1 = tf.version.VERSION.startswith("1")
CHANNELS = 4


# ---------------------------------------------------------------------- written by hand


def ours(x, is_training, kernel="fused", **options):
    return bn_tf1.batch_norm(x, is_training, kernel=kernel, name="bn", **options)


def ours_composed(x, is_training, **options):
    return ours(x, is_training, kernel="composed", **options)


def ours_in_ghost_batches(x, is_training, **options):
    return ours(x, is_training, kernel="auto", ghost_batch_size=4, **options)


def _variables(channels, names=("gamma", "beta", "moving_mean", "moving_variance")):
    gamma, beta, mean, variance = names
    return (
        tf.get_variable(gamma, [channels], initializer=tf.ones_initializer()),
        tf.get_variable(beta, [channels], initializer=tf.zeros_initializer()),
        tf.get_variable(
            mean, [channels], initializer=tf.zeros_initializer(), trainable=False
        ),
        tf.get_variable(
            variance, [channels], initializer=tf.ones_initializer(), trainable=False
        ),
    )


def _axes(x):
    return list(range(x.shape.ndims - 1))


def _either(is_training, in_training, in_inference):
    if isinstance(is_training, bool):
        return in_training() if is_training else in_inference()
    return tf.cond(is_training, in_training, in_inference)


def with_nn(x, is_training, decay=0.99, epsilon=1e-3, collect=True, zero_debias=False):
    """tf.nn.moments, tf.nn.batch_normalization and assign_moving_average."""
    with tf.variable_scope("bn"):
        gamma, beta, moving_mean, moving_variance = _variables(int(x.shape[-1]))
        if is_training is not False:
            batch_mean, batch_variance = tf.nn.moments(x, _axes(x))
            if collect:
                for moving, batch in (
                    (moving_mean, batch_mean),
                    (moving_variance, batch_variance),
                ):
                    update = assign_moving_average(
                        moving, batch, decay, zero_debias=zero_debias
                    )
                    tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, update)
        mean, variance = _either(
            is_training,
            lambda: (tf.identity(batch_mean), tf.identity(batch_variance)),
            lambda: (tf.identity(moving_mean), tf.identity(moving_variance)),
        )
        return tf.nn.batch_normalization(x, mean, variance, beta, gamma, epsilon)


def with_ema_class(x, is_training):
    """The answer that a generation copied: ExponentialMovingAverage inside of tf.cond."""
    with tf.variable_scope("bn"):
        channels = int(x.shape[-1])
        beta = tf.get_variable("beta", [channels], initializer=tf.zeros_initializer())
        gamma = tf.get_variable("gamma", [channels], initializer=tf.ones_initializer())
        batch_mean, batch_variance = tf.nn.moments(x, _axes(x), name="moments")
        ema = tf.train.ExponentialMovingAverage(decay=0.9)

        def with_update():
            with tf.control_dependencies([ema.apply([batch_mean, batch_variance])]):
                return tf.identity(batch_mean), tf.identity(batch_variance)

        if is_training is True:
            mean, variance = with_update()
        else:
            ema_apply = ema.apply([batch_mean, batch_variance])

            def updated():
                with tf.control_dependencies([ema_apply]):
                    return tf.identity(batch_mean), tf.identity(batch_variance)

            mean, variance = _either(
                is_training,
                updated,
                lambda: (ema.average(batch_mean), ema.average(batch_variance)),
            )
        return tf.nn.batch_normalization(x, mean, variance, beta, gamma, 1e-3)


def with_pop_variables(x, is_training):
    """The article's wrapper: pop_mean and pop_var, assigned in place."""
    with tf.variable_scope("bn"):
        scale, beta, pop_mean, pop_var = _variables(
            int(x.shape[-1]), ("scale", "beta", "pop_mean", "pop_var")
        )
        if is_training is False:
            return tf.nn.batch_normalization(x, pop_mean, pop_var, beta, scale, 1e-3)
        batch_mean, batch_var = tf.nn.moments(x, _axes(x))
        train_mean = tf.assign(pop_mean, pop_mean * 0.999 + batch_mean * (1 - 0.999))
        train_var = tf.assign(pop_var, pop_var * 0.999 + batch_var * (1 - 0.999))
        with tf.control_dependencies([train_mean, train_var]):
            return tf.nn.batch_normalization(
                x, batch_mean, batch_var, beta, scale, 1e-3
            )


def raw_arithmetic(x, is_training):
    """Means of squares, a square root and a division, scale and offset apart."""
    with tf.variable_scope("bn"):
        gamma, beta, moving_mean, moving_variance = _variables(int(x.shape[-1]))
        if is_training is False:
            mean, variance = moving_mean, moving_variance
        else:
            mean = tf.reduce_mean(x, _axes(x))
            variance = tf.reduce_mean(tf.square(x), _axes(x)) - tf.square(mean)
            for moving, batch in ((moving_mean, mean), (moving_variance, variance)):
                update = tf.assign_sub(moving, 0.1 * (moving - batch))
                tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, update)
        scale = gamma / tf.sqrt(variance + 1e-4)
        offset = beta - mean * scale
        return x * scale + offset


def textbook(x, is_training):
    """gamma * (x - mean) / sqrt(variance + epsilon) + beta, as on paper."""
    with tf.variable_scope("bn"):
        gamma, beta, moving_mean, moving_variance = _variables(int(x.shape[-1]))
        if is_training is False:
            mean, variance = moving_mean, moving_variance
        else:
            mean = tf.reduce_mean(x, _axes(x), keepdims=True)
            variance = tf.reduce_mean(tf.square(x - mean), _axes(x), keepdims=True)
            for moving, batch in ((moving_mean, mean), (moving_variance, variance)):
                update = tf.assign(moving, 0.9 * moving + 0.1 * tf.reshape(batch, [-1]))
                tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, update)
        normalized = (x - mean) / tf.pow(variance + 1e-5, 0.5)
        return gamma * normalized + beta


def with_fused_kernel(x, is_training, data_format="NHWC", epsilon=1e-3):
    """tf.nn.fused_batch_norm and its own updates."""
    channels = int(x.shape[1 if data_format == "NCHW" else -1])
    with tf.variable_scope("bn"):
        gamma, beta, moving_mean, moving_variance = _variables(channels)
        options = {"epsilon": epsilon, "data_format": data_format}

        def in_training():
            return tf.nn.fused_batch_norm(x, gamma, beta, **options)

        def in_inference():
            return tf.nn.fused_batch_norm(
                x,
                gamma,
                beta,
                moving_mean,
                moving_variance,
                is_training=False,
                **options,
            )

        y, mean, variance = _either(is_training, in_training, in_inference)
        if is_training is not False:
            for moving, batch in ((moving_mean, mean), (moving_variance, variance)):
                update = assign_moving_average(moving, batch, 0.9, zero_debias=False)
                tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, update)
        return y


# ---------------------------------------------------------------- libraries of 1.15 alone


def tf_layers(x, is_training, **options):
    return tf.layers.batch_normalization(x, training=is_training, name="bn", **options)


def tf_layers_composed(x, is_training, **options):
    return tf_layers(x, is_training, fused=False, **options)


def tf_layers_renorm(x, is_training):
    return tf_layers(x, is_training, renorm=True)


def tf_layers_virtual(x, is_training):
    return tf_layers(x, is_training, virtual_batch_size=4)


def contrib(x, is_training, **options):
    from tensorflow.contrib.layers import batch_norm

    return batch_norm(x, is_training=is_training, scope="bn", **options)


def contrib_composed(x, is_training, **options):
    return contrib(x, is_training, fused=False, scale=True, **options)


def contrib_in_place(x, is_training):
    return contrib(x, is_training, updates_collections=None)


def keras(x, is_training, **options):
    layer = tf.keras.layers.BatchNormalization(name="bn", **options)
    y = layer(x, training=is_training)
    for update in layer.updates:
        tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, update)
    return y


MAKERS = {
    maker.__name__: maker
    for maker in (
        ours,
        ours_composed,
        ours_in_ghost_batches,
        with_nn,
        with_ema_class,
        with_pop_variables,
        raw_arithmetic,
        textbook,
        with_fused_kernel,
    )
}
if IS_1:
    MAKERS.update(
        {
            maker.__name__: maker
            for maker in (
                tf_layers,
                tf_layers_composed,
                tf_layers_renorm,
                tf_layers_virtual,
                contrib,
                contrib_composed,
                contrib_in_place,
                keras,
            )
        }
    )


# -------------------------------------------------------------------------- around them


def images(batch=8, size=5):
    return tf.placeholder(tf.float32, [batch, size, size, 3], name="images")


def convolution(x, filters=CHANNELS, name="conv"):
    with tf.variable_scope(name):
        weights = tf.get_variable("weights", [3, 3, int(x.shape[-1]), filters])
        return tf.nn.conv2d(x, weights, [1, 1, 1, 1], "SAME")


def logits_of(y):
    with tf.variable_scope("logits"):
        weights = tf.get_variable("weights", [int(y.shape[-1]), 3])
        return tf.matmul(tf.reduce_mean(tf.nn.relu(y), [1, 2]), weights, name="logits")


def loss_of(y):
    labels = tf.placeholder(tf.int64, [None], name="labels")
    return tf.losses.sparse_softmax_cross_entropy(labels, logits_of(y))


def make_train_op(loss, updates=None, optimizer=None):
    """The usual train op: updates first, then the gradients."""
    optimizer = optimizer or tf.train.AdamOptimizer()
    if updates is None:
        updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
    with tf.control_dependencies(updates):
        return optimizer.minimize(loss, tf.train.get_or_create_global_step())


def training_graph(maker, is_training=True, updates=None, **options):
    """A whole training graph around one layer; returns its loss."""
    loss = loss_of(maker(convolution(images()), is_training, **options))
    make_train_op(loss, updates)
    return loss
