"""Gradients of `batch_norm` by central differences, and through the switch."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from tests import reference

pytestmark = pytest.mark.usefixtures("small_and_large")

EPSILON = 1e-3


def constants(**values):
    return {name: tf.constant_initializer(value) for name, value in values.items()}


def weighted_gradients(y, weights, inputs):
    """Gradients of sum(y * weights) in the statistics' dtype."""
    dtype = tf.float64 if y.dtype == tf.float64 else tf.float32
    loss = tf.reduce_sum(tf.cast(y, dtype) * tf.constant(weights, dtype))
    return tf.gradients(loss, inputs)


# ------------------------------------------------------------------ numeric gradients


@pytest.mark.parametrize("name", ["rank2_two_rows", "rank3_ncw", "rank4_nhwc"])
def test_the_oracles_gradients_are_central_differences(name):
    case = reference.Case((2,) * (len(reference.CASES[name].shape) - 1) + (3,), -1)
    batch = reference.make_batch(case, "float64")
    weights = reference.make_output_gradient(case)
    gamma, beta = reference.make_parameters(3)

    def loss(x=batch, gamma=gamma, beta=beta):
        y = reference.training_output(x, gamma, beta, case.axis, EPSILON)
        return (weights * y).sum()

    exact = reference.training_gradients(batch, weights, gamma, case.axis, EPSILON)
    # Third derivatives go with deviation^-3 and reach 1e4 here: step^2 / 6 of it.
    close = {"rtol": 1e-6, "atol": 1e-6}
    slopes = reference.central_differences(lambda x: loss(x=x), batch)
    np.testing.assert_allclose(slopes, exact.x, **close)
    slopes = reference.central_differences(lambda value: loss(gamma=value), gamma)
    np.testing.assert_allclose(slopes, exact.gamma, **close)
    slopes = reference.central_differences(lambda value: loss(beta=value), beta)
    np.testing.assert_allclose(slopes, exact.beta, **close)


@pytest.mark.parametrize("is_training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(
    "shape, axis",
    [((4, 3), -1), ((2, 3, 2), 1), ((2, 2, 2, 3), -1), ((2, 3, 2, 2), 1)],
    ids=["rank2", "rank3_ncw", "rank4_nhwc", "rank4_nchw"],
)
def test_numeric_gradients_of_x(shape, axis, is_training, start):
    """The whole Jacobian in float64, by TensorFlow's own central differences."""
    case = reference.Case(shape, axis)
    batch = reference.make_batch(case, "float64")
    gamma, beta = reference.make_parameters(3)
    x = tf.placeholder(tf.float64, shape)
    y = bn_tf1.batch_norm(
        x, is_training, axis=axis, initializers=constants(gamma=gamma, beta=beta)
    )
    session = start()
    with session.as_default():
        error = tf.test.compute_gradient_error(x, shape, y, shape, batch, delta=1e-4)
    # Curvature of the third order, deviation^-3 up to 1e3, times delta^2.
    assert error < 1e-4, error


@pytest.mark.parametrize("is_training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", ["gamma", "beta"])
def test_numeric_gradients_of_parameters(name, is_training, start, variable):
    case = reference.Case((2, 3, 2), 1)
    batch = reference.make_batch(case, "float64")
    gamma, beta = reference.make_parameters(3)
    y = bn_tf1.batch_norm(
        tf.constant(batch),
        is_training,
        axis=case.axis,
        initializers=constants(gamma=gamma, beta=beta),
    )
    loss = tf.reduce_sum(y * tf.constant(reference.make_output_gradient(case)))
    parameter = variable("batch_norm/" + name)
    gradient = tf.gradients(loss, parameter)[0]
    new_value = tf.placeholder(tf.float64, [3])
    assignment = tf.assign(parameter, new_value)
    session = start()
    exact = session.run(gradient)

    def loss_at(values):
        session.run(assignment, {new_value: values})
        return session.run(loss)

    slopes = reference.central_differences(loss_at, session.run(parameter))
    np.testing.assert_allclose(exact, slopes, rtol=1e-8, atol=1e-8)


def test_gradients_through_a_tensor_switch_take_the_branch_that_ran(
    start, control_flow
):
    case = reference.CASES["rank4_nhwc"]
    batch = reference.make_batch(case, "float32")
    weights = reference.make_output_gradient(case)
    is_training = tf.placeholder(tf.bool, [])
    x = tf.constant(batch, tf.float32)
    y = bn_tf1.batch_norm(x, is_training)
    gradient = weighted_gradients(y, weights, [x])[0]
    session = start()
    zeros = np.zeros(case.shape[-1])
    moments = reference.moments(batch)
    trained = reference.training_gradients(batch, weights).x
    fixed = reference.inference_gradients(batch, weights, zeros, zeros + 1).x
    for switch, expected, mean, variance in [
        (True, trained, moments.mean, moments.variance),
        (False, fixed, zeros, zeros + 1),
    ]:
        allowed = reference.gradient_tolerances(
            batch, weights, mean, variance, 1.0, -1, EPSILON, "float32"
        )
        actual = session.run(gradient, {is_training: switch})
        reference.assert_within(actual, expected, allowed.x, "gradient of x")


@pytest.mark.parametrize("kernel", ["auto", "composed"])
def test_a_tensor_switch_adds_nothing_to_the_gradients_of_a_branch(
    kernel, start, executed_op_types
):
    """tf.cond would add a tensor of zeros, of the size of x, to its gradient."""
    is_training = tf.placeholder(tf.bool, [])
    x = tf.placeholder(tf.float32, [None, 4, 4, 3])
    y = bn_tf1.batch_norm(x, is_training, kernel=kernel)
    gradients = tf.gradients(y, [x, *tf.trainable_variables()], tf.sin(x))
    start()
    batch = np.random.RandomState(0).normal(size=[5, 4, 4, 3])
    for switch in (True, False):
        ops = executed_op_types(gradients, {x: batch, is_training: switch})
        assert not ops & {"AddN", "ZerosLike", "Fill"}, (switch, ops)


@pytest.mark.parametrize("kernel", ["auto", "composed"])
@pytest.mark.parametrize("mode", [True, False])
def test_gradients_of_gradients_through_a_tensor_switch(mode, kernel, start):
    """As those of the layer with a Python bool, whose first ones have an oracle."""
    rng = np.random.RandomState(0)
    batch, weights = rng.normal(size=[2, 6, 3, 3, 4]).astype(np.float32)
    x = tf.constant(batch)

    def second(is_training):
        y = bn_tf1.batch_norm(x, is_training, kernel=kernel)
        first = tf.gradients(tf.sin(y), x, weights)[0]
        return tf.gradients(tf.square(first), x)[0]

    is_training = tf.placeholder(tf.bool, [])
    switched, plain = second(is_training), second(mode)
    actual, expected = start().run([switched, plain], {is_training: mode})
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)
