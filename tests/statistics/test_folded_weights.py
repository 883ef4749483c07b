"""Batch norm folded into the weights before it: the same output, and what is refused."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1.train_step.train_op import ancestors
from tests import reference

EPSILON = 1e-3
CHANNELS = 6


def array(*shape, seed=0, mean=0.0):
    return mean + np.random.RandomState(seed).normal(size=shape)


def convolution(dtype, **options):
    x, weights = (
        tf.constant(a, dtype) for a in (array(2, 7, 6, 4), array(3, 2, 4, CHANNELS))
    )
    return tf.nn.conv2d(x, weights, **{"strides": 1, "padding": "SAME", **options})


def depthwise(dtype):
    x, weights = (tf.constant(a, dtype) for a in (array(2, 5, 5, 3), array(2, 2, 3, 2)))
    return tf.nn.depthwise_conv2d(x, weights, [1, 1, 1, 1], "VALID")


def product(dtype, **options):
    sizes = [CHANNELS, 4] if options.get("transpose_b") else [4, CHANNELS]
    x, weights = (tf.constant(a, dtype) for a in (array(8, 4), array(*sizes)))
    return tf.matmul(x, weights, **options)


def biased(x):
    return tf.nn.bias_add(x, tf.constant(array(CHANNELS, seed=5, mean=2.0), x.dtype))


LINEAR = {
    "conv": convolution,
    "strided_conv": lambda dtype: convolution(dtype, strides=[1, 2, 2, 1]),
    "dilated_conv": lambda dtype: convolution(
        dtype, padding="VALID", dilations=[1, 2, 2, 1]
    ),
    "explicit_padding": lambda dtype: convolution(
        dtype, padding=[[0, 0], [2, 1], [1, 0], [0, 0]]
    ),
    "depthwise_conv": depthwise,
    "biased_conv": lambda dtype: biased(convolution(dtype)),
    "biased_depthwise_conv": lambda dtype: biased(depthwise(dtype)),
    "biased_matmul": lambda dtype: biased(product(dtype)),
    "matmul": product,
    "matmul_transposed": lambda dtype: product(dtype, transpose_b=True),
}


def make_statistics():
    # Means of tens of deviations, as after a long training with large weights.
    return {
        "gamma": array(CHANNELS, seed=1, mean=1.0),
        "beta": array(CHANNELS, seed=2),
        "moving_mean": array(CHANNELS, seed=3, mean=20.0),
        "moving_variance": array(CHANNELS, seed=4) ** 2 + 0.1,
    }


def make_layer(x, values, **options):
    initializers = {key: tf.constant_initializer(a) for key, a in values.items()}
    return bn_tf1.batch_norm(
        x,
        False,
        initializers=initializers,
        epsilon=EPSILON,
        **{"fold": True, **options},
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", sorted(LINEAR))
def test_the_output_is_that_of_the_unfolded_layer(name, dtype, start):
    values = make_statistics()
    x = LINEAR[name](dtype)
    y = make_layer(x, values)
    exact_x = LINEAR[name]("float64")
    output, exact_x = start().run([y, exact_x])
    expected = reference.normalize(
        exact_x,
        values["moving_mean"],
        values["moving_variance"],
        values["gamma"],
        values["beta"],
        epsilon=EPSILON,
    )
    assert output.shape == expected.shape
    tolerance = {"float32": 1e-5, "float64": 1e-13}[dtype]
    error = np.abs(output - expected).max() / np.abs(expected).max()
    assert error <= tolerance, error


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("scale", [False, True])
def test_without_gamma_or_beta(center, scale, start):
    values = make_statistics()
    x = product("float64")
    y = make_layer(x, values, center=center, scale=scale)
    output, x = start().run([y, x])
    expected = reference.normalize(
        x,
        values["moving_mean"],
        values["moving_variance"],
        values["gamma"] if scale else 1.0,
        values["beta"] if center else 0.0,
        epsilon=EPSILON,
    )
    np.testing.assert_allclose(output, expected, rtol=1e-11, atol=1e-11)


def test_the_output_needs_no_unfolded_product(graph):
    x = convolution("float32")
    needed = ancestors([make_layer(x, make_statistics()).op])
    assert x.op not in needed
    types = [op.type for op in needed]
    assert types.count("Conv2D") == 1
    assert not any("BatchNorm" in op for op in types), types


def test_the_variables_are_those_of_the_unfolded_layer(graph):
    make_layer(product("float32"), make_statistics(), name="one")
    names = sorted(v.op.name for v in tf.global_variables())
    assert names == sorted(f"one/{key}" for key in make_statistics())
    (call,) = bn_tf1.batch_norm_calls()
    assert call.name == "one" and call.updates == ()


@pytest.mark.parametrize(
    "x, options, reason",
    [
        (lambda: tf.nn.relu(product("float32")), {}, "Relu"),
        (lambda: tf.cast(product("float32"), tf.float16), {}, "Cast"),
        (lambda: product("bfloat16"), {}, "bfloat16"),
        (lambda: convolution("float32"), {"axis": 1}, "axis 3"),
        (lambda: biased(tf.nn.relu(product("float32"))), {}, "Relu"),
    ],
    ids=["relu", "cast", "bfloat16", "axis", "biased relu"],
)
def test_what_cannot_be_folded(x, options, reason):
    with pytest.raises(ValueError, match="`fold` is True.*" + reason):
        bn_tf1.batch_norm(x(), False, fold=True, **options)


@pytest.mark.parametrize("switch", ["python_bool", "tensor"])
def test_batch_statistics_cannot_be_folded(switch):
    is_training = True if switch == "python_bool" else tf.placeholder(tf.bool, [])
    with pytest.raises(ValueError, match="`fold` is True, but `is_training`"):
        bn_tf1.batch_norm(product("float32"), is_training, fold=True)


@pytest.mark.parametrize("fold", [2, "twice", None])
def test_another_fold(fold):
    with pytest.raises(ValueError, match=f"`fold` is {fold!r}, but must be"):
        bn_tf1.batch_norm(product("float32"), False, fold=fold)


# ------------------------------------------------------------------------ folded once


def assert_equal_but_for_rounding(one, other):
    """A constant that TensorFlow folds itself may be rounded in another order."""
    allowed = 4 * reference.ROUNDING["float32"] * np.abs(one).max()
    np.testing.assert_allclose(one, other, rtol=0, atol=allowed)


@pytest.mark.parametrize("name", sorted(LINEAR))
def test_folded_once_is_what_is_folded_in_each_step(name, start, variable_kind):
    values = make_statistics()
    x = LINEAR[name]("float32")
    in_each_step = make_layer(x, values)
    once = make_layer(x, values, fold="once")
    session = start()
    session.run(tf.local_variables_initializer())
    assert_equal_but_for_rounding(*session.run([in_each_step, once]))


def test_a_step_computes_no_weights_that_were_folded_once(graph):
    y = make_layer(product("float32"), make_statistics(), fold="once")
    types = {op.type for op in ancestors([y.op])}
    assert not types & {"Rsqrt", "Mul"}, types


def test_what_was_folded_once_is_in_no_checkpoint_and_follows_when_told(start):
    """It must not outlive a restore in a checkpoint, nor be trained."""
    x = product("float32")
    y = make_layer(x, make_statistics(), fold="once", name="one")
    assert len(tf.global_variables()) == 4
    assert len(tf.local_variables()) == 2
    assert len(tf.trainable_variables()) == 2
    session = start()
    with pytest.raises(tf.errors.FailedPreconditionError):
        session.run(y)
    session.run(tf.local_variables_initializer())
    before = session.run(y)
    (call,) = bn_tf1.batch_norm_calls()
    session.run(tf.assign_add(call.beta, tf.ones([CHANNELS])))
    np.testing.assert_array_equal(session.run(y), before)
    session.run(tf.local_variables_initializer())
    np.testing.assert_allclose(session.run(y), before + 1, rtol=1e-5, atol=1e-5)


def test_two_calls_of_a_layer_fold_their_own_weights_once(start):
    values = make_statistics()
    inputs = [product("float32"), tf.matmul(tf.ones([2, 3]), tf.ones([3, CHANNELS]))]
    outputs = [
        make_layer(x, values, fold=fold, name="one", reuse=tf.AUTO_REUSE)
        for x in inputs
        for fold in (True, "once")
    ]
    session = start()
    session.run(tf.local_variables_initializer())
    outputs = session.run(outputs)
    assert_equal_but_for_rounding(outputs[0], outputs[1])
    assert_equal_but_for_rounding(outputs[2], outputs[3])


def test_weights_that_change_with_each_step_are_not_folded_once():
    weights = tf.reshape(tf.placeholder(tf.float32, [24], name="fed"), [4, CHANNELS])
    x = tf.matmul(tf.ones([8, 4]), weights)
    make_layer(x, make_statistics())
    with pytest.raises(ValueError, match="`fold` is 'once'.* 'fed', which changes"):
        make_layer(x, make_statistics(), fold="once")


def test_in_control_flow_nothing_is_folded_once():
    def branch():
        return make_layer(product("float32"), make_statistics(), fold="once")

    with pytest.raises(ValueError, match="`fold` is 'once', but the layer is built in"):
        tf.cond(tf.placeholder(tf.bool, []), branch, lambda: product("float32"))
