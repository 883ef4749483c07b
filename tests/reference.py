"""Batch normalization in float64 NumPy: the oracle of the tests.

Written from the paper (Ioffe & Szegedy, "Batch Normalization", 2015,
arXiv:1502.03167, Algorithm 1 and the gradients of section 3) and from the
project's recipe, never from the code under test, and without TensorFlow.

Notation: `x` has `channels` values on `axis`; every other axis is reduced, so that
each channel has N = x.size / channels values. Per-channel arrays have the shape
`[channels]`. Everything is computed in float64, whatever the input's dtype.

The last section bounds the rounding errors that a computation in a lower precision
may make, so that a test's tolerance is derived and not tuned.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """Statistics of a batch: mean and biased variance, [channels], and N."""

    mean: np.ndarray
    variance: np.ndarray
    count: int


class Gradients(NamedTuple):
    """Gradients for x, in its shape, and for gamma and beta, [channels]."""

    x: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray


# --------------------------------------------------------------- inputs of the tests


class Case(NamedTuple):
    """The shape of an input, and the axis of its channels."""

    shape: tuple[int, ...]
    axis: int


CASES = {
    "rank2": Case((16, 5), -1),
    "rank2_axis_1": Case((16, 5), 1),
    "rank2_one_channel": Case((6, 1), -1),
    "rank2_two_rows": Case((2, 3), -1),
    "rank2_axis_0": Case((5, 16), 0),
    "rank3_last": Case((4, 7, 3), -1),
    "rank3_ncw": Case((4, 3, 7), 1),
    "rank4_nhwc": Case((3, 4, 5, 6), -1),
    "rank4_nhwc_axis_3": Case((3, 4, 5, 6), 3),
    "rank4_nhwc_one_example": Case((1, 4, 5, 6), -1),
    "rank4_nchw": Case((3, 6, 4, 5), 1),
    "rank4_nchw_axis_minus_3": Case((3, 6, 4, 5), -3),
    "rank4_axis_2": Case((3, 4, 6, 5), 2),
    "rank4_nhwc_12_channels": Case((2, 4, 4, 12), -1),
    "rank4_nhwc_40_channels": Case((2, 4, 4, 40), -1),
    "rank4_nhwc_50_channels": Case((2, 4, 4, 50), -1),
    "rank5_ndhwc": Case((2, 3, 2, 4, 3), -1),
    "rank5_ncdhw": Case((2, 3, 3, 2, 4), 1),
}


def make_batch(case, dtype, seed=0, mean=1.5, deviation=0.8):
    """A float64 array whose values `dtype` holds exactly; channels differ in scale."""
    rng = np.random.RandomState(seed)
    channels = case.shape[case.axis]
    rank = len(case.shape)
    scale = along(np.linspace(0.5, 1.5, channels), rank, case.axis)
    batch = scale * (mean + deviation * rng.normal(size=case.shape))
    return representable(batch, dtype)


def make_output_gradient(case, seed=7):
    """Eighths in [-2, 2]: exact in every dtype, so that no rounding enters here."""
    return np.random.RandomState(seed).randint(-16, 17, size=case.shape) / 8.0


def make_parameters(channels, seed=3):
    """gamma and beta, [channels], exact in float32; gamma takes both signs."""
    rng = np.random.RandomState(seed)
    gamma = representable(rng.uniform(0.5, 2.0, channels), "float32")
    gamma[::2] *= -1
    return gamma, representable(rng.normal(size=channels), "float32")


def assert_within(actual, expected, tolerance, what):
    """|actual - expected| <= tolerance, elementwise; NaN fails."""
    actual = np.asarray(actual).astype(np.float64)
    assert actual.shape == np.shape(expected), what
    excess = np.abs(actual - expected) - tolerance
    worst, allowed = np.abs(actual - expected).max(), np.min(tolerance)
    assert np.all(excess <= 0), f"{what}: off by {worst} where {allowed} is allowed"


def representable(values, dtype):
    """`values` in float64, cut to what `dtype` holds; bfloat16 is half a float32."""
    if dtype != "bfloat16":
        return np.asarray(values).astype(dtype).astype(np.float64)
    bits = np.asarray(values).astype(np.float32).view(np.uint32)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)


# ------------------------------------------------------------------ the forward pass


def reduction_axes(rank, axis):
    """All axes of a rank-`rank` array but `axis`, ascending: a tuple of ints."""
    channel_axis = axis % rank
    return tuple(index for index in range(rank) if index != channel_axis)


def moments(x, axis=-1):
    """Mean, biased variance (divided by N) and N of each channel of `x`.

    mean = sum(x) / N;   variance = sum((x - mean)^2) / N
    """
    x = np.asarray(x, np.float64)
    axes = reduction_axes(x.ndim, axis)
    count = x.size // x.shape[axis]
    mean = x.sum(axis=axes) / count
    variance = ((x - along(mean, x.ndim, axis)) ** 2).sum(axis=axes) / count
    return Moments(mean, variance, count)


def unbiased(variance, count):
    """The biased `variance` of `count` values, times N / (N - 1)."""
    return np.asarray(variance, np.float64) * count / (count - 1)


def normalize(x, mean, variance, gamma=1.0, beta=0.0, axis=-1, epsilon=1e-3):
    """gamma * (x - mean) / sqrt(variance + epsilon) + beta, in x's shape.

    `mean` and `variance` have the shape [channels]; `gamma` and `beta` too, or they
    are the numbers 1 and 0 where the layer has no such parameter.
    """
    x = np.asarray(x, np.float64)
    centred = x - along(mean, x.ndim, axis)
    deviation = np.sqrt(along(variance, x.ndim, axis) + epsilon)
    return along(gamma, x.ndim, axis) * centred / deviation + along(beta, x.ndim, axis)


def training_output(x, gamma=1.0, beta=0.0, axis=-1, epsilon=1e-3):
    """`normalize` with the statistics of the batch `x` itself."""
    batch = moments(x, axis)
    return normalize(x, batch.mean, batch.variance, gamma, beta, axis, epsilon)


def along(values, rank, axis):
    """`values`, [channels] or a number, shaped to broadcast along `axis`."""
    values = np.asarray(values, np.float64)
    if values.ndim == 0:
        return values
    shape = [1] * rank
    shape[axis] = values.size
    return values.reshape(shape)


# ----------------------------------------------------------------- the backward pass


def training_gradients(x, dy, gamma=1.0, axis=-1, epsilon=1e-3):
    """Gradients of sum(dy * y) for x, gamma and beta, through the batch statistics.

    With xhat = (x - mean) / sqrt(variance + epsilon):

        dbeta  = sum(dy)
        dgamma = sum(dy * xhat)
        dx     = gamma / sqrt(variance + epsilon)
                 * (dy - dbeta / N - xhat * dgamma / N)
    """
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    batch = moments(x, axis)
    fixed = inference_gradients(x, dy, batch.mean, batch.variance, gamma, axis, epsilon)
    xhat = normalize(x, batch.mean, batch.variance, axis=axis, epsilon=epsilon)
    through_mean = along(fixed.beta / batch.count, x.ndim, axis)
    through_variance = xhat * along(fixed.gamma / batch.count, x.ndim, axis)
    slope = along(gamma, x.ndim, axis) / np.sqrt(
        along(batch.variance, x.ndim, axis) + epsilon
    )
    return Gradients(
        slope * (dy - through_mean - through_variance), fixed.gamma, fixed.beta
    )


def inference_gradients(x, dy, mean, variance, gamma=1.0, axis=-1, epsilon=1e-3):
    """Gradients of sum(dy * y) when `mean` and `variance` are constants.

    dx = dy * gamma / sqrt(variance + epsilon)
    dgamma = sum(dy * xhat);   dbeta = sum(dy)
    """
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    axes = reduction_axes(x.ndim, axis)
    xhat = normalize(x, mean, variance, axis=axis, epsilon=epsilon)
    slope = along(gamma, x.ndim, axis) / np.sqrt(
        along(variance, x.ndim, axis) + epsilon
    )
    return Gradients(dy * slope, (dy * xhat).sum(axis=axes), dy.sum(axis=axes))


def central_differences(function, at, step=1e-5):
    """d function / d at, [*at.shape], of a scalar `function`, by central differences.

    Their error is step^2 / 6 times the third derivative plus 1e-16 / step: about
    1e-10 for well scaled functions.
    """
    at = np.array(at, np.float64)
    slopes = np.empty_like(at)
    for index in np.ndindex(*at.shape):
        above, below = at.copy(), at.copy()
        above[index] += step
        below[index] -= step
        slopes[index] = (function(above) - function(below)) / (2 * step)
    return slopes


# --------------------------------------------------------------- the moving averages


def moving_average(initial, values, decay):
    """The moving average after each of `values`: a list of arrays.

    moving <- moving - (1 - decay) * (moving - value), which is
    moving * decay + value * (1 - decay). `decay` is a number, or one for each value.
    """
    decays = np.broadcast_to(np.asarray(decay, np.float64), [len(values)])
    moving = np.asarray(initial, np.float64)
    trajectory = []
    for value, step_decay in zip(values, decays):
        moving = moving - (1 - step_decay) * (moving - np.asarray(value, np.float64))
        trajectory.append(moving)
    return trajectory


def zero_debiased_moving_average(values, decay):
    """The zero-debiased moving average after each of `values`: a list of arrays.

    As in Adam (Kingma & Ba, 2014, section 3): the biased average starts at zero, and
    after n values it is divided by 1 - decay^n.
    """
    biased = moving_average(np.zeros_like(values[0], np.float64), values, decay)
    return [average / (1 - decay ** (step + 1)) for step, average in enumerate(biased)]


# ------------------------------------------------------------ how far rounding can go

# The relative error of one rounding to a dtype. TensorFlow 1.15 truncates to
# bfloat16 where 2.21 rounds to nearest, so that its unit is twice 2^-8.
ROUNDING = {
    "float16": 2.0**-11,
    "bfloat16": 2.0**-7,
    "float32": 2.0**-24,
    "float64": 2.0**-53,
}

# Roundings that one value passes through: a sum over up to a few thousand values,
# added in packets and trees (about 16), the same for the variance, of which the
# square root keeps half (8), and the handful in rsqrt, the products and the sums.
OPERATIONS = 32


def statistics_rounding(dtype):
    """The rounding unit of the statistics of an input of `dtype`: float32's, at least
    (float64's for float64)."""
    return ROUNDING["float64" if dtype == "float64" else "float32"]


def mean_tolerance(x, axis, dtype):
    """[channels]: a sum of N values errs by the unit times their mean size."""
    size = np.abs(x).mean(axis=reduction_axes(np.ndim(x), axis))
    return OPERATIONS * statistics_rounding(dtype) * size


def variance_tolerance(x, axis, dtype):
    """[channels]: relative to the variance, plus the mean's error squared.

    sum((x - mean)^2) is stationary in the mean, so that an error of the mean counts
    squared. E[x^2] - E[x]^2 errs by the unit times x^2 and is outside this bound as
    soon as the mean is large against the deviation.
    """
    relative = OPERATIONS * statistics_rounding(dtype) * moments(x, axis).variance
    return relative + mean_tolerance(x, axis, dtype) ** 2


def output_tolerance(x, expected, mean, variance, gamma, axis, epsilon, dtype):
    """The shape of x: one rounding of the result to `dtype`, and the statistics' own.

    The latter is the unit times every summand of gamma * (x - mean) / deviation +
    beta, whose sizes are |gamma| * max|x, mean| / deviation and |y| + that.
    """
    x = np.asarray(x, np.float64)
    axes = reduction_axes(x.ndim, axis)
    size = np.maximum(np.abs(x).max(axis=axes), np.abs(mean))
    scaled = np.abs(gamma) * size / np.sqrt(np.asarray(variance) + epsilon)
    summands = 2 * along(scaled, x.ndim, axis) + np.abs(expected)
    return (
        ROUNDING[dtype] * np.abs(expected)
        + OPERATIONS * statistics_rounding(dtype) * summands
    )


def gradient_tolerances(x, dy, mean, variance, gamma, axis, epsilon, dtype):
    """Gradients of tolerances: for dx in `dtype`, for dgamma and dbeta in the
    statistics' dtype.

    xhat errs by the unit times s = max|x, mean| / deviation, and dgamma, a sum over
    N products, by N * max|dy| times that. In dx both appear divided by N and times
    xhat, of size h: slope * max|dy| * (1 + s) * (1 + h)^2.
    """
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    axes = reduction_axes(x.ndim, axis)
    count = x.size // x.shape[axis]
    unit = OPERATIONS * statistics_rounding(dtype)
    deviation = np.sqrt(np.asarray(variance) + epsilon)
    size = np.maximum(np.abs(x).max(axis=axes), np.abs(mean)) / deviation
    xhat = np.abs(normalize(x, mean, variance, axis=axis, epsilon=epsilon))
    largest = np.abs(dy).max(axis=axes)
    slope = np.abs(gamma) / deviation
    inner = slope * largest * (1 + size) * (1 + xhat.max(axis=axes)) ** 2
    one_rounding = ROUNDING[dtype] * along(inner, x.ndim, axis)
    return Gradients(
        np.broadcast_to(one_rounding + unit * along(inner, x.ndim, axis), x.shape),
        unit * count * largest * (1 + size),
        unit * count * largest,
    )
