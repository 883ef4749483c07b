"""Sums and products by channel, each by the cheapest operation for the layout.

Contract: a `Channels` sees a tensor of any rank as it is, or as an image,

    Channels   as it is                 by reductions and broadcasting alone
    Last       [a, b, 1, channels]      the channels change fastest; several neighbours
                                        may be seen as one, with as many times the channels
    Between    [a, 1, 1, b * channels]  two groups of channel axes with others in between,
                                        as those of ghost batches
    Middle     [a, channels, b, 1]      a channel lies in one piece, once per example

by reshaping, which copies nothing, and offers on it what batch normalization needs. All
operations have gradients of every order. Several channel axes are seen as one where they
are neighbours. Which of them is the fastest for what is chosen in `plan`.

Why these operations (measured on two CPU cores, TensorFlow 1.15.5 and 2.21.0, tensors of
33 MB): a batched product with a matrix of ones, or where sizes are unknown `BiasAddGrad`,
sums by channel three times faster than `tf.reduce_sum`, whose inner loop runs over the
channels; the filter gradient of a depthwise 1x1 convolution is the sum of products without
writing the products, and a norm that of squares; that convolution, and `tf.nn.bias_add`,
broadcast faster than `*` and `+`.

One long sum of numbers of one sign is off by up to a hundred times the rounding error of a
number. The batched product gives sums over parts, a reduction of `Middle` those over
examples; their own sum, of few numbers, costs nothing in float64.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.statistics.registered_gradients import (
    SUM_OF_SQUARES,
    gradient_of,
    with_gradient,
)

IS_TENSORFLOW_1 = tf.version.VERSION.startswith("1.")

# The kernel for what looks like a layer to `tf.contrib.quantize`, and cannot be folded.
UNFOLDED = tf.raw_ops.FusedBatchNormV3
if IS_TENSORFLOW_1:
    UNFOLDED = tf.raw_ops.FusedBatchNormV2  # it knows the first version and the third

_STRIDES = [1, 1, 1, 1]

# Channels: fewer than these `tf.reduce_sum` adds up as fast as `BiasAddGrad`, or faster.
_NARROW = 32
# Rows: as many as are summed in one go with hardly an error, and as many as parts have.
_FEW = 16
_MANY = 2**10


@dataclasses.dataclass(frozen=True)
class Channels:
    """Tensors of one shape, seen as they are.

    Attributes:
        shape: the static shape from outside.
        axes: the channel axes, ascending.
        places: how many neighbours are seen as one.
        has_short_sums: whether a sum over a channel is of few values, or of sums over
            parts.
        takes_kernel: whether the fused kernel for fixed statistics serves float32 values
            in this layout, and is fast.
    """

    shape: tf.TensorShape
    axes: tuple[int, ...]
    places = 1
    has_short_sums = False
    takes_kernel = False

    def enter(self, x: tf.Tensor) -> tf.Tensor:
        """`x` in this layout; more of its static shape may be known than from outside."""
        return x

    def leave(self, values: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
        """`values`, which are in this layout, in the shape of `x` again."""
        return values

    def sum(self, values: tf.Tensor, weights: tf.Tensor | None = None) -> tf.Tensor:
        """The sum over each channel of `values`, or of weights * values.

        Args:
            weights: like `values` seen from outside, but of size 1 on the channel axes.
        """
        values = values if weights is None else weights * values
        reduced = [a for a in range(self.shape.ndims) if a not in self.axes]
        return tf.reduce_sum(values, reduced)

    def average(
        self, values: tf.Tensor, count: tf.Tensor, weights: tf.Tensor | None = None
    ) -> tf.Tensor:
        """sum / count; with the error of one rounding, if it `has_short_sums`."""
        return self.sum(values, weights) / count

    def sum_of_squares(self, values: tf.Tensor) -> tf.Tensor:
        """The sum over each channel of the squares."""
        return self.sum(values * values)

    def both_sums(self, values: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """`sum` and `sum_of_squares`."""
        reduced = [a for a in range(self.shape.ndims) if a not in self.axes]
        reduced = tf.constant(reduced)  # one for both
        return tuple(tf.reduce_sum(v, reduced) for v in (values, values * values))

    def dot(self, values: tf.Tensor, others: tf.Tensor) -> tf.Tensor:
        """The sum over each channel of the products."""
        return self.sum(values * others)

    def add(self, values: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
        """values + offset."""
        return values + along(offset, self.shape, self.axes)

    def centre(self, values: tf.Tensor, mean: tf.Tensor) -> tf.Tensor:
        """values - mean."""
        return values - along(mean, self.shape, self.axes)

    def scale(self, values: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
        """values * factor."""
        return self.scale_last_read(values, factor)

    def scale_last_read(self, values: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
        """As `scale`, for values that are read by nothing later.

        TensorFlow then writes the products over the values, where a convolution would
        take memory for one more tensor.
        """
        return values * along(factor, self.shape, self.axes)

    def for_places(self, by_channel: tf.Tensor) -> tf.Tensor:
        """`by_channel` once for each place that is seen as one with others."""
        return by_channel

    def over_places(self, sums: tf.Tensor) -> tf.Tensor:
        """The sums by channel, of those for parts, or for places that are seen as one."""
        return sums


@dataclasses.dataclass(frozen=True)
class _Image(Channels):
    """What the layouts of rank 4 have in common.

    Attributes:
        sizes: what to reshape to, with -1 for the size that is left.
    """

    sizes: Sequence[Any]
    data_format = "NHWC"

    def enter(self, x):
        # An image that stays as it is has sizes of None where they are not known.
        if None in self.sizes or x.shape.as_list() == self.sizes:
            return x
        return tf.reshape(x, self.sizes)

    def leave(self, values, x):
        return values if x.shape.as_list() == self.sizes else as_before(values, x)

    def sum(self, values, weights=None):
        return self.over_places(self._partial_sums(values, weights))

    def average(self, values, count, weights=None):
        sums = self._partial_sums(values, weights)
        if not self.has_short_sums or sums.shape.ndims == 1:
            return self.over_places(sums) / count
        # There are few of them: in float64 their sum costs nothing, and the mean is left
        # with the error of one rounding, whatever N is.
        sums = self.over_places(tf.cast(sums, tf.float64))
        return tf.cast(sums / tf.cast(count, tf.float64), values.dtype)

    @property
    def has_short_sums(self):
        return self.sizes[0] != 1

    def add(self, values, offset):
        return tf.nn.bias_add(values, self.for_places(offset), self.data_format)

    def centre(self, values, mean):
        # `tf.nn.bias_add` broadcasts faster than `-`, and has no like that subtracts.
        return self.add(values, -mean)

    def sum_of_squares(self, values):
        return self.dot(values, values)

    def both_sums(self, values):
        return self.sum(values), self.sum_of_squares(values)

    def scale_last_read(self, values, factor):
        return values * self.for_places(factor)

    def for_places(self, by_channel):
        return by_channel if len(self.axes) == 1 else tf.reshape(by_channel, [-1])

    def over_places(self, sums):
        if self._count not in (-1, tf.dimension_value(sums.shape[-1])):
            sums = tf.reshape(sums, [-1, self._count])
        leading = list(range(sums.shape.ndims - 1))
        sums = tf.reduce_sum(sums, leading) if leading else sums
        if len(self.axes) == 1:
            return sums
        return tf.reshape(sums, for_reshape(self.shape[a] for a in self.axes))


@dataclasses.dataclass(frozen=True)
class Middle(_Image):
    """[a, channels, b, 1]."""

    data_format = "NCHW"

    def sum_of_squares(self, values):
        # XLA has no kernel for a norm.
        if "_xla_compile_id" in values.op.node_def.attr:
            return self.sum(tf.square(values))
        # By example and channel, in one read that writes no squares of the size of `x`.
        norms = tf.raw_ops.EuclideanNorm(input=values, axis=[2, 3])
        sums = self.over_places(tf.square(norms))
        return with_gradient(SUM_OF_SQUARES, [sums], [values])[0]

    def _partial_sums(self, values, weights):
        if weights is None:
            # One sum for each example: the inner loop runs over what lies in one piece.
            return tf.reduce_sum(values, [2, 3])
        examples, channels, size, _ = self.sizes
        weights = tf.reshape(weights, [examples, 1, size])
        values = tf.reshape(values, [examples, channels, size])
        return tf.matmul(weights, values, transpose_b=True)

    @property
    def _count(self):
        return self.sizes[1]

    def scale_last_read(self, values, factor):
        return values * tf.reshape(factor, [-1, 1, 1])


@gradient_of(SUM_OF_SQUARES)
def _sum_of_squares_gradient(operation, dsums, _):
    # That of a norm is NaN where the norm is 0.
    return None, 2 * operation.inputs[1] * tf.reshape(dsums, [-1, 1, 1])


@dataclasses.dataclass(frozen=True)
class Last(_Image):
    """[a, b, 1, channels].

    Attributes:
        dot_sizes: the sizes for the convolution of `dot`, if they are not `sizes`; with
            more neighbours seen as one, more sums are made and each has fewer terms.
    """

    places: int = 1
    dot_sizes: Any = None

    @property
    def by_convolution(self) -> bool:
        """Whether `dot` and `scale` are depthwise convolutions."""
        # It shares its work out over the first size.
        return self.sizes[0] != 1 and len(self.axes) == 1

    @property
    def takes_kernel(self):
        # Those of oneDNN are slow where the channels are no multiple of 4.
        narrow = not IS_TENSORFLOW_1 and self.sizes[-1] % 4 != 0
        return len(self.axes) == 1 and not narrow

    @property
    def has_short_sums(self):
        parts, size = self._parts
        return parts != 1 or 0 < size <= _FEW

    def _partial_sums(self, values, weights):
        parts, size = self._parts
        if weights is not None:
            weights = tf.reshape(weights, [parts, 1, size])
        elif parts == 1:
            return self._sum_in_one_go(values)
        else:
            weights = tf.constant(1.0, values.dtype, [1, 1, size])
        # Three times as fast as `tf.reduce_sum`, whose inner loop runs over the channels.
        return tf.matmul(weights, tf.reshape(values, [parts, size, self._count]))

    def _sum_in_one_go(self, values):
        if 0 < self.sizes[-1] < _NARROW:
            return tf.reduce_sum(values, list(range(values.shape.ndims - 1)))
        return tf.raw_ops.BiasAddGrad(out_backprop=values)

    def dot(self, values, others):
        if not self.by_convolution:
            return self.sum(values * others)
        wide = (self.dot_sizes or self.sizes)[-1]
        if self.dot_sizes is not None:
            values, others = (tf.reshape(t, self.dot_sizes) for t in (values, others))
        # The gradient of a 1x1 filter is this sum, and no product of two tensors of the
        # size of `x` is written for it.
        products = tf.nn.depthwise_conv2d_native_backprop_filter(
            values, [1, 1, wide, 1], others, _STRIDES, "VALID"
        )
        return self.over_places(tf.squeeze(products, [0, 1, 3]))

    def scale(self, values, factor):
        if not self.by_convolution:
            return self.scale_last_read(values, factor)
        factor = tf.reshape(self.for_places(factor), [1, 1, -1, 1])
        return tf.nn.depthwise_conv2d_native(values, factor, _STRIDES, "VALID")

    def for_places(self, by_channel):
        by_channel = super().for_places(by_channel)
        return by_channel if self.places == 1 else tf.tile(by_channel, [self.places])

    @property
    def _parts(self):
        """How many parts of what size a sum is made of.

        -1 is for what is not known when the graph is built.
        """
        examples, *others, _ = self.sizes
        if None in others or -1 in others:
            return 1, -1
        rows = int(np.prod(others)) * self.places
        if examples in (None, -1):
            # The product over each part is a task of its own: few, large ones are faster.
            size = _divisor(rows, at_most=_MANY)
            return (-1, size) if 4 * size >= min(rows, _MANY) else (1, -1)
        rows *= examples
        most = min(max(rows // 16, _FEW), _MANY)
        size = _divisor(rows, at_most=most)
        return (rows // size, size) if 4 * size >= min(rows, most) else (1, rows)

    @property
    def _count(self):
        return self.sizes[-1] // self.places


@dataclasses.dataclass(frozen=True)
class Between(_Image):
    """[a, 1, 1, groups * b * channels], with the channel axes `groups` and `channels`.

    Attributes:
        between: [groups, b, channels], with -1 for an unknown number of groups.
    """

    between: Sequence[int]

    def _partial_sums(self, values, weights):
        groups, size, channels = self.between
        if weights is None:
            weights = tf.constant(1.0, values.dtype, [1, 1, 1, size])
        else:
            weights = tf.reshape(weights, [-1, 1, 1, size])
        values = tf.reshape(values, [self.sizes[0], groups, size, channels])
        return tf.squeeze(tf.matmul(weights, values), [2])

    def for_places(self, by_channel):
        _, size, _ = self.between
        by_channel = tf.tile(tf.expand_dims(by_channel, 1), [1, size, 1])
        return tf.reshape(by_channel, [-1])

    def over_places(self, sums):
        return tf.reduce_sum(sums, 0)


def fixed_by_kernel(
    values: tf.Tensor,
    scale: tf.Tensor,
    offset: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    *,
    epsilon: float,
    kernel: Callable = tf.raw_ops.FusedBatchNormV3,
) -> tf.Tensor:
    """scale * (values - mean) / sqrt(variance + epsilon) + offset, for what is constant.

    One pass over the data in place of three. Only for float32 values of `Channels` that take
    the kernel, and vectors that are `for_places`.
    """
    return kernel(
        x=values,
        scale=scale,
        offset=offset,
        mean=mean,
        variance=variance,
        epsilon=epsilon,
        is_training=False,
    ).y


def fixed_gradients_by_kernel(
    dy: tf.Tensor,
    values: tf.Tensor,
    scale: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    *,
    epsilon: float,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The gradients of `fixed_by_kernel` for the values, the scale and the offset."""
    dx, dscale, doffset, _, _ = tf.raw_ops.FusedBatchNormGradV3(
        y_backprop=dy,
        x=values,
        scale=scale,
        reserve_space_1=mean,
        reserve_space_2=variance,
        reserve_space_3=tf.constant([], tf.float32),
        epsilon=epsilon,
        is_training=False,
    )
    return dx, dscale, doffset


