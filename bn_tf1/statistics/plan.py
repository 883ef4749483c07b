"""What is decided from the shape, the dtype and the place of a tensor: kernel, view, layout.

    fused      one operation for statistics and output, and one for the gradient
    composed   several operations with a hand-written gradient, for any input
    compiled   as fused, by the operation of `bn_tf1.compiled`; only where it is asked for

Measured with float32 on two CPU cores with AVX512, forward and backward, on tensors of 33 MB
where no other size is given; the command is `python -m tests.benchmarks`. Which kernel:

- TensorFlow 2, channels last: fused, at a quarter of the recipe's time with oneDNN (CPUs
  with AVX512-VNNI), at half of it without. Its one long sum for each channel is up to three
  times as far off as the recipe's; composed, at twice its time, is closer than both.
  Composed where the kernels of oneDNN are slow: for up to 2^16 values, and for numbers of
  channels that are no multiple of 4 (16 in bfloat16).
- TensorFlow 1.15, channels last, float32, 8 channels or more: fused, with the gradient of
  the composed one in the place of the kernel's own, which takes longer than a whole
  composed layer: two thirds to nine tenths of the time of the kernel with its own gradient,
  and as few nodes. From 16 MB on composed, which takes a tenth to a quarter less time, for
  a dozen nodes more. For a mean of 300 deviations the statistics of the kernel are as far
  from the true ones as the recipe's, and those of composed a hundred times closer.
- Constant statistics: the fused kernel, where it is fast, and what grappler can merge with
  a convolution before it.
- Channels not last, on a CPU: composed. 1.15 has no such fused kernel; that of
  TensorFlow 2 is slower, by a third with oneDNN and four times without.
- On a GPU both versions have the fused kernel for both layouts. This follows TensorFlow's
  own layers; it has not been measured here.

Which view, of the same values (taking it costs nothing, but the time of the operations on it
depends on it by a factor of up to ten):

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

import dataclasses
import numbers
from typing import Any, NamedTuple, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.statistics.channels import (
    IS_TENSORFLOW_1,
    Between,
    Channels,
    Last,
    Middle,
    for_reshape,
)

KERNELS = ("auto", "fused", "composed", "compiled")

# cuDNN refuses less; the kernels for the CPU take any.
_SMALLEST_EPSILON_ON_GPU = 1.001e-5
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


class Plan(NamedTuple):
    """How tensors like one are normalised.

    Attributes:
        axes: the channel axes, ascending.
        parameter_shape: the shape of a layer's variables: [channels] for one channel axis;
            with several they keep the rank, with sizes of 1 on the other axes.
        dtype: of the statistics and the variables.
        count: the number of values per channel; None where a size is unknown.
        kernel: "fused", "composed" or "compiled", for the statistics of the batch.
        gradient_by_hand: whether the gradient of the fused kernel is the one of "composed",
            where the kernel's own is slow.
        constant: "fused", "composed" or "plain", for constant statistics.
        channels: how several operations see it; None where none are needed.
        image: what the fused kernel that makes the statistics needs it reshaped to; None
            where it takes it as it is.
        constant_image: the same, for the kernel that is given them.
        data_format: TensorFlow's name for where the channels of these images are.
        is_foldable: whether `tf.contrib.quantize` shall see the fused kernel as a layer.
    """

    axes: tuple[int, ...]
    parameter_shape: Sequence[int]
    dtype: tf.DType
    count: int | None
    kernel: str
    gradient_by_hand: bool
    constant: str
    channels: Channels | None
    image: Sequence[int] | None
    constant_image: Sequence[int] | None
    data_format: str
    is_foldable: bool = False


def plan_of(
    x: tf.Tensor,
    axes: tuple[int, ...],
    *,
    epsilon: float,
    kernel: str = "auto",
    of_batch: bool = True,
    behind_switch: bool = False,
    is_foldable: bool = False,
) -> Plan:
    """The plan for tensors of the shape, the dtype and the place of `x`.

    Args:
        x: float tensor of known rank.
        axes: the channel axes, ascending and not negative.
        epsilon: what is going to be added to the variance.
        kernel: "auto", or the one to take for the statistics of the batch.
        of_batch: whether there are any: constant statistics never take the compiled kernel.
        behind_switch: whether a switch of modes comes between what made `x` and what is
            planned, so that the two cannot be merged.
        is_foldable: whether to take the fused kernel for both kinds of statistics, since
            tools look for it behind a convolution; but not by itself for float32 inputs
            that are known to be large, or other dtypes.

    Raises:
        ValueError: `kernel` is "fused" or "compiled", but that cannot be.
    """
    # Asked once: each answer below, and each operation later, depends on these.
    sizes, gpu = x.shape.as_list(), _on_gpu(x)
    seen, size = _layout(x.shape, sizes, axes), _size(sizes)
    is_last = isinstance(seen, Last)
    obstacle = _why_not_fused(x, seen, epsilon, gpu)
    problem = obstacle if kernel == "fused" else None
    if kernel == "compiled" and (gpu and of_batch or len(axes) > 1):
        problem = "it has one channel axis" if len(axes) > 1 else "it is none for a GPU"
    if problem is not None:
        what = "fused kernel" if kernel == "fused" else "compiled operation"
        raise ValueError(
            f"`kernel` is {kernel!r}, but the {what} cannot normalise `x`: {problem}; use "
            "kernel='auto' or 'composed'"
        )
    fast = obstacle is None and (
        gpu or (is_last and _is_fast_kernel(x.dtype.base_dtype, seen, sizes, size))
    )
    if is_foldable and obstacle is None and is_last and not fast:
        # Folding is worth less than what a large layer would lose in each step.
        is_moderate = x.dtype == tf.float32 and (None in sizes or size < _LARGE)
        fast = kernel == "fused" or (kernel == "auto" and is_moderate)
    if kernel == "auto":
        kernel = "fused" if fast else "composed"
    constant = "fused" if fast else "plain"
    if obstacle is None and is_last and not fast:
        # Grappler merges the kernel with a convolution before it.
        if x.op.type == "Conv2D" and not behind_switch:
            constant = "fused"
        elif IS_TENSORFLOW_1 or size > _SMALL:
            constant = "composed"
    channels = image = None
    if "composed" in (kernel, constant):
        channels = _for_arithmetic(seen, sizes, size, gpu)
    if kernel == "fused" and is_last and not (gpu or IS_TENSORFLOW_1):
        image = _for_statistics(x.dtype.base_dtype, sizes, size)
    constant_image = None
    # An image that stays as it is can be merged with the convolution that made it.
    if obstacle is None and seen.sizes != sizes:
        constant_image = seen.sizes
    several = [count if a in axes else 1 for a, count in enumerate(sizes)]
    return Plan(
        axes=axes,
        parameter_shape=several if len(axes) > 1 else [sizes[axes[0]]],
        dtype=statistics_dtype(x.dtype),
        count=product(count for a, count in enumerate(sizes) if a not in axes),
        kernel=kernel,
        gradient_by_hand=IS_TENSORFLOW_1 and x.dtype == tf.float32 and not gpu,
        constant=constant,
        channels=channels,
        image=image or constant_image,
        constant_image=constant_image,
        data_format="NCHW" if isinstance(seen, Middle) else "NHWC",
        is_foldable=is_foldable,
    )


def channels_for_arithmetic(x: tf.Tensor, axes: tuple[int, ...]) -> Channels:
    """How several operations see tensors like `x`, as in a plan."""
    sizes = x.shape.as_list()
    seen = _layout(x.shape, sizes, axes)
    return _for_arithmetic(seen, sizes, _size(sizes), _on_gpu(x))


def _on_gpu(x: tf.Tensor) -> bool:
    """Whether what is computed from `x` is going to be placed on a GPU.

    That is known only where the graph says it; otherwise a GPU of this machine counts.
    """
    device_type = tf.DeviceSpec.from_string(x.device).device_type
    if device_type is not None:
        return device_type == "GPU"
    # Placed by TensorFlow when the session starts: on a GPU, if there is one.
    return bool(tf.config.experimental.list_physical_devices("GPU"))


def _why_not_fused(x, seen, epsilon, gpu):
    """What keeps the fused kernel from normalising `x`, in words; None if nothing does."""
    dtype = x.dtype.base_dtype
    if dtype == tf.float64:
        return "it has no kernel for float64"
    if dtype == tf.bfloat16 and IS_TENSORFLOW_1:
        return "TensorFlow 1.15 has no kernel for bfloat16"
    if not isinstance(seen, (Last, Middle)) or len(seen.axes) > 1:
        return (
            f"it cannot see shape {x.shape} with channels on "
            f"{'axis' if len(seen.axes) == 1 else 'axes'} "
            f"{', '.join(map(str, seen.axes))} as an image"
        )
    if gpu:
        if epsilon < _SMALLEST_EPSILON_ON_GPU:
            return f"on a GPU `epsilon` must be at least {_SMALLEST_EPSILON_ON_GPU}"
    elif isinstance(seen, Middle) and IS_TENSORFLOW_1:
        return "TensorFlow 1.15 has none on the CPU for channels that are not last"
    return None


def _is_fast_kernel(dtype, seen, sizes, size):
    """Whether the fused kernel that makes the statistics is faster than several operations.

    With the channels last, on a CPU.
    """
    if IS_TENSORFLOW_1:
        is_slow = dtype != tf.float32 or size >= _LARGE
        are_few = sizes[-1] < 8
    else:
        is_slow = size <= _SMALL or (dtype == tf.bfloat16 and sizes[-1] % 16 != 0)
        are_few = sizes[-1] % 4 != 0
    if is_slow or not are_few:
        return not is_slow
    return _for_arithmetic(seen, sizes, size, gpu=False).places == 1


def _size(sizes):
    """The number of values; with a batch of a common size, where it is unknown.

    A larger one than most are: several operations lose more on what is large after all
    than they win on what is small.
    """
    # An unknown batch is the rule, and one of a common size decides better than none.
    batch, *others = sizes
    if None in others:
        return _LARGE - 1  # neither small nor large, as far as is known
    return product([_TYPICAL_BATCH if batch is None else batch, *others])


def _for_arithmetic(seen, sizes, size, gpu):
    """`seen`, or what is faster for the operations of `Channels` and fixed statistics."""
    is_small = not IS_TENSORFLOW_1 and size <= _SMALL
    if gpu or (is_small and isinstance(seen, (Last, Between))):
        return Channels(seen.shape, seen.axes)
    if not isinstance(seen, Last) or len(seen.axes) > 1:
        return seen
    *reduced, count = sizes
    # Of one example, where the number of examples is unknown.
    rows = product(reduced[1:] if reduced and reduced[0] is None else reduced)
    if rows is None:
        return seen

    def seeing_as_one(places):
        if None in reduced:
            return [-1, rows // places, 1, count * places]
        return _flat_sizes(rows // places, count * places)

    places = _places(rows, count)
    if places > 1:
        seen = dataclasses.replace(seen, sizes=seeing_as_one(places), places=places)
    if IS_TENSORFLOW_1 or not seen.by_convolution:
        return seen
    for_dot = seeing_as_one(_places_for_dot(rows, count))
    return dataclasses.replace(seen, dot_sizes=for_dot)


def _for_statistics(dtype, sizes, size):
    """The sizes of an image that the kernel makes statistics of faster, or None."""
    *reduced, count = sizes
    by_row = count % 8 == 0 and count >= 40
    if count % 16 == 0:
        known = None not in reduced
        by_row = known and count >= 256 and size >= _LARGE
    if by_row and dtype == tf.float32:
        return [-1, 1, 1, count]
    if count % 8 and len(reduced) == 3 and None not in reduced[1:]:
        # No image any more, so that no relu is merged with it.
        return [-1, reduced[1] * reduced[2], 1, count]
    return None


def _places(rows, count):
    """How many neighbours are best seen as one."""
    candidates = [
        places
        for places in range(1, max(_WIDE // count, _VECTOR) + 1)
        if rows % places == 0 and (count * places) % _VECTOR == 0
    ]
    # No operation is faster with more channels than that.
    narrow = [places for places in candidates if count * places <= _WIDE]
    return max(narrow) if narrow else min(candidates, default=1)


def _places_for_dot(rows, count):
    most = max(_PRECISE // count, 1)
    return next(places for places in range(most, 0, -1) if rows % places == 0)


def _layout(shape, sizes, axes):
    """The `Channels` of an image where it can be one, and of what it is elsewhere."""
    is_last = axes[-1] == len(sizes) - 1
    if axes == tuple(range(axes[0], axes[-1] + 1)):
        if is_last:
            last = _sizes_last(sizes, axes)
            return Channels(shape, axes) if last is None else Last(shape, axes, last)
        middle = _sizes_middle(sizes, axes)
        return Channels(shape, axes) if middle is None else Middle(shape, axes, middle)
    # The two axes of ghost batches; others of several, with sizes between them, are rare.
    if is_last and len(axes) == 2:
        between = _sizes_between(sizes, axes)
        leading = for_reshape([product(sizes[: axes[0]])])
        if between is not None:
            inside = -1 if -1 in between else product(between)
            if [*leading, inside].count(-1) < 2:
                return Between(shape, axes, [*leading, 1, 1, inside], between)
    return Channels(shape, axes)


def _sizes_last(sizes, axes):
    """[a, b, 1, channels]; a convolution shares its work out over a.

    An image stays as it is, so that what follows can be merged with what made it. None
    where a size is 0, or unknown where a reshape must know it.
    """
    reduced, channels = sizes[: axes[0]], product(sizes[axes[0] :])
    known = [size for size in reduced if size is not None]
    rows = product(known)
    if rows == 0 or channels == 0:
        return None
    if channels is None:
        is_known_otherwise = len(axes) > 1 and len(known) == len(reduced)
        return [1, rows, 1, -1] if is_known_otherwise else None
    if len(reduced) == 3 and len(axes) == 1:
        return [*reduced, channels]
    # A reshape can find out one size by itself, and no more.
    if len(known) == len(reduced):
        return _flat_sizes(rows, channels)
    if len(known) == len(reduced) - 1 and known:
        return [-1, rows, 1, channels]
    return [1, -1, 1, channels]


def _flat_sizes(rows, channels):
    """[a, b, 1, channels] with a * b = rows."""
    parts = max(d for d in range(1, 65) if rows % d == 0)
    return [parts, rows // parts, 1, channels]


def _sizes_middle(sizes, axes):
    """[a, channels, b, 1]; None where more than one of them is unknown, or one is 0."""
    before, after = sizes[: axes[0]], sizes[axes[-1] + 1 :]
    view = for_reshape(map(product, (before, sizes[axes[0] : axes[-1] + 1], after)))
    if view.count(-1) > 1 or 0 in view or (len(axes) == 1 and view[1] == -1):
        return None
    return [*view, 1]


def _sizes_between(sizes, axes):
    """[groups, b, channels]; None where a reshape must know what is unknown, or 0."""
    groups, *reduced, channels = sizes[axes[0] :]
    size = product(reduced)
    if not size or not channels or groups == 0:
        return None
    return for_reshape([groups, size, channels])


def channel_axes(rank: int, axis: int | Sequence[int]) -> tuple[int, ...]:
    """The channel axes of a tensor of `rank`, ascending and not negative."""
    axes = (axis,) if isinstance(axis, numbers.Integral) else axis
    return tuple(sorted(a % rank for a in axes))


def product(sizes: Any) -> int | None:
    """Of all sizes; None where one is unknown."""
    sizes = list(sizes)
    return None if None in sizes else int(np.prod(sizes, dtype=np.int64))


def statistics_dtype(dtype: tf.DType) -> tf.DType:
    """The dtype of the statistics for inputs of `dtype`: at least float32."""
    return tf.float64 if dtype == tf.float64 else tf.float32
