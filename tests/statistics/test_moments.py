"""`bn_tf1.statistics`: batch moments and normalize, by themselves."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from bn_tf1 import statistics
from tests import reference


def moments_of(x, axis):
    axes = statistics.channel_axes(x.shape.ndims, axis)
    return statistics.batch_moments(x, statistics.channels_for_arithmetic(x, axes))


def test_several_channel_axes(session):
    """Statistics have the sizes of the channel axes; against plain NumPy."""
    batch = np.random.RandomState(0).normal(2.0, 0.5, size=(4, 3, 5, 2))
    assert statistics.channel_axes(4, (-1, 1)) == (1, 3)
    moments = moments_of(tf.constant(batch), (-1, 1))
    y = statistics.normalize(
        tf.constant(batch),
        moments.mean,
        moments.variance,
        tf.constant(np.arange(6.0).reshape(3, 2)),
        None,
        axes=(1, 3),
        epsilon=1e-3,
    )
    mean = batch.mean((0, 2), keepdims=True)
    variance = ((batch - mean) ** 2).mean((0, 2), keepdims=True)
    gamma = np.arange(6.0).reshape(1, 3, 1, 2)
    expected = gamma * (batch - mean) / np.sqrt(variance + 1e-3)
    np.testing.assert_allclose(session.run(y), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", ["known_sizes", "unknown_sizes"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(
    "shape, axis",
    [((6, 3), -1), ((4, 3, 5), 1), ((2, 3, 4, 5), -1), ((2, 3, 4, 5), 1)],
    ids=["rank2", "rank3_ncw", "rank4_nhwc", "rank4_nchw"],
)
def test_batch_moments(shape, axis, dtype, sizes, session):
    numpy_dtype = tf.as_dtype(dtype).as_numpy_dtype
    batch = np.random.RandomState(0).normal(2.0, 0.5, size=shape).astype(numpy_dtype)
    known = shape if sizes == "known_sizes" else [None] * len(shape)
    x = tf.placeholder(dtype, known)
    moments = moments_of(x, axis)
    expected_dtype = tf.float64 if dtype == "float64" else tf.float32
    assert moments.mean.dtype == expected_dtype
    assert moments.variance.dtype == expected_dtype
    assert moments._fields == ("mean", "variance", "count")
    mean, variance, count = session.run(
        [moments.mean, moments.variance, as_float_tensor(moments.count)], {x: batch}
    )

    exact = reference.moments(batch.astype(np.float64), axis)
    batch = batch.astype(np.float64)
    assert count == exact.count
    assert np.all(
        np.abs(mean - exact.mean) <= reference.mean_tolerance(batch, axis, dtype)
    )
    assert np.all(
        np.abs(variance - exact.variance)
        <= reference.variance_tolerance(batch, axis, dtype)
    )


def as_float_tensor(count):
    """A count is a float scalar tensor or a Python number, nothing else."""
    if isinstance(count, (int, float)):
        return tf.constant(float(count))
    assert count.dtype.is_floating
    assert count.shape.as_list() == []
    return count


def test_batch_moments_over_several_axes_keep_the_others(session):
    batch = np.random.RandomState(0).normal(size=(4, 3, 5))
    moments = moments_of(tf.constant(batch), 1)
    mean, variance = session.run([moments.mean, moments.variance])
    np.testing.assert_allclose(mean, batch.mean(axis=(0, 2)), rtol=1e-12)
    np.testing.assert_allclose(variance, batch.var(axis=(0, 2)), rtol=1e-12)


@pytest.mark.parametrize(
    "dtype, parameters",
    [
        ("float16", "gamma_and_beta"),
        ("bfloat16", "gamma_and_beta"),
        ("float32", "gamma_and_beta"),
        ("float64", "gamma_and_beta"),
        ("float32", "gamma"),
        ("float32", "beta"),
        ("float32", "neither"),
    ],
)
@pytest.mark.parametrize(
    "shape, axis",
    [((6, 3), -1), ((4, 3, 5), 1), ((2, 3, 4, 5), -1), ((2, 5, 4, 3), -3)],
    ids=["rank2", "rank3_ncw", "rank4_nhwc", "rank4_nchw"],
)
def test_normalize(shape, axis, parameters, dtype, session):
    channels = shape[axis]
    numpy_dtype = tf.as_dtype(dtype).as_numpy_dtype
    statistics_dtype = tf.float64 if dtype == "float64" else tf.float32
    rng = np.random.RandomState(0)
    batch = rng.normal(size=shape).astype(numpy_dtype)
    mean, variance, gamma, beta = rng.uniform(0.5, 2, size=(4, channels)).astype("f4")
    gamma = gamma if "gamma" in parameters else None
    beta = beta if "beta" in parameters else None

    def tensor(values):
        return None if values is None else tf.constant(values, statistics_dtype)

    y = statistics.normalize(
        tf.constant(batch),
        tensor(mean),
        tensor(variance),
        tensor(gamma),
        tensor(beta),
        axes=statistics.channel_axes(len(shape), axis),
        epsilon=1e-3,
    )
    assert y.dtype == tf.as_dtype(dtype)
    assert y.shape.as_list() == list(shape)
    output = session.run(y).astype(np.float64)
    batch = batch.astype(np.float64)
    gamma = 1.0 if gamma is None else gamma
    beta = 0.0 if beta is None else beta
    expected = reference.normalize(batch, mean, variance, gamma, beta, axis, 1e-3)
    allowed = reference.output_tolerance(
        batch, expected, mean, variance, gamma, axis, 1e-3, dtype
    )
    assert np.all(np.abs(output - expected) <= allowed)
