"""Image classifiers: plain functions from images to logits, over `batch_norm`.

Contract: a model is a function `(images, is_training, settings) -> logits`. Weights are
float32 and are initialised from a seed and their own name, so that the same
configuration starts from the same weights on every TensorFlow version. Activations, and
the copies of the weights that they meet, have the precision that is asked for; averages
over an image and the logits are float32. A layer that is normalised has no bias, since
beta takes its place. Weight decay goes to `REGULARIZATION_LOSSES`.
"""

from __future__ import annotations

import math
import zlib
from typing import Any, NamedTuple

import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1 import statistics


class Settings(NamedTuple):
    """What the models have in common.

    Attributes:
        num_classes: the number of logits.
        normalization: "batch" or "none".
        bn_decay, bn_epsilon, bn_kernel: as `decay`, `epsilon` and `kernel` of `batch_norm`.
        weight_decay: factor of the L2 penalty sum(w^2) / 2 on the weights.
        bn_weight_decay: whether the penalty takes in gamma and beta.
        resnet_n: residual blocks per stage of `resnet`.
        seed: seed of the initial weights.
        precision: dtype of the activations, "float32" or "bfloat16". By casts in the
            graph: TensorFlow's own rewrite to bfloat16 leaves a graph as it is, and says
            nothing, on a processor that it does not know to be fast at it.
        scale_features: whether what enters the logits is brought to a size that does not
            depend on the image's, so that one learning rate holds for all of them: in
            `convnet` divided by the square root of the number of places, in `mlp` moved
            from [0, 1] to [-1, 1]. Without it, 3,136 features of MNIST against the 256
            of 8x8 digits let the same rate overshoot, and beta fell until relu gave
            nothing but 0.
        fold_once: in inference, whether batch norm is folded into the weights by
            `tf.local_variables_initializer()`, to be run after every restore, and not
            in each step.
        data_format: "NHWC", or "NCHW" where a model has it.
        bn_normalize_with: "batch", or "moving" where training normalises as inference.
        bn_update: whether training updates the moving statistics.
        bn_train_affine: whether gamma and beta are trained.
        bn_sync: as `sync` of `batch_norm`.
    """

    num_classes: int
    normalization: str = "batch"
    bn_decay: Any = 0.95
    bn_epsilon: float = 1e-3
    bn_kernel: str = "auto"
    weight_decay: float = 0.0
    bn_weight_decay: bool = False
    resnet_n: int = 3
    seed: int = 0
    precision: str = "float32"
    scale_features: bool = True
    fold_once: bool = False
    data_format: str = "NHWC"
    bn_normalize_with: str = "batch"
    bn_update: bool = True
    bn_train_affine: bool = True
    bn_sync: Any = None


def mlp(images: tf.Tensor, is_training, settings: Settings) -> tf.Tensor:
    """Three layers of 100 sigmoid units.

    Source: Ioffe & Szegedy, 2015 (arXiv:1502.03167), section 4.1.

    Args:
        images: float32 tensor of shape [batch, height, width, channels] in [0, 1].
        is_training: as for `batch_norm`.
        settings: the settings.

    Returns:
        Logits, float32 of shape [batch, num_classes].
    """
    x = tf.cast(_flatten(images), settings.precision)
    for i in range(3):
        with tf.variable_scope(f"layer{i + 1}"):
            x = _dense(x, 100, settings)
            x = tf.sigmoid(normalize(x, is_training, settings))
    if settings.scale_features:
        x = 2 * x - 1  # centred: the mean of a sigmoid is near 1/2
    return _logits(x, settings)


def convnet(images: tf.Tensor, is_training, settings: Settings) -> tf.Tensor:
    """Four 3x3 convolutions, with a 2x2 max pooling after the second and the fourth.

    Arguments and result as for `mlp`.
    """
    x = tf.cast(images - 0.5, settings.precision)
    # No stride but the pools': an 8 x 8 digit has 2 x 2 places left.
    for i, filters in enumerate((32, 32, 64, 64)):
        with tf.variable_scope(f"conv{i + 1}"):
            x = _conv(x, filters, settings)
            x = normalize(x, is_training, settings, activation="relu")
        if i % 2:
            x = tf.nn.max_pool(x, [1, 2, 2, 1], [1, 2, 2, 1], "SAME")
    features = tf.cast(_flatten(x), tf.float32)
    if settings.scale_features:
        height, width = (tf.dimension_value(size) for size in x.shape[1:3])
        features *= 1 / math.sqrt(height * width)
    return _logits(features, settings)


