"""Batch-norm layers to compare with: `layer(x, is_training, axis)` returns the output.

All create their variables and put their updates into `UPDATE_OPS`, except the raw kernel
and the copy, which are limits and not layers.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1 import recipe as page
from bn_tf1.compiled import is_built
from tests.benchmarks import timing

EPSILON = 1e-3
DECAY = 0.99
GHOST_BATCH = 4
ON_TENSORFLOW_1 = tf.version.VERSION.startswith("1.")

OURS = timing.OURS
COMPILED = "bn_tf1 compiled"


def ours(x, is_training, axis=-1, **after):
    return bn_tf1.batch_norm(x, is_training, axis=axis, **after)


def composed(x, is_training, axis=-1, **after):
    return bn_tf1.batch_norm(x, is_training, axis=axis, kernel="composed", **after)


def compiled(x, is_training, axis=-1, **after):
    return bn_tf1.batch_norm(x, is_training, axis=axis, kernel="compiled", **after)


def switched(x, is_training, axis=-1, **after):
    """With a tensor in the place of the Python bool."""
    mode = tf.placeholder_with_default(is_training, [])
    return bn_tf1.batch_norm(x, mode, axis=axis, **after)


# Those that take an activation and a residual; they follow all others as one writes them.
WITH_FOLLOWERS = (ours, composed, compiled, switched)


def recipe(x, is_training, axis=-1):
    """The library's page, which is what articles have, with their tensor for a mode."""
    mode = tf.placeholder_with_default(is_training, [])
    return page.batch_norm(x, mode, axis=axis)


def mask_of(x, axis=-1):
    """1 for seven values in eight of the first two axes but the channels', 0 for the rest.

    Of an image, whole rows; of a sequence, steps.
    """
    channels = axis % x.shape.ndims
    sizes = [1] * x.shape.ndims
    for a in [a for a in range(x.shape.ndims) if a != channels][:2]:
        sizes[a] = tf.dimension_value(x.shape[a])
    counts = np.random.RandomState(0).randint(0, 8, sizes)
    return tf.constant(counts > 0, x.dtype)


def ours_masked(x, is_training, axis=-1):
    return bn_tf1.batch_norm(x, is_training, axis=axis, weights=mask_of(x, axis))


def recipe_masked(x, is_training, axis=-1):
    """What the recipe does with a batch, with tf.nn.weighted_moments."""
    channels = axis % x.shape.ndims
    axes = [a for a in range(x.shape.ndims) if a != channels]
    mean, variance = tf.nn.weighted_moments(x, axes, mask_of(x, axis), keep_dims=True)
    gamma, beta = _updated_towards(mean, variance)
    return tf.nn.batch_normalization(x, mean, variance, beta, gamma, EPSILON)


def _updated_towards(mean, variance):
    """Variables gamma and beta, with moving statistics that are updated."""
    shape = mean.shape.as_list()
    with tf.variable_scope(None, "recipe"):
        (gamma, moving_variance), (beta, moving_mean) = (
            [
                tf.get_variable(learned, shape, initializer=initializer),
                tf.get_variable(
                    moving, shape, initializer=initializer, trainable=False
                ),
            ]
            for learned, moving, initializer in (
                ("gamma", "moving_variance", tf.ones_initializer()),
                ("beta", "moving_mean", tf.zeros_initializer()),
            )
        )
    for update in page.updates_of(
        [moving_mean, moving_variance], [mean, variance], DECAY, True
    ):
        tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, update)
    return gamma, beta


def ours_in_ghost_batches(x, is_training, axis=-1):
    return bn_tf1.batch_norm(x, is_training, axis=axis, ghost_batch_size=GHOST_BATCH)


def recipe_in_ghost_batches(x, is_training, axis=-1):
    """The recipe on ghost batches as tf.layers makes them, with the mean of their moments."""
    channels = axis % x.shape.ndims + 1
    batch, *others = x.shape.as_list()
    split = tf.reshape(x, [GHOST_BATCH, batch // GHOST_BATCH, *others])
    axes = [a for a in range(split.shape.ndims) if a not in (1, channels)]
    mean, variance = tf.nn.moments(split, axes, keep_dims=True)
    gamma, beta = _updated_towards(
        *(tf.reduce_mean(v, 1, True) for v in (mean, variance))
    )
    y = tf.nn.batch_normalization(split, mean, variance, beta, gamma, EPSILON)
    return tf.reshape(y, x.shape)


def raw_kernel(x, is_training, axis=-1):
    """The fused kernel on an image of the same values, with nothing around it."""
    channels = tf.dimension_value(x.shape[axis])
    with tf.variable_scope(None, "raw"):
        gamma = tf.get_variable("gamma", [channels], initializer=tf.ones_initializer())
        beta = tf.get_variable("beta", [channels], initializer=tf.zeros_initializer())
    last = axis in (-1, x.shape.ndims - 1)
    image = x
    if x.shape.ndims != 4:
        size = tf.dimension_value(x.shape[0])
        image = tf.reshape(
            x, [size, -1, 1, channels] if last else [size, channels, -1, 1]
        )
    constant = [] if is_training else tf.ones([channels])
    y = tf.raw_ops.FusedBatchNormV3(
        x=image,
        scale=gamma,
        offset=beta,
        mean=constant,
        variance=constant,
        epsilon=EPSILON,
        data_format="NHWC" if last else "NCHW",
        is_training=is_training,
    ).y
    return tf.reshape(y, x.shape) if image is not x else y


def copy(x, is_training, axis=-1):
    """The limit: every byte read once and written once."""
    return x * 1.0001


def bias(x, is_training, axis=-1):
    """The limit of a layer in inference: what a network without batch norm has."""
    channels = tf.dimension_value(x.shape[axis])
    with tf.variable_scope(None, "bias"):
        offset = tf.get_variable("b", [channels], initializer=tf.zeros_initializer())
    return tf.nn.bias_add(x, offset)


def tf_layers(x, is_training, axis=-1):
    return tf.layers.batch_normalization(x, axis=axis, training=is_training)


def contrib(x, is_training, axis=-1):
    # Imported here: it takes seconds, and TensorFlow 2 has none.
    from tensorflow.contrib import layers

    return layers.batch_norm(x, scale=True, is_training=is_training, fused=True)


def tf_keras_layer(x, is_training, axis=-1):
    import tf_keras

    return tf_keras.layers.BatchNormalization(axis=axis)(x, training=is_training)


def layers_for(shape, axis):
    """The contenders that this TensorFlow has for the shape, by name."""
    last = axis in (-1, len(shape) - 1)
    found = {
        "recipe": recipe,
        OURS: ours,
        "bn_tf1 composed": composed,
        "bn_tf1 tensor mode": switched,
    }
    if is_built():
        found[COMPILED] = compiled
    if last or not ON_TENSORFLOW_1:
        found["raw kernel"] = raw_kernel
    if ON_TENSORFLOW_1:
        if last or len(shape) != 4:  # of images it fuses every layout, and then fails
            found["tf.layers"] = tf_layers
        if last and len(shape) in (2, 4):
            found["contrib fused"] = contrib
    elif importlib.util.find_spec("tf_keras"):
        found["tf_keras"] = tf_keras_layer
    found["copy"] = copy
    return found
