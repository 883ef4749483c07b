"""Folding: the same outputs without the layer, and a reason where it is left.

The oracle is TensorFlow, running the graph as it was.
"""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from bn_tf1.graphs.rewriting.editable_graph import EditableGraph
from bn_tf1.graphs.rewriting.extraction import extract
from bn_tf1.graphs.rewriting.folding import fold
from bn_tf1.jobs.training import has_channels_first

RANDOM = np.random.RandomState(0)


def weights(*shape):
    return tf.constant(RANDOM.normal(0, 0.5, shape).astype(np.float32), name="weights")


def vector(channels, low=-1.0, high=1.0):
    return RANDOM.uniform(low, high, channels).astype(np.float32)


def fused(x, channels):
    """The fused kernel, with constants named as variables were."""
    with tf.name_scope("bn"):
        return tf.nn.fused_batch_norm(
            x,
            tf.constant(vector(channels, 0.5, 1.5), name="gamma"),
            tf.constant(vector(channels), name="beta"),
            tf.constant(vector(channels), name="moving_mean"),
            tf.constant(vector(channels, 0.5, 1.5), name="moving_variance"),
            is_training=False,
        )[0]


def composed(x, channels, shape=None):
    with tf.name_scope("bn"):
        gamma, beta, mean, variance = (
            tf.constant(vector(channels, low).reshape(shape or [-1]), name=name)
            for name, low in (
                ("gamma", 0.5),
                ("beta", -1.0),
                ("moving_mean", -1.0),
                ("moving_variance", 0.3),
            )
        )
        return tf.nn.batch_normalization(x, mean, variance, beta, gamma, 1e-3)


def images(*shape):
    return tf.placeholder(tf.float32, [None, *(shape or (6, 6, 3))], name="x")


def convolution(x, channels=4, **options):
    filters = weights(3, 3, int(x.shape[-1]), channels)
    return tf.nn.conv2d(x, filters, strides=[1, 1, 1, 1], padding="SAME", **options)


def depthwise(multiplier):
    x = images()
    return tf.nn.depthwise_conv2d(x, weights(3, 3, 3, multiplier), [1] * 4, "SAME")


def dilated():
    # By the operations themselves: TensorFlow 2 has the kernel do it.
    x = tf.space_to_batch_nd(images(), [2, 2], [[2, 2], [2, 2]])
    y = tf.nn.conv2d(x, weights(3, 3, 3, 4), strides=[1] * 4, padding="VALID")
    return tf.batch_to_space_nd(y, [2, 2], [[0, 0], [0, 0]])


def transposed():
    x = images()
    shape = tf.stack([tf.shape(x)[0], 12, 12, 4])
    return tf.nn.conv2d_transpose(x, weights(3, 3, 4, 3), shape, [1, 2, 2, 1])


def volume():
    return tf.nn.conv3d(images(4, 4, 4, 2), weights(2, 2, 2, 2, 4), [1] * 5, "SAME")


def product(transpose=False):
    w = weights(4, 5) if transpose else weights(5, 4)
    return tf.matmul(images(5), w, transpose_b=transpose)


def concatenated():
    x = images()
    parts = [convolution(x, 2), tf.nn.bias_add(convolution(x, 3), vector(3))]
    return tf.concat(parts, -1)


CASES = {
    "convolution": lambda: fused(convolution(images()), 4),
    "bias": lambda: fused(tf.nn.bias_add(convolution(images()), vector(4)), 4),
    "added": lambda: fused(tf.identity(vector(4) + convolution(images())), 4),
    "subtracted": lambda: composed(convolution(images()) - vector(4), 4),
    "composed": lambda: composed(convolution(images()), 4),
    "composed of rank 4": lambda: composed(convolution(images()), 4, [1, 1, 1, 4]),
    "depthwise": lambda: fused(depthwise(1), 3),
    "depthwise, multiplied": lambda: fused(depthwise(2), 6),
    "dilated": lambda: fused(dilated(), 4),
    "transposed": lambda: fused(transposed(), 4),
    "volume": lambda: composed(volume(), 4),
    "product": lambda: composed(product(), 4),
    "turned product": lambda: composed(product(True), 4),
    "reshaped product": lambda: fused(tf.reshape(product(), [-1, 1, 1, 4]), 4),
    "expanded product": lambda: fused(
        tf.expand_dims(tf.expand_dims(product(), 1), 1), 4
    ),
    "channels first": lambda: composed(tf.reshape(product(), [-1, 4, 1]), 4, [4, 1]),
    "concatenation": lambda: fused(concatenated(), 5),
    "concatenation in part": lambda: fused(
        tf.concat([images(), convolution(tf.nn.relu(images()), 2)], 3), 5
    ),
}


