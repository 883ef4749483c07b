"""The fastest view of a tensor, by what is going to be done with it.

Contract: a view is of the same values and costs nothing to take, but the time of the
operations on it depends on it by a factor of up to ten. Measured on two CPU cores with
AVX512, forward and backward:

- TensorFlow 2 with oneDNN, at most 256 KB of float32: each of its kernels takes 0.1 ms and
  more, however small the tensor is. Several plain operations take half the time of two.
- TensorFlow 2 with oneDNN, float32, no multiple of 4 channels: its kernels take twice to
  five times as long as on several neighbours seen as one, with as many times the channels.
  No multiple of 8: the kernel that is merged with a relu takes twice the time of both apart.
- The same, and the kernel that makes the statistics: with 8 * odd channels, and with 256
  channels or more in 16 MB, it takes up to twice the time of one place per example.
- bfloat16, no multiple of 16 channels: its kernels take three to ten times as long as
  several operations in float32.
- TensorFlow 2 with oneDNN: its sums of products are one long sum for each channel, whose
  rounding error is up to a hundred times that of the sums over several neighbours seen as
  one. With 64 channels these take half a millisecond for 8 MB more, otherwise no more time.
- On both versions, fewer than 64 channels: all other operations take up to ten times as long
  as on several neighbours seen as one.

On a GPU none of this holds, and the operations that are fast on a CPU are slow there, or
not deterministic: the views are the plain ones.
"""

from __future__ import annotations

from typing import Sequence

import tensorflow.compat.v1 as tf

from bn_tf1.statistics.channels import (
    Channels,
    channels_of,
    flat_sizes,
    plain_channels_of,
    product,
)

IS_TENSORFLOW_1 = tf.version.VERSION.startswith("1.")

# Channels: a vector of the processor, and as many as no operation is faster with more of.
_VECTOR = 1 if IS_TENSORFLOW_1 else 16
_WIDE = 64
# Channels with which oneDNN's sums of products are as exact as those of TensorFlow 1.15.
_PRECISE = 2**12
# Numbers of values: as many as no kernel of oneDNN's is worth its start for, and half of a
# common cache of the third level, from where it takes the channels block by block, and
# several operations overtake the kernel of TensorFlow 1.15.
_SMALL = 2**16
_LARGE = 2**22
_TYPICAL_BATCH = 256


def channels_for_arithmetic(x: tf.Tensor, axis: int | Sequence[int]) -> Channels:
    """The view for the operations of `Channels`, and for fixed statistics."""
    if on_gpu(x):
        return plain_channels_of(x, axis)
    channels = channels_of(x, axis)
    if channels.layout != "last":
        return channels
    if is_small(x):
        return plain_channels_of(x, axis)
    if len(channels.axes) > 1:
        return channels
    *reduced, count = x.shape.as_list()
    rows = _rows(reduced)
    if rows is None:
        return channels

    def seeing_as_one(places):
        if None in reduced:
            return [-1, rows // places, 1, count * places]
        return flat_sizes(rows // places, count * places)

    places = _places(rows, count)
    if places > 1:
        sizes = seeing_as_one(places)
        channels = channels._replace(
            sizes=sizes, places=places, dot_by_convolution=sizes[0] != 1
        )
    if IS_TENSORFLOW_1 or not channels.dot_by_convolution:
        return channels
    return channels._replace(dot_sizes=seeing_as_one(_places_for_dot(rows, count)))


def channels_for_statistics(x: tf.Tensor, axis: int | Sequence[int]) -> Channels:
    """The view for the fused kernel that makes the statistics itself."""
    channels = channels_of(x, axis)
    if IS_TENSORFLOW_1 or channels.layout != "last" or on_gpu(x):
        return channels
    *reduced, count = x.shape.as_list()
    if x.dtype.base_dtype == tf.float32 and _is_faster_by_row(x):
        return channels._replace(sizes=[-1, 1, 1, count])
    if count % 8 and len(reduced) == 3 and None not in reduced[1:]:
        # No image any more, so that no relu is merged with it.
        return channels._replace(sizes=[-1, reduced[1] * reduced[2], 1, count])
    return channels


def is_fast_kernel(x: tf.Tensor, axis: int | Sequence[int]) -> bool:
    """Whether the fused kernel that makes the statistics is faster than several operations.

    For `x` with its channels last, on a CPU.
    """
    dtype = x.dtype.base_dtype
    count = tf.dimension_value(x.shape[-1])
    if IS_TENSORFLOW_1:
        is_slow = dtype != tf.float32 or _size(x.shape) >= _LARGE
        are_few = count < 8
    else:
        is_slow = is_small(x) or (dtype == tf.bfloat16 and count % 16 != 0)
        are_few = count % 4 != 0
    if is_slow:
        return False
    return not are_few or channels_for_arithmetic(x, axis).places == 1


def is_fast_fixed_kernel(channels: Channels, dtype: tf.DType) -> bool:
    """Whether the fused kernel for fixed statistics serves this view, and is fast."""
    if channels.layout != "last" or dtype != tf.float32 or len(channels.axes) > 1:
        return False
    return IS_TENSORFLOW_1 or channels.sizes[-1] % 4 == 0


def is_small(x: tf.Tensor) -> bool:
    """Whether TensorFlow 2 takes longer to start a kernel on `x` than to run it."""
    return not IS_TENSORFLOW_1 and _size(x.shape) <= _SMALL


def on_gpu(x: tf.Tensor) -> bool:
    """Whether what is computed from `x` is going to be placed on a GPU.

    That is known only where the graph says it; otherwise a GPU of this machine counts.
    """
    device_type = tf.DeviceSpec.from_string(x.device).device_type
    if device_type is not None:
        return device_type == "GPU"
    return bool(tf.config.experimental.list_physical_devices("GPU"))


def _rows(reduced):
    """The number of places, of one example where that of examples is unknown, or None."""
    known = reduced[1:] if reduced and reduced[0] is None else reduced
    return product(known)


def _size(shape):
    """The number of values; with a batch of a common size, where it is unknown.

    A larger one than most are: several operations lose more on what is large after all
    than they win on what is small.
    """
    batch, *others = shape.as_list()
    if None in others:
        return _LARGE - 1  # neither small nor large, as far as is known
    return product([_TYPICAL_BATCH if batch is None else batch, *others])


def _places(rows, count):
    """How many neighbours are best seen as one."""
    candidates = [
        places
        for places in range(1, max(_WIDE // count, _VECTOR) + 1)
        if rows % places == 0 and (count * places) % _VECTOR == 0
    ]
    narrow = [places for places in candidates if count * places <= _WIDE]
    return max(narrow) if narrow else min(candidates, default=1)


def _places_for_dot(rows, count):
    most = max(_PRECISE // count, 1)
    return next(places for places in range(most, 0, -1) if rows % places == 0)


def _is_faster_by_row(x):
    *reduced, count = x.shape.as_list()
    if count % 16:
        return count % 8 == 0 and count >= 40
    known = None not in reduced
    return known and count >= 256 and _size(x.shape) >= _LARGE
