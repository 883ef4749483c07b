"""`batch_norm` on numbers that break careless arithmetic."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from tests import reference

pytestmark = pytest.mark.usefixtures("small_and_large")


def make_input(case, dtype, sizes):
    """A placeholder for x: the channels are known, the other sizes by `sizes`."""
    shape = list(case.shape)
    if sizes == "unknown_sizes":
        shape = [None] * len(shape)
        shape[case.axis] = case.shape[case.axis]
    return tf.placeholder(dtype, shape)


def constants(**values):
    return {name: tf.constant_initializer(value) for name, value in values.items()}


def weighted_gradients(y, weights, inputs):
    """Gradients of sum(y * weights) in the statistics' dtype."""
    dtype = tf.float64 if y.dtype == tf.float64 else tf.float32
    loss = tf.reduce_sum(tf.cast(y, dtype) * tf.constant(weights, dtype))
    return tf.gradients(loss, inputs)


# ------------------------------------------------------------------- hard-won numbers


@pytest.mark.parametrize("sizes", ["known_sizes", "unknown_sizes"])
@pytest.mark.parametrize("name", ["rank2", "rank3_last", "rank4_nhwc", "rank4_nchw"])
def test_a_mean_of_300_deviations(name, sizes, start, variable, graph):
    """E[x^2] - E[x]^2 in float32 is ten times too large here; the bound forbids it."""
    shape = {2: (64, 4), 3: (8, 16, 4), 4: (4, 8, 8, 4)}[
        len(reference.CASES[name].shape)
    ]
    axis = reference.CASES[name].axis
    case = reference.Case(shape, axis)
    rng = np.random.RandomState(0)
    batch = reference.representable(300 + rng.normal(size=shape), "float32")
    x = make_input(case, "float32", sizes)
    y = bn_tf1.batch_norm(x, True, axis=axis, decay=0.0)
    session = start()
    updates = graph.get_collection(bn_tf1.UPDATE_OPS_COLLECTION)
    output, _ = session.run([y, updates], {x: batch})

    moments = reference.moments(batch, axis)
    expected = reference.training_output(batch, axis=axis)
    allowed = reference.output_tolerance(
        batch, expected, moments.mean, moments.variance, 1.0, axis, 1e-3, "float32"
    )
    assert allowed.max() < 2e-3, "300 units and a margin, not a whole digit"
    reference.assert_within(output, expected, allowed, "output")
    moving_variance = session.run(variable("batch_norm/moving_variance"))
    allowed = reference.variance_tolerance(batch, axis, "float32")
    reference.assert_within(moving_variance, moments.variance, allowed, "variance")


@pytest.mark.parametrize("name", ["rank2", "rank4_nhwc", "rank4_nchw"])
@pytest.mark.parametrize(
    "dtype, size", [("float16", 3e4), ("bfloat16", 1e15), ("float32", 1e15)]
)
def test_large_values(name, dtype, size, start):
    """Sums and squares overflow float16 here, but not the float32 statistics."""
    case = reference.CASES[name]
    rng = np.random.RandomState(0)
    batch = reference.representable(size * rng.uniform(-1, 1, size=case.shape), dtype)
    x = tf.constant(batch, dtype)
    y = bn_tf1.batch_norm(x, True, axis=case.axis)
    output = start().run(y)
    moments = reference.moments(batch, case.axis)
    expected = reference.training_output(batch, axis=case.axis)
    allowed = reference.output_tolerance(
        batch, expected, moments.mean, moments.variance, 1.0, case.axis, 1e-3, dtype
    )
    reference.assert_within(output, expected, allowed, "output")


@pytest.mark.parametrize("is_training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", ["rank2", "rank4_nhwc", "rank4_nchw"])
def test_a_small_epsilon_counts_as_given(name, is_training, start):
    """No kernel may clamp epsilon: variances of 1e-6 against an epsilon of 1e-6."""
    case = reference.CASES[name]
    batch = reference.make_batch(case, "float32", mean=0.0, deviation=1e-3)
    channels = case.shape[case.axis]
    y = bn_tf1.batch_norm(
        tf.constant(batch, tf.float32),
        is_training,
        axis=case.axis,
        epsilon=1e-6,
        initializers=constants(moving_variance=np.full(channels, 1e-6)),
    )
    output = start().run(y)
    moments = reference.moments(batch, case.axis)
    mean, variance = moments.mean, moments.variance
    if not is_training:
        mean, variance = np.zeros(channels), np.full(channels, 1e-6)
    expected = reference.normalize(batch, mean, variance, axis=case.axis, epsilon=1e-6)
    allowed = reference.output_tolerance(
        batch, expected, mean, variance, 1.0, case.axis, 1e-6, "float32"
    )
    reference.assert_within(output, expected, allowed, "output")


@pytest.mark.parametrize("name", ["rank2", "rank4_nhwc"])
def test_a_constant_channel_has_finite_output_and_gradients(name, start):
    case = reference.CASES[name]
    x = tf.ones(case.shape) * 0.5
    y = bn_tf1.batch_norm(x, True)
    weights = reference.make_output_gradient(case)
    output, gradient = start().run([y, weighted_gradients(y, weights, [x])[0]])
    np.testing.assert_allclose(output, np.zeros(case.shape), atol=1e-5)
    expected = reference.training_gradients(np.full(case.shape, 0.5), weights).x
    np.testing.assert_allclose(gradient, expected, atol=1e-3)