def folded(build):
    """(GraphDef before, GraphDef after, what was done)."""
    with tf.Graph().as_default() as graph:
        tf.nn.relu(build(), name="y")
    before = graph.as_graph_def(add_shapes=True)
    changed = EditableGraph(before)
    done = fold(changed, ["y"])
    extract(changed, ["y"])
    return before, changed.graph_def(), done


def outputs(graph_def):
    with tf.Graph().as_default() as graph, tf.Session() as session:
        tf.import_graph_def(graph_def, name="")
        feed = {}
        for operation in graph.get_operations():
            if operation.type == "Placeholder":
                shape = [3, *operation.outputs[0].shape.as_list()[1:]]
                size = int(np.prod(shape))
                feed[operation.outputs[0]] = np.sin(np.arange(size)).reshape(shape)
        return session.run("y:0", feed)


@pytest.mark.parametrize("case", sorted(CASES))
def test_the_output_is_what_it_was(case):
    before, after, done = folded(CASES[case])
    assert len(done.folded) == 1, done.left
    assert not any("BatchNorm" in node.op or node.op == "Rsqrt" for node in after.node)
    expected = outputs(before)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(outputs(after), expected, rtol=1e-4, atol=2e-5)


def in_nchw():
    x = tf.placeholder(tf.float32, [None, 3, 6, 6], name="x")
    y = tf.nn.conv2d(
        x, weights(3, 3, 3, 4), strides=[1] * 4, padding="SAME", data_format="NCHW"
    )
    return composed(y, 4, [4, 1, 1])


def test_channels_first_get_a_bias_which_becomes_one_kernel_with_the_convolution():
    before, after, done = folded(in_nchw)
    assert len(done.folded) == 1, done.left
    (bias,) = (node for node in after.node if node.op == "BiasAdd")
    assert bias.attr["data_format"].s == b"NCHW"
    assert not any(node.op in ("Add", "AddV2") for node in after.node)
    # 1.15 has no such convolution on a CPU, nor has 2.21 without oneDNN.
    if has_channels_first():
        expected = outputs(before)
        np.testing.assert_allclose(outputs(after), expected, rtol=1e-4, atol=2e-5)


def two_users():
    x = convolution(images())
    return fused(x, 4) + x


def padded():
    return fused(tf.pad(convolution(images()), [[0, 0], [1, 1], [1, 1], [0, 0]]), 4)


def added_to_another():
    return fused(convolution(images()) + convolution(images(6, 6, 3)), 4)


LEFT = {
    "takes 'Conv2D', too": two_users,
    "the offset would be padded": padded,
    "adds two tensors": added_to_another,
    "which has no weights": lambda: fused(images(), 3),
    "may move the channels": lambda: fused(
        tf.reshape(convolution(images(), 8), [-1, 6, 12, 4]), 4
    ),
}


@pytest.mark.parametrize("reason", sorted(LEFT))
def test_what_cannot_be_folded_is_left_with_its_reason(reason):
    before, after, done = folded(LEFT[reason])
    assert not done.folded
    ((_, told),) = done.left
    assert reason in told
    np.testing.assert_allclose(outputs(after), outputs(before), rtol=1e-6)


def test_shared_weights_are_copied():
    def build():
        x, w = images(), weights(3, 3, 3, 4)
        first, second = (
            tf.nn.conv2d(y, w, strides=[1] * 4, padding="SAME") for y in (x, x + 1)
        )
        return fused(first, 4) + second

    before, after, done = folded(build)
    assert len(done.folded) == 1
    np.testing.assert_allclose(outputs(after), outputs(before), rtol=1e-4, atol=2e-5)
