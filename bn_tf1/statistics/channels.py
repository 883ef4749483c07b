"""Sums and products by channel, each by the cheapest operation for the layout.

Contract: a `Channels` sees a tensor of any rank as one of three layouts,

    last      [a, b, 1, channels]      the channels change fastest; several neighbours
                                       may be seen as one, with as many times the channels
    middle    [a, channels, b, 1]      a channel lies in one piece, once per example
    any       as it is                 all else: sizes that are 0, or unknown where a
                                       reshape must know them

by reshaping, which copies nothing, and offers on it what batch normalization needs. All
operations have gradients of every order. Several channel axes are seen as one where they
are neighbours. With two that are not, as those of ghost batches, the layout is "last" with
all places of an example seen as one.

Why these operations (measured on two CPU cores, TensorFlow 1.15.5 and 2.21.0, tensors of
33 MB): a batched product with a matrix of ones, or where sizes are unknown `BiasAddGrad`,
sums by channel three times faster than `tf.reduce_sum`, whose inner loop runs over the
channels; the filter gradient of a depthwise 1x1 convolution is the sum of products without
writing the products, and a norm that of squares; that convolution, and `tf.nn.bias_add`,
broadcast faster than `*` and `+`. Which view is the fastest for what is chosen in `views`.

One long sum of numbers of one sign is off by up to a hundred times the rounding error of a
number. The batched product gives sums over parts, a reduction of the layout "middle" those
over examples; their own sum, of few numbers, costs nothing in float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Sequence

import tensorflow.compat.v1 as tf

from bn_tf1.statistics.moments import channel_axes, reduction_axes, static_count
from bn_tf1.statistics.registered_gradients import registered_gradient

_STRIDES = [1, 1, 1, 1]

# Channels: fewer than these `tf.reduce_sum` adds up as fast as `BiasAddGrad`, or faster.
_NARROW = 32
# Rows: as many as are summed in one go with hardly an error, and as many as parts have.
_FEW = 16
_MANY = 2**10


class Channels(NamedTuple):
    """How tensors of one shape are seen.

    Attributes:
        layout: "last", "middle" or "any".
        sizes: what to reshape to, with -1 for the size that is left; None for "any".
        shape: the static shape from outside.
        axes: the channel axes, ascending.
        dot_by_convolution: whether `dot` and `scale` are depthwise convolutions.
        places: how many neighbours are seen as one.
        dot_sizes: the sizes for the convolution of `dot`, if they are not `sizes`; with
            more neighbours seen as one, more sums are made and each has fewer terms.
        between: [groups, b, channels], with -1 for an unknown number of groups, where b
            places lie between two channel axes.
    """

    layout: str
    sizes: Any
    shape: tf.TensorShape
    axes: tuple[int, ...]
    dot_by_convolution: bool
    places: int = 1
    dot_sizes: Any = None
    between: Any = None

    def enter(self, x: tf.Tensor) -> tf.Tensor:
        """`x` in this layout; more of its static shape may be known than from outside."""
        # An image that stays as it is has sizes of None where they are not known.
        stays = self.sizes is None or None in self.sizes
        if stays or x.shape.as_list() == self.sizes:
            return x
        return tf.reshape(x, self.sizes)

    def leave(self, values: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
        """`values`, which are in this layout, in the shape of `x` again."""
        if self.sizes is None or x.shape.as_list() == self.sizes:
            return values
        known = self.shape.as_list()
        if known.count(None) <= 1:
            return tf.reshape(values, _for_reshape(known))
        values = tf.reshape(values, tf.shape(x))
        values.set_shape(self.shape)
        return values

    def sum(self, values: tf.Tensor, weights: tf.Tensor | None = None) -> tf.Tensor:
        """The sum over each channel of `values`, or of weights * values.

        Args:
            weights: like `values` seen from outside, but of size 1 on the channel axes.
        """
        return self.over_places(self._partial_sums(values, weights))

    def average(
        self, values: tf.Tensor, count: tf.Tensor, weights: tf.Tensor | None = None
    ) -> tf.Tensor:
        """sum / count; with the error of one rounding, if it `has_short_sums`."""
        sums = self._partial_sums(values, weights)
        if not self.has_short_sums or sums.shape.ndims == 1:
            return self.over_places(sums) / count
        sums = self.over_places(tf.cast(sums, tf.float64))
        return tf.cast(sums / tf.cast(count, tf.float64), values.dtype)

    @property
    def has_short_sums(self) -> bool:
        """Whether a sum over a channel is of few values, or of sums over parts."""
        if self.layout == "last" and self.between is None:
            parts, size = self._parts
            return parts != 1 or 0 < size <= _FEW
        return self.layout != "any" and self.sizes[0] != 1

    def _partial_sums(self, values, weights):
        if self.layout == "any":
            values = values if weights is None else weights * values
            axes = reduction_axes(self.shape.ndims, self.axes)
            return tf.reduce_sum(values, list(axes))
        if self.layout == "middle":
            return self._sums_of_examples(values, weights)
        if self.between is not None:
            return self._sums_between(values, weights)
        parts, size = self._parts
        if weights is not None:
            weights = tf.reshape(weights, [parts, 1, size])
        elif parts == 1:
            return self._sum_in_one_go(values)
        else:
            weights = tf.constant(1.0, values.dtype, [1, 1, size])
        return tf.matmul(weights, tf.reshape(values, [parts, size, self._count]))

    def _sum_in_one_go(self, values):
        if 0 < self.sizes[-1] < _NARROW:
            return tf.reduce_sum(values, list(range(values.shape.ndims - 1)))
        return tf.raw_ops.BiasAddGrad(out_backprop=values)

    def _sums_of_examples(self, values, weights):
        if weights is None:
            return tf.reduce_sum(values, [2, 3])
        examples, channels, size, _ = self.sizes
        weights = tf.reshape(weights, [examples, 1, size])
        values = tf.reshape(values, [examples, channels, size])
        return tf.matmul(weights, values, transpose_b=True)

    def _sums_between(self, values, weights):
        groups, size, channels = self.between
        if weights is None:
            weights = tf.constant(1.0, values.dtype, [1, 1, 1, size])
        else:
            weights = tf.reshape(weights, [-1, 1, 1, size])
        values = tf.reshape(values, [self.sizes[0], groups, size, channels])
        return tf.squeeze(tf.matmul(weights, values), [2])

    def sum_of_squares(self, values: tf.Tensor) -> tf.Tensor:
        """The sum over each channel of the squares."""
        if self.layout != "middle":
            return self.dot(values, values)
        norms = tf.raw_ops.EuclideanNorm(input=values, axis=[2, 3])
        sums = self.over_places(tf.square(norms))
        gradient = registered_gradient("sum_of_squares", _sum_of_squares_gradient)
        with tf.get_default_graph().gradient_override_map({"IdentityN": gradient}):
            return tf.identity_n([sums, values])[0]

    def dot(self, values: tf.Tensor, others: tf.Tensor) -> tf.Tensor:
        """The sum over each channel of the products."""
        if not self.dot_by_convolution:
            return self.sum(values * others)
        wide = (self.dot_sizes or self.sizes)[-1]
        if self.dot_sizes is not None:
            values, others = (tf.reshape(t, self.dot_sizes) for t in (values, others))
        products = tf.nn.depthwise_conv2d_native_backprop_filter(
            values, [1, 1, wide, 1], others, _STRIDES, "VALID"
        )
        return self.over_places(tf.squeeze(products, [0, 1, 3]))

    def add(self, values: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
        """values + offset."""
        if self.layout == "any":
            return values + self._broadcast(offset)
        return tf.nn.bias_add(values, self.for_places(offset), self.data_format)

    def centre(self, values: tf.Tensor, mean: tf.Tensor) -> tf.Tensor:
        """values - mean."""
        if self.layout == "any":
            return values - self._broadcast(mean)
        return self.add(values, -mean)

    def scale(self, values: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
        """values * factor."""
        if not self.dot_by_convolution:
            return self.scale_last_read(values, factor)
        factor = tf.reshape(self.for_places(factor), [1, 1, -1, 1])
        return tf.nn.depthwise_conv2d_native(values, factor, _STRIDES, "VALID")

    def scale_last_read(self, values: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
        """As `scale`, for values that are read by nothing later.

        TensorFlow then writes the products over the values, where a convolution would
        take memory for one more tensor.
        """
        return values * self._broadcast(factor)

    def for_places(self, by_channel: tf.Tensor) -> tf.Tensor:
        """`by_channel` once for each place that is seen as one with others."""
        if self.between is not None:
            _, size, _ = self.between
            by_channel = tf.tile(tf.expand_dims(by_channel, 1), [1, size, 1])
        if len(self.axes) > 1:
            by_channel = tf.reshape(by_channel, [-1])
        return by_channel if self.places == 1 else tf.tile(by_channel, [self.places])

    def over_places(self, sums: tf.Tensor) -> tf.Tensor:
        """The sums by channel, of those for parts, or for places that are seen as one."""
        if self.layout == "any":
            return sums
        if self.between is not None:
            return tf.reduce_sum(sums, 0)
        if self._count not in (-1, tf.dimension_value(sums.shape[-1])):
            sums = tf.reshape(sums, [-1, self._count])
        leading = list(range(sums.shape.ndims - 1))
        sums = tf.reduce_sum(sums, leading) if leading else sums
        if len(self.axes) == 1:
            return sums
        return tf.reshape(sums, _for_reshape(self.shape[a] for a in self.axes))

    @property
    def data_format(self) -> str:
        """TensorFlow's name of the layout "last" or "middle"."""
        return "NHWC" if self.layout == "last" else "NCHW"

    @property
    def _parts(self):
        """How many parts of what size a sum over the layout "last" is made of.

        -1 is for what is not known when the graph is built.
        """
        examples, *others, _ = self.sizes
        if None in others or -1 in others:
            return 1, -1
        rows = product(others) * self.places
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
        if self.layout == "middle":
            return self.sizes[1]
        return self.sizes[-1] // self.places

    def _broadcast(self, by_channel):
        if self.layout == "last":
            return self.for_places(by_channel)
        if self.layout == "middle":
            return tf.reshape(by_channel, [-1, 1, 1])
        return along(by_channel, self.shape, self.axes)


