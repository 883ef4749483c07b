"""A ReLU that is all that takes a layer's output is told from its twins."""

import pytest
import tensorflow.compat.v1 as tf

from bn_tf1.graphs.layer_analysis import find_layers
from bn_tf1.graphs.view import view_of
from tests.graphs import graph_zoo


def crelu(y):
    return tf.concat([tf.nn.relu(y), tf.nn.relu(-y)], -1)


def residual(y):
    return tf.nn.relu(y + tf.placeholder(tf.float32, y.shape))


def summarised(y):
    tf.summary.histogram("y", y)
    return tf.nn.relu(tf.reshape(y, tf.shape(y)))


def read_twice(y):
    return tf.nn.relu(y), tf.reduce_mean(y)


FOLLOWERS = {
    "relu": (tf.nn.relu, True),
    "relu6": (tf.nn.relu6, True),
    "maximum": (lambda y: tf.maximum(y, 0.0), True),
    "clipped": (lambda y: tf.clip_by_value(y, 0.0, 6.0), True),
    "summarised": (summarised, True),
    "leaky": (tf.nn.leaky_relu, False),
    "leaky maximum": (lambda y: tf.maximum(y, 0.2 * y), False),
    "maximum with another number": (lambda y: tf.maximum(y, -1.0), False),
    "elu": (tf.nn.elu, False),
    "crelu": (crelu, False),
    "residual": (residual, False),
    "read twice": (read_twice, False),
    "nothing": (tf.identity, False),
}


def only_layer():
    (layer,) = find_layers(view_of(tf.get_default_graph()))
    return layer


@pytest.mark.parametrize("name", sorted(FOLLOWERS))
@pytest.mark.parametrize("maker", ["ours", "ours_composed", "with_nn", "textbook"])
def test_what_follows_a_layer(maker, name):
    follow, expected = FOLLOWERS[name]
    follow(graph_zoo.MAKERS[maker](graph_zoo.convolution(graph_zoo.images()), True))
    assert only_layer().is_rectified is expected


@pytest.mark.parametrize("maker", ["ours", "ours_composed"])
@pytest.mark.parametrize("mode", [True, "tensor"])
@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
def test_what_a_layer_has_of_its_own(maker, mode, has_residual):
    x = graph_zoo.convolution(graph_zoo.images())
    mode = tf.placeholder(tf.bool, []) if mode == "tensor" else mode
    own = {"activation": "relu", "residual": tf.ones_like(x) if has_residual else None}
    graph_zoo.MAKERS[maker](x, mode, **own)
    assert only_layer().is_rectified is not has_residual


@pytest.mark.parametrize("maker", ["ours", "ours_composed", "with_nn"])
def test_the_arithmetic_of_a_gradient_is_no_call(maker):
    graph_zoo.training_graph(graph_zoo.MAKERS[maker])
    assert only_layer().is_rectified


@pytest.mark.parametrize("maker", ["ours", "with_fused_kernel", "with_nn"])
def test_both_branches_of_a_switch_and_the_gradients(maker, control_flow):
    if control_flow == "control_flow_v2":
        tf.enable_resource_variables()
    is_training = tf.placeholder(tf.bool, [])
    graph_zoo.training_graph(graph_zoo.MAKERS[maker], is_training)
    tf.disable_resource_variables()
    assert only_layer().is_rectified


def test_a_layer_that_is_called_twice_is_rectified_in_both_calls():
    for i, follow in enumerate((tf.nn.relu, tf.nn.tanh)):
        with tf.variable_scope("net", reuse=i > 0):
            follow(graph_zoo.with_nn(graph_zoo.convolution(graph_zoo.images()), True))
    assert not only_layer().is_rectified
