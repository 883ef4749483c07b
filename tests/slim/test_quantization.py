"""Quantization-aware training, `tf.contrib.quantize` of 1.15, as with the originals."""

import functools

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from bn_tf1 import layers
from bn_tf1.slim import batch_norm as slim_batch_norm

pytestmark = pytest.mark.skipif(
    not tf.version.VERSION.startswith("1."), reason="TensorFlow 2 has no contrib"
)


def contrib():
    import tensorflow

    return tensorflow.contrib


def layer_of(name, is_training):
    by_layers = {"momentum": 0.9, "training": is_training}
    by_slim = {"decay": 0.9, "scale": True, "is_training": is_training}
    if name.endswith("unfused"):
        by_slim["fused"] = False
    if name == "tf.layers":
        return functools.partial(tf.layers.batch_normalization, **by_layers)
    if name == "layers":
        return functools.partial(layers.batch_normalization, **by_layers)
    if name == "slim, unfused":
        by_slim["kernel"] = "recipe"
    if name.startswith("contrib"):
        return functools.partial(contrib().layers.batch_norm, **by_slim)
    return functools.partial(slim_batch_norm, **by_slim)


def weights(*shape):
    values = np.random.RandomState(shape[-1]).normal(0, 0.3, shape).astype("f")
    return tf.get_variable("weights", initializer=values)


def residual_network(layer, batch):
    """Behind a convolution, also few channels; depthwise; in a residual sum; dense."""
    x = np.random.RandomState(0).normal(0.5, 2, (4, 8, 8, 3)).astype("f")
    x = tf.placeholder_with_default(x, [batch, 8, 8, 3])
    with tf.variable_scope("stem"):
        x = tf.nn.relu6(layer(tf.nn.conv2d(x, weights(3, 3, 3, 4), 2, "SAME")))
    with tf.variable_scope("block"):
        with tf.variable_scope("depthwise"):
            kernel = weights(3, 3, 4, 1)
            y = tf.nn.depthwise_conv2d(x, kernel, [1, 1, 1, 1], "SAME")
            y = tf.nn.relu(layer(y))
        with tf.variable_scope("pointwise"):
            y = layer(tf.nn.conv2d(y, weights(1, 1, 4, 4), 1, "SAME"))
        # By such names contrib finds what comes after an unfused batch norm.
        x = tf.nn.relu(tf.raw_ops.AddV2(x=x, y=y, name="AddV2"))
    with tf.variable_scope("dense"):
        y = layer(tf.matmul(tf.reduce_mean(x, [1, 2]), weights(4, 5)))
        y = tf.nn.relu(y)
    return tf.reduce_mean((y - 0.3) ** 2)


def quantized(name, is_training, batch=4):
    """The nodes that quantize and fold, and what two steps of training give."""
    with tf.Graph().as_default() as graph:
        loss = residual_network(layer_of(name, is_training), batch)
        if is_training:
            contrib().quantize.create_training_graph(graph, quant_delay=0)
        else:
            contrib().quantize.create_eval_graph(graph)
        nodes = {
            op.name
            for op in graph.get_operations()
            if op.type.startswith("FakeQuant") or op.name.endswith("mul_fold")
        }
        step = tf.no_op()
        if is_training:
            with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
                step = tf.train.GradientDescentOptimizer(0.1).minimize(loss)
        moving = tf.get_collection(tf.GraphKeys.GLOBAL_VARIABLES, "stem/.*/moving_")
        with tf.Session() as session:
            session.run(tf.global_variables_initializer())
            losses = [session.run([loss, step])[0] for _ in range(2)]
            return nodes, losses, [np.sum(values) for values in session.run(moving)]


@pytest.mark.parametrize("batch", [4, None])
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize(
    "name, original",
    [
        ("layers", "tf.layers"),
        ("slim", "contrib"),
        ("slim, unfused", "contrib, unfused"),
    ],
)
def test_contrib_folds_what_it_folds_of_the_original(
    name, original, is_training, batch
):
    """The same nodes by name: a checkpoint of one serves the other."""
    nodes, losses, moving = quantized(name, is_training, batch)
    expected_nodes, expected_losses, expected_moving = quantized(
        original, is_training, batch
    )
    assert len(expected_nodes) > 9
    assert nodes == expected_nodes
    # The ranges of the weights are read while they are written: no two runs are equal.
    np.testing.assert_allclose(losses, expected_losses, rtol=0.1)
    assert len(moving) == 2
    np.testing.assert_allclose(moving, expected_moving, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kernel, folds", [("auto", False), ("fused", True)])
def test_large_layers_are_folded_when_they_are_told(kernel, folds, graph):
    x = tf.placeholder(tf.float32, [64, 64, 64, 3])
    y = tf.nn.conv2d(x, weights(3, 3, 3, 16), 1, "SAME")
    loss = tf.reduce_mean(
        tf.nn.relu(layers.batch_normalization(y, training=True, kernel=kernel))
    )
    contrib().quantize.create_training_graph(graph)
    assert folds == any(op.name.endswith("mul_fold") for op in graph.get_operations())
    assert None not in tf.gradients(loss, tf.trainable_variables())