def resnet(images: tf.Tensor, is_training, settings: Settings) -> tf.Tensor:
    """The residual network of 6n + 2 layers for small images.

    Three stages of n blocks with 16, 32 and 64 filters; where the size halves, the
    shortcut is subsampled and padded with zero channels (option A).

    Source: He et al., "Deep Residual Learning", 2015 (arXiv:1512.03385), section 4.2.
    Arguments and result as for `mlp`.
    """
    x = tf.cast(images - 0.5, settings.precision)
    with tf.variable_scope("conv1"):
        x = _conv(x, 16, settings)
        x = normalize(x, is_training, settings, activation="relu")
    for stage, filters in enumerate((16, 32, 64)):
        for block in range(settings.resnet_n):
            stride = 2 if stage > 0 and block == 0 else 1
            with tf.variable_scope(f"stage{stage + 1}_block{block + 1}"):
                x = _residual_block(x, filters, stride, is_training, settings)
    return _logits(tf.reduce_mean(tf.cast(x, tf.float32), [1, 2]), settings)


# The names that --model takes, with those of `slim_models`.
MODELS = {"mlp": mlp, "convnet": convnet, "resnet": resnet}


def _residual_block(x, filters, stride, is_training, settings):
    shortcut = x
    if stride > 1:
        # Option A: no parameters, so that the network has those of one without shortcuts.
        added = filters - tf.dimension_value(x.shape[-1])
        shortcut = _subsample(x, stride)
        shortcut = tf.pad(shortcut, [[0, 0], [0, 0], [0, 0], [0, added]])
    with tf.variable_scope("conv1"):
        x = _conv(x, filters, settings, stride=stride)
        x = normalize(x, is_training, settings, activation="relu")
    with tf.variable_scope("conv2"):
        x = _conv(x, filters, settings)
        return normalize(x, is_training, settings, activation="relu", residual=shortcut)


def _subsample(x, stride):
    """x[:, ::stride, ::stride], bit for bit, in a tenth of the time of a slice's."""
    return tf.nn.avg_pool(x, [1, 1, 1, 1], [1, stride, stride, 1], "SAME")


def _logits(x, settings):
    with tf.variable_scope("logits"):
        logits = _dense(tf.cast(x, tf.float32), settings.num_classes, settings)
        return logits + _bias(settings.num_classes)


def normalize(
    x,
    is_training,
    settings,
    *,
    activation=None,
    residual=None,
    name="batch_norm",
    axis=-1,
):
    """Batch norm, or the bias that a layer without it needs, and what follows."""
    if settings.normalization == "none":
        bias = _bias(tf.dimension_value(x.shape[axis]))
        data_format = "NHWC" if axis == -1 else "NCHW"
        x = tf.nn.bias_add(x, tf.cast(bias, x.dtype), data_format)
        return statistics.activated(x, residual, activation)
    penalty = _penalty(settings) if settings.bn_weight_decay else None
    fold = False
    # Folded weights would be rounded to bfloat16; the recipe folds nothing.
    is_folded = settings.precision == "float32" and settings.bn_kernel != "recipe"
    if is_training is False and is_folded:
        # In each step it pays where there are fewer weights than outputs.
        fold = "once" if settings.fold_once else x.op.type == "Conv2D"
    if settings.bn_normalize_with == "moving":
        is_training = False  # after the choice of `fold`, which is for evaluation
    return bn_tf1.batch_norm(
        x,
        is_training,
        update="collection" if settings.bn_update else "skip",
        trainable=settings.bn_train_affine,
        decay=settings.bn_decay,
        epsilon=settings.bn_epsilon,
        regularizers={"gamma": penalty, "beta": penalty},
        kernel=settings.bn_kernel,
        fold=fold,
        sync=settings.bn_sync,
        activation=activation,
        residual=residual,
        axis=axis,
        name=name,
    )


def _conv(x, filters, settings, *, stride=1):
    weights = make_weights([3, 3, tf.dimension_value(x.shape[-1]), filters], settings)
    weights = tf.cast(weights, x.dtype)  # which the optimizer updates in float32
    return tf.nn.conv2d(x, weights, [1, stride, stride, 1], "SAME")


def _dense(x, units, settings):
    weights = make_weights([tf.dimension_value(x.shape[-1]), units], settings)
    return tf.matmul(x, tf.cast(weights, x.dtype))


def _flatten(x):
    return tf.reshape(x, [-1, x.shape[1:].num_elements()])


def _bias(units):
    return tf.get_variable("bias", [units], initializer=tf.zeros_initializer())


def make_weights(shape, settings, *, name="weights"):
    """He-initialised weights: normal with variance 2 / fan_in."""
    full_name = f"{tf.get_variable_scope().name}/{name}"
    # An operation's own seed would depend on how many operations TensorFlow made
    # before it, which differs between versions.
    seed = zlib.crc32(full_name.encode()) ^ settings.seed
    initializer = tf.variance_scaling_initializer(2.0, mode="fan_in", seed=seed)
    return tf.get_variable(
        name, shape, initializer=initializer, regularizer=_penalty(settings)
    )


def _penalty(settings):
    if not settings.weight_decay:
        return None
    return lambda weights: settings.weight_decay * tf.nn.l2_loss(weights)