def as_before(values: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """`values`, which were reshaped, in the shape of `x` again."""
    known = for_reshape(x.shape)
    if known.count(-1) <= 1:
        return tf.reshape(values, known)
    values = tf.reshape(values, tf.shape(x))
    values.set_shape(x.shape)
    return values


def along(by_channel: tf.Tensor, shape: tf.TensorShape, axes: tuple[int, ...]):
    """`by_channel`, with the sizes of `shape` on `axes`, so that it broadcasts to it."""
    leading = axes[0]
    if axes == tuple(range(leading, shape.ndims)):
        return by_channel  # broadcasting aligns the last axes by itself
    if len(axes) == 1:
        return tf.reshape(by_channel, [-1] + [1] * (shape.ndims - 1 - leading))
    sizes = [shape[a] if a in axes else 1 for a in range(leading, shape.ndims)]
    # The number of ghost batches may be unknown; it is the only one that may.
    return tf.reshape(by_channel, for_reshape(sizes))


def for_reshape(sizes: Sequence[Any]) -> list[int]:
    """The sizes, with -1 for what is unknown."""
    # A TensorShape gives Dimensions on 1.15, and ints on 2.x.
    known = [tf.dimension_value(size) for size in sizes]
    return [-1 if size is None else size for size in known]


def _divisor(number, at_most):
    """The largest one."""
    return next(d for d in range(at_most, 0, -1) if number % d == 0)
