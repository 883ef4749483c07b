"""Which kernel computes what: the one place where it is chosen, and why.

    fused      one operation for statistics and output, and one for the gradient
    composed   several operations with a hand-written gradient, for any input

Measured with float32 on two CPU cores, forward and backward, on tensors of 33 MB; the
command is `python -m tests.benchmarks`:

- TensorFlow 2, channels last: fused, at a quarter of the recipe's time with oneDNN (CPUs
  with AVX512-VNNI), at half of it without. Its one long sum for each channel is up to three
  times as far off as the recipe's; composed, at twice its time, is closer than both.
  Composed where the kernels of oneDNN are slow: for up to 2^16 values, and for numbers of
  channels that are no multiple of 4 (16 in bfloat16); `views` has the figures.
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
"""

from __future__ import annotations

from typing import NamedTuple, Sequence

import tensorflow.compat.v1 as tf

from bn_tf1.statistics import composed, fused, output
from bn_tf1.statistics.channels import channels_of
from bn_tf1.statistics.moments import reduction_axes, unbiased_variance
from bn_tf1.statistics.views import IS_TENSORFLOW_1, is_fast_kernel, is_small, on_gpu

KERNELS = ("auto", "fused", "composed")

# cuDNN refuses less; the kernels for the CPU take any.
_SMALLEST_EPSILON_ON_GPU = 1.001e-5


class BatchOutput(NamedTuple):
    """The output for the statistics of the batch, and these statistics.

    Attributes:
        y: like `x`.
        mean: float32 or float64 tensor of shape [channels].
        variance: like `mean`; biased or unbiased, as was asked for.
    """

    y: tf.Tensor
    mean: tf.Tensor
    variance: tf.Tensor


def why_not_fused(
    x: tf.Tensor, axis: int | Sequence[int], epsilon: float
) -> str | None:
    """What keeps the fused kernel from normalising `x`, in words; None if nothing does."""
    dtype = x.dtype.base_dtype
    if dtype == tf.float64:
        return "it has no kernel for float64"
    if dtype == tf.bfloat16 and IS_TENSORFLOW_1:
        return "TensorFlow 1.15 has no kernel for bfloat16"
    channels = channels_of(x, axis)
    layout = channels.layout
    if layout == "any" or len(channels.axes) > 1:
        return f"it cannot see shape {x.shape} with channels on axis {axis} as an image"
    if on_gpu(x):
        if epsilon < _SMALLEST_EPSILON_ON_GPU:
            return f"on a GPU `epsilon` must be at least {_SMALLEST_EPSILON_ON_GPU}"
    elif layout == "middle" and IS_TENSORFLOW_1:
        return "TensorFlow 1.15 has none on the CPU for channels that are not last"
    return None


def choose(kernel: str, x: tf.Tensor, axis: int | Sequence[int], epsilon: float) -> str:
    """ "fused" or "composed", for the statistics of the batch.

    Raises:
        ValueError: `kernel` is "fused", but that cannot be.
    """
    if kernel == "composed":
        return kernel
    obstacle = why_not_fused(x, axis, epsilon)
    if kernel == "fused":
        if obstacle is not None:
            raise ValueError(
                f"`kernel` is 'fused', but the fused kernel cannot normalise `x`: "
                f"{obstacle}; use kernel='auto' or 'composed'"
            )
        return kernel
    return "composed" if obstacle or not _is_fast(x, axis) else "fused"


def normalize_batch(
    x: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    *,
    kernel: str,
    axis: int | Sequence[int],
    epsilon: float,
    unbiased: bool,
) -> BatchOutput:
    """The output with the statistics of the batch `x`, by the kernel of `choose`.

    Args:
        x: float tensor of known rank with the channels on `axis`.
        gamma, beta: tensors of the statistics' dtype and shape, or None for 1 and 0.
        kernel: "fused" or "composed".
        axis: the channel axis of `x`, or several.
        epsilon: added to the variance; in the unit of the variance.
        unbiased: which variance is returned; the output always uses the biased one.
    """
    if kernel == "fused":
        outputs = fused.normalize_batch(
            x,
            gamma,
            beta,
            axis=axis,
            epsilon=epsilon,
            unbiased=unbiased,
            gradient_by_hand=_is_slow_backward(x),
        )
        return BatchOutput(*outputs)
    moments = composed.batch_moments(x, reduction_axes(x.shape.ndims, axis))
    y = composed.normalize_batch(x, moments, gamma, beta, axis=axis, epsilon=epsilon)
    variance = unbiased_variance(moments) if unbiased else moments.variance
    return BatchOutput(y, moments.mean, variance)


def normalize_constant(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    *,
    axis: int | Sequence[int],
    epsilon: float,
) -> tf.Tensor:
    """As `output.normalize`, for a mean and a variance that need no gradient."""
    normalize = _normalize_constant(x, axis, epsilon)
    return normalize(x, mean, variance, gamma, beta, axis=axis, epsilon=epsilon)


def _normalize_constant(x, axis, epsilon):
    if why_not_fused(x, axis, epsilon) is not None:
        return output.normalize
    if on_gpu(x):
        return fused.normalize
    if channels_of(x, axis).layout != "last":
        return output.normalize
    # Grappler merges the kernel with a convolution before it.
    if x.op.type == "Conv2D" or is_fast_kernel(x, axis):
        return fused.normalize
    return output.normalize if is_small(x) else composed.normalize_fixed


def _is_fast(x, axis):
    if on_gpu(x):
        return True
    return channels_of(x, axis).layout == "last" and is_fast_kernel(x, axis)


def _is_slow_backward(x):
    return IS_TENSORFLOW_1 and x.dtype.base_dtype == tf.float32 and not on_gpu(x)
