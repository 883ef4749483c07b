"""activation(normalised + residual), to the bit as one writes it behind the layer."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from tests import reference

RENORM = bn_tf1.Renormalization(0.9, rmin=0.5, rmax=2.0, dmax=1.0)
CASES = {
    "fused": {"kernel": "fused"},
    "composed": {"kernel": "composed"},
    "recipe": {"kernel": "recipe"},
    "relu_alone": {"activation": "relu", "without_residual": True},
    "residual_alone": {"activation": None},
    "channels_not_last": {"axis": 1},
    "inference": {"is_training": False},
    "folded": {"is_training": False, "fold": True},
    "folded_once": {"is_training": False, "fold": "once"},
    "either_mode": {"is_training": "tensor"},
    "either_mode_composed": {"is_training": "tensor", "kernel": "composed"},
    "in_place": {"update": "in_place"},
    "masked": {"weights": np.float32([1, 0, 1, 1])},
    "ghost_batches": {"ghost_batch_size": 2},
    "renormalised": {"renorm": RENORM},
    "float16": {"dtype": tf.float16},
    "bfloat16": {"dtype": tf.bfloat16},
    "float64": {"dtype": tf.float64},
}


def built(x, source, residual, *, is_inside, activation="relu6", **options):
    """The output, and its gradients, of a layer inside or outside of which it is done."""
    inside = {"activation": activation, "residual": residual} if is_inside else {}
    y = bn_tf1.batch_norm(x, **options, **inside)
    if not is_inside and residual is not None:
        y = y + residual
    if not is_inside and activation is not None:
        y = tf.nn.relu6(y) if activation == "relu6" else tf.nn.relu(y)
    assert y.shape.as_list() == x.shape.as_list() and y.dtype == x.dtype
    inputs = [source] if residual is None else [source, residual]
    return [tf.cast(t, tf.float32) for t in (y, *tf.gradients(tf.square(y), inputs))]


@pytest.mark.parametrize("options", list(CASES.values()), ids=list(CASES))
def test_to_the_bit_as_behind_the_layer(options, start):
    options = {"is_training": True, **options}
    dtype = options.pop("dtype", tf.float32)
    if options["is_training"] == "tensor":
        options["is_training"] = tf.placeholder_with_default(True, [])
    source, residual = (
        tf.cast(tf.random.stateless_normal([4, 6, 6, 8], [1, seed]) * 4, dtype)
        for seed in range(2)
    )
    x = source + tf.ones([], dtype)
    if "fold" in options:
        x = tf.nn.conv2d(source, tf.ones([3, 3, 8, 8]), [1, 1, 1, 1], "SAME")
    if options.pop("without_residual", False):
        residual = None
    one, other = (
        built(x, source, residual, is_inside=inside, **options)
        for inside in (True, False)
    )
    session = start()
    session.run(tf.local_variables_initializer())
    for inside, behind in zip(*session.run([one, other])):
        np.testing.assert_array_equal(inside, behind)


def test_as_in_float64(start):
    case = reference.CASES["rank4_nhwc"]
    batch = reference.make_batch(case, "float32", mean=0.0, deviation=2.0)
    residual = reference.make_output_gradient(case)
    slope = reference.make_output_gradient(case, seed=8)
    x, r = (tf.constant(values, tf.float64) for values in (batch, residual))
    y = bn_tf1.batch_norm(x, True, activation="relu6", residual=r)
    dx, dr = tf.gradients(y, [x, r], tf.constant(slope))
    expected = reference.training_output(batch) + residual
    passes = (expected > 0) & (expected < 6)
    assert 0.2 < passes.mean() < 0.8
    found = start().run([y, dx, dr])
    wanted = [
        np.clip(expected, 0, 6),
        reference.training_gradients(batch, slope * passes).x,
        slope * passes,
    ]
    for one, other in zip(found, wanted):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


def test_of_a_list_each_on_its_device(session):
    with tf.device("/cpu:0"):
        xs = [tf.random.stateless_normal([size, 5], [1, size]) for size in (3, 5)]
        residuals = [tf.ones_like(x) for x in xs]
    y = bn_tf1.batch_norm(xs, True, activation="relu", residual=residuals)
    plain = bn_tf1.batch_norm(xs, True, activation="relu")
    alone = bn_tf1.batch_norm(xs, True)
    assert all(one.device == x.device for one, x in zip(y, xs))
    session.run(tf.global_variables_initializer())
    for both, relu, normalised in zip(*session.run([y, plain, alone])):
        np.testing.assert_array_equal(both, np.maximum(normalised + 1, 0))
        np.testing.assert_array_equal(relu, np.maximum(normalised, 0))


def test_it_costs_one_node_each(graph):
    x = tf.placeholder(tf.float32, [None, 8, 8, 16])

    def nodes(**options):
        before = len(graph.get_operations())
        bn_tf1.batch_norm(x, True, **options)
        return len(graph.get_operations()) - before

    assert nodes(activation="relu", residual=x) == nodes() + 2


def test_a_residual_that_comes_to_have_another_shape_is_not_broadcast(start):
    x, residual = tf.ones([4, 3]), tf.placeholder(tf.float32, None)
    y = bn_tf1.batch_norm(x, False, residual=residual)
    session = start()
    session.run(y, {residual: np.ones([4, 3])})
    with pytest.raises(tf.errors.InvalidArgumentError):
        session.run(y, {residual: np.ones([1, 3])})


@pytest.mark.parametrize(
    "residual, error, message",
    [
        (
            lambda: tf.ones([4, 3], tf.float64),
            TypeError,
            "has dtype float64, .* float32",
        ),
        (lambda: tf.ones([4, 1]), ValueError, r"has shape \(4, 1\), .* that of `x`"),
        (lambda: tf.ones([3]), ValueError, r"has shape \(3,\), .* that of `x`"),
    ],
    ids=["dtype", "broadcast", "rank"],
)
def test_residuals_that_are_refused(residual, error, message, graph):
    with pytest.raises(error, match="`residual` " + message):
        bn_tf1.batch_norm(tf.zeros([4, 3]), True, residual=residual())
    assert not tf.global_variables()


def test_as_many_residuals_as_tensors():
    x = tf.zeros([4, 3])
    for residual in (x, [x, x, x]):
        with pytest.raises(ValueError, match="`residual` .* a list of 2 tensors"):
            bn_tf1.batch_norm([x, x], True, residual=residual)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"activation": "ReLU"}, "`activation` is 'ReLU', .* None, 'relu', 'relu6'"),
        ({"activation": tf.nn.relu}, "`activation` is <function relu"),
    ],
)
def test_activations_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bn_tf1.batch_norm(tf.zeros([4, 3]), True, **options)


def test_other_libraries_names_are_told_apart():
    x = tf.zeros([4, 3])
    with pytest.raises(TypeError, match='here it is `activation="relu", or "relu6"`'):
        bn_tf1.batch_norm(x, True, activation_fn=tf.nn.relu)
    with pytest.raises(TypeError, match="here it is `residual`"):
        bn_tf1.batch_norm(x, True, shortcut=x)
    with pytest.raises(TypeError, match="`activation_fn=tf.nn.relu, or any function`"):
        bn_tf1.slim.batch_norm(x, activation="relu")