def channels_of(x: tf.Tensor, axis: int | Sequence[int]) -> Channels:
    """The view of tensors of the shape of `x` with the channels on `axis`."""
    axes = channel_axes(x.shape.ndims, axis)
    is_last = axes[-1] == x.shape.ndims - 1
    if axes == tuple(range(axes[0], axes[-1] + 1)):
        sizes = (_sizes_last if is_last else _sizes_middle)(x.shape, axes)
        layout = "last" if is_last else "middle"
        if sizes is not None:
            by_convolution = is_last and sizes[0] != 1 and len(axes) == 1
            return Channels(layout, sizes, x.shape, axes, by_convolution)
    elif is_last and len(axes) == 2:
        between = _between(x.shape, axes)
        if between is not None:
            sizes = _for_reshape([product(x.shape.as_list()[: axes[0]]), 1, 1])
            sizes.append(-1 if -1 in between else product(between))
            if sizes.count(-1) < 2:
                return Channels("last", sizes, x.shape, axes, False, between=between)
    return plain_channels_of(x, axis)


def plain_channels_of(x: tf.Tensor, axis: int | Sequence[int]) -> Channels:
    """As `channels_of`, with the layout "any": by reductions and broadcasting alone."""
    axes = channel_axes(x.shape.ndims, axis)
    return Channels("any", None, x.shape, axes, dot_by_convolution=False)


