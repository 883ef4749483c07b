"""The networks that pretrained slim checkpoints are of: ResNet-50 v1 and v2, MobileNet-v1.

Contract: the variables have the names and shapes of tf_slim's `resnet_v1_50`,
`resnet_v2_50` and `mobilenet_v1`, and the arithmetic is theirs, so that their checkpoints
restore as they are and give their logits. A model is a plain function as in `models`:
images in [0, 1] go in, and are scaled as slim's own preprocessing for that network does.

Where slim's ResNet strides is slim's own, too: in the last unit of a block and not in the
first, as in the paper.

Sources: He et al., "Deep Residual Learning", 2015 (arXiv:1512.03385), and "Identity
Mappings in Deep Residual Networks", 2016 (arXiv:1603.05027); Howard et al., "MobileNets",
2017 (arXiv:1704.04861); the variables of slim's published checkpoints.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow.compat.v1 as tf

from bn_tf1.jobs.models import Settings, make_weights, normalize

# Blocks of ResNet-50: channels of the bottleneck, units, and the stride of the last unit.
_BLOCKS = ((64, 3, 2), (128, 4, 2), (256, 6, 2), (512, 3, 1))
_EXPANSION = 4
# Layers of MobileNet-v1: stride of the depthwise convolution, channels behind it.
_SEPARABLE = (
    (1, 64),
    (2, 128),
    (1, 128),
    (2, 256),
    (1, 256),
    (2, 512),
    *((1, 512),) * 5,
    (2, 1024),
    (1, 1024),
)
# Means of the red, green and blue of ImageNet, as VGG and slim's resnet_v1 take them.
_MEAN_COLOUR = (123.68, 116.779, 103.939)


# A class, where `models` has functions: two layouts and three networks of one set of layers.
class _Layers(NamedTuple):
    """What the layers of one network have in common.

    Attributes:
        is_training: as for `batch_norm`.
        settings: the settings.
        activation: what follows a batch norm, as `activation` of `batch_norm`.
    """

    is_training: object
    settings: Settings
    activation: str

    @property
    def is_channels_first(self):
        return self.settings.data_format == "NCHW"

    def enter(self, images):
        x = tf.cast(images, self.settings.precision)
        # Once, before the first layer: the data set gives channels last.
        return tf.transpose(x, [0, 3, 1, 2]) if self.is_channels_first else x

    def by_axis(self, length):
        """A list of four: `length` for rows and columns."""
        return (
            [1, 1, length, length] if self.is_channels_first else [1, length, length, 1]
        )

    def strided(self, stride, padding="SAME"):
        """What all operations with a window take."""
        strides, data_format = self.by_axis(stride), self.settings.data_format
        return {"strides": strides, "padding": padding, "data_format": data_format}

    def channels(self, x):
        return tf.dimension_value(x.shape[1 if self.is_channels_first else -1])

    def normalize(self, x, scope="BatchNorm", activation=True, residual=None):
        return normalize(
            x,
            self.is_training,
            self.settings,
            activation=self.activation if activation else None,
            residual=residual,
            name=scope,
            axis=1 if self.is_channels_first else -1,
        )

    def convolution(self, x, filters, size, stride, padding="SAME"):
        """Without normalisation, activation or bias."""
        weights = make_weights([size, size, self.channels(x), filters], self.settings)
        weights = tf.cast(weights, x.dtype)
        return tf.nn.conv2d(x, weights, **self.strided(stride, padding))

    def padded_convolution(self, x, filters, size, stride):
        """As `convolution`, whose result with a stride does not depend on the size of x."""
        if stride == 1:
            return self.convolution(x, filters, size, stride)
        # As slim's: "SAME" with a stride pads an even size in front by one less than an odd
        # one, so that a network would see a photograph shifted by its size.
        before = (size - 1) // 2
        sides = [[0, 0]] * 4
        rows = 2 if self.is_channels_first else 1
        sides[rows] = sides[rows + 1] = [before, size - 1 - before]
        return self.convolution(tf.pad(x, sides), filters, size, stride, "VALID")

    def depthwise(self, x, size, stride):
        shape, name = [size, size, self.channels(x), 1], "depthwise_weights"
        weights = tf.cast(make_weights(shape, self.settings, name=name), x.dtype)
        return tf.nn.depthwise_conv2d(x, weights, **self.strided(stride))

    def max_pool(self, x, size, stride):
        return tf.nn.max_pool(x, ksize=self.by_axis(size), **self.strided(stride))

    def add_bias(self, x):
        bias = tf.get_variable(
            "biases", [self.channels(x)], initializer=tf.zeros_initializer()
        )
        return tf.nn.bias_add(
            x, tf.cast(bias, x.dtype), data_format=self.settings.data_format
        )

    def logits(self, x, scope):
        """From the features to the logits: an average over the image, and a 1x1 convolution."""
        axes = [2, 3] if self.is_channels_first else [1, 2]
        # A convolution, as in slim: its weights have rank 4 in the checkpoints.
        x = tf.reduce_mean(tf.cast(x, tf.float32), axes, keepdims=True)
        with tf.variable_scope(scope):
            x = self.add_bias(self.convolution(x, self.settings.num_classes, 1, 1))
        return tf.squeeze(x, axes)


def resnet_v1_50(images: tf.Tensor, is_training, settings: Settings) -> tf.Tensor:
    """ResNet-50 with batch norm behind each convolution, as slim's `resnet_v1_50`.

    Args:
        images: float32 tensor of shape [batch, height, width, 3] in [0, 1].
        is_training: as for `batch_norm`.
        settings: the settings; slim's own `bn_epsilon` is 1e-5.

    Returns:
        Logits, float32 of shape [batch, num_classes].
    """
    layers = _Layers(is_training, settings, "relu")
    with tf.variable_scope("resnet_v1_50"):
        x = layers.enter(images * 255.0 - tf.constant(_MEAN_COLOUR))
        with tf.variable_scope("conv1"):
            x = layers.normalize(layers.padded_convolution(x, 64, 7, 2))
        x = _blocks(layers.max_pool(x, 3, 2), _bottleneck_v1, layers)
        return layers.logits(x, "logits")


def resnet_v2_50(images: tf.Tensor, is_training, settings: Settings) -> tf.Tensor:
    """ResNet-50 with batch norm before each convolution, as slim's `resnet_v2_50`.

    Arguments and result as for `resnet_v1_50`.
    """
    layers = _Layers(is_training, settings, "relu")
    with tf.variable_scope("resnet_v2_50"):
        x = layers.enter(images * 2.0 - 1.0)
        with tf.variable_scope("conv1"):
            x = layers.add_bias(layers.padded_convolution(x, 64, 7, 2))
        x = _blocks(layers.max_pool(x, 3, 2), _bottleneck_v2, layers)
        return layers.logits(layers.normalize(x, "postnorm"), "logits")


def mobilenet_v1(images: tf.Tensor, is_training, settings: Settings) -> tf.Tensor:
    """MobileNet-v1 of width 1, as slim's `mobilenet_v1`.

    Arguments and result as for `resnet_v1_50`; slim's own `bn_epsilon` is 1e-3. Slim's
    dropout before the logits is not there.
    """
    layers = _Layers(is_training, settings, "relu6")
    with tf.variable_scope("MobilenetV1"):
        x = layers.enter(images * 2.0 - 1.0)
        with tf.variable_scope("Conv2d_0"):
            x = layers.normalize(layers.convolution(x, 32, 3, 2))
        for i, (stride, filters) in enumerate(_SEPARABLE, 1):
            with tf.variable_scope(f"Conv2d_{i}_depthwise"):
                x = layers.normalize(layers.depthwise(x, 3, stride))
            with tf.variable_scope(f"Conv2d_{i}_pointwise"):
                x = layers.normalize(layers.convolution(x, filters, 1, 1))
        return layers.logits(x, "Logits/Conv2d_1c_1x1")


MODELS = {
    "resnet_v1_50": resnet_v1_50,
    "resnet_v2_50": resnet_v2_50,
    "mobilenet_v1": mobilenet_v1,
}


def _blocks(x, bottleneck, layers):
    for number, (filters, units, stride) in enumerate(_BLOCKS, 1):
        for unit in range(1, units + 1):
            # The names of slim's checkpoints, in which a unit's type is a scope of its own.
            scope = f"block{number}/unit_{unit}/{bottleneck.__name__[1:]}"
            with tf.variable_scope(scope):
                x = bottleneck(x, filters, stride if unit == units else 1, layers)
    return x


def _bottleneck_v1(x, filters, stride, layers):
    if layers.channels(x) == filters * _EXPANSION:
        shortcut = _subsampled(x, stride, layers)
    else:
        with tf.variable_scope("shortcut"):
            shortcut = layers.convolution(x, filters * _EXPANSION, 1, stride)
            shortcut = layers.normalize(shortcut, activation=False)
    with tf.variable_scope("conv1"):
        x = layers.normalize(layers.convolution(x, filters, 1, 1))
    with tf.variable_scope("conv2"):
        x = layers.normalize(layers.padded_convolution(x, filters, 3, stride))
    with tf.variable_scope("conv3"):
        x = layers.convolution(x, filters * _EXPANSION, 1, 1)
        return layers.normalize(x, residual=shortcut)


def _bottleneck_v2(x, filters, stride, layers):
    before = layers.normalize(x, "preact")
    if layers.channels(x) == filters * _EXPANSION:
        shortcut = _subsampled(x, stride, layers)
    else:
        with tf.variable_scope("shortcut"):
            shortcut = layers.convolution(before, filters * _EXPANSION, 1, stride)
            shortcut = layers.add_bias(shortcut)
    with tf.variable_scope("conv1"):
        x = layers.normalize(layers.convolution(before, filters, 1, 1))
    with tf.variable_scope("conv2"):
        x = layers.normalize(layers.padded_convolution(x, filters, 3, stride))
    with tf.variable_scope("conv3"):
        x = layers.add_bias(layers.convolution(x, filters * _EXPANSION, 1, 1))
    return shortcut + x


def _subsampled(x, stride, layers):
    # As slim's: the same numbers as a slice, in an operation that keeps the layout.
    return x if stride == 1 else layers.max_pool(x, 1, stride)