def along(by_channel: tf.Tensor, shape: tf.TensorShape, axes: tuple[int, ...]):
    """`by_channel`, with the sizes of `shape` on `axes`, so that it broadcasts to it."""
    leading = axes[0]
    if axes == tuple(range(leading, shape.ndims)):
        return by_channel  # broadcasting aligns the last axes by itself
    if len(axes) == 1:
        return tf.reshape(by_channel, [-1] + [1] * (shape.ndims - 1 - leading))
    sizes = [shape[a] if a in axes else 1 for a in range(leading, shape.ndims)]
    # The number of ghost batches may be unknown; it is the only one that may.
    return tf.reshape(by_channel, _for_reshape(sizes))


def _divisor(number, at_most):
    """The largest one."""
    return next(d for d in range(at_most, 0, -1) if number % d == 0)


def _sum_of_squares_gradient(operation, dsums, _):
    # That of a norm is NaN where the norm is 0.
    return None, 2 * operation.inputs[1] * tf.reshape(dsums, [-1, 1, 1])


def _between(shape, axes):
    """[groups, b, channels], or None where it is not known, or 0, what a reshape must know."""
    groups, *reduced, channels = shape.as_list()[axes[0] :]
    size = product(reduced)
    if not size or not channels or groups == 0:
        return None
    return _for_reshape([groups, size, channels])


def _sizes_last(shape, axes):
    """[a, b, 1, channels]; a convolution shares its work out over a.

    An image stays as it is, so that what follows can be merged with what made it.
    """
    reduced, channels = shape.as_list()[: axes[0]], product(shape.as_list()[axes[0] :])
    known = [size for size in reduced if size is not None]
    rows = product(known)
    if rows == 0 or channels == 0:
        return None
    if channels is None:
        is_known_otherwise = len(axes) > 1 and len(known) == len(reduced)
        return [1, rows, 1, -1] if is_known_otherwise else None
    if len(reduced) == 3 and len(axes) == 1:
        return [*reduced, channels]
    if len(known) == len(reduced):
        return flat_sizes(rows, channels)
    if len(known) == len(reduced) - 1 and known:
        return [-1, rows, 1, channels]
    return [1, -1, 1, channels]


def flat_sizes(rows: int, channels: int) -> list[int]:
    """[a, b, 1, channels] with a * b = rows."""
    parts = max(d for d in range(1, 65) if rows % d == 0)
    return [parts, rows // parts, 1, channels]


def _sizes_middle(shape, axes):
    """[a, channels, b, 1]; None where more than one of them is unknown, or one is 0."""
    sizes = shape.as_list()
    before, after = sizes[: axes[0]], sizes[axes[-1] + 1 :]
    view = _for_reshape(map(product, (before, sizes[axes[0] : axes[-1] + 1], after)))
    if view.count(-1) > 1 or 0 in view or (len(axes) == 1 and view[1] == -1):
        return None
    return [*view, 1]


def _for_reshape(sizes):
    """The sizes, with -1 for what is unknown."""
    known = [tf.dimension_value(size) for size in sizes]
    return [-1 if size is None else size for size in known]


def product(sizes: Sequence[int | None]) -> int | None:
    """Of all sizes; None where one is unknown."""
    return static_count(tf.TensorShape(sizes), range(len(sizes)))
