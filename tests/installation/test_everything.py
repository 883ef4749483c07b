"""`install()`: layers, tf_slim and contrib run as they did, and go back as they were."""

import importlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow
import tensorflow.compat.v1 as tf
import tf_slim
from tf_slim.nets import resnet_utils, resnet_v1

import bn_tf1
from bn_tf1.undoable_changes import works
from tests import ROOT, reference

HAD_LAYERS = works(tf.layers, "conv2d")
ON_TF1 = tf.version.VERSION.startswith("1.")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PLACES = [
    (tf.layers, "conv2d"),
    (tf.layers, "BatchNormalization"),
    (tf.layers, "InputSpec"),
    (tf, "contrib"),
    (tensorflow, "contrib"),
]


@pytest.fixture
def installed():
    """The names that were replaced; what was installed is gone after the test."""
    bn_tf1.uninstall()
    names = bn_tf1.install(contrib=True)
    yield names
    bn_tf1.uninstall()


def variable_names():
    return [v.op.name for v in tf.global_variables()]


# --------------------------------------------------------------------------- tf.layers


def test_a_network_of_tf_layers(installed, start):
    """Every kind of layer, with the names that TensorFlow 1.15 gives the variables."""
    x = tf.constant(np.random.RandomState(0).randn(4, 8, 8, 3), tf.float32)
    y = tf.layers.conv2d(x, 4, 3, padding="same", use_bias=False)
    y = tf.nn.relu(tf.layers.batch_normalization(y, training=True))
    y = tf.layers.separable_conv2d(y, 4, 3)
    y = tf.layers.BatchNormalization(name="bn")(y, training=True)
    y = tf.layers.conv2d_transpose(tf.layers.max_pooling2d(y, 2, 2), 2, 3)
    y = tf.layers.average_pooling2d(y, 2, 2)
    y = tf.layers.dropout(tf.layers.flatten(y), 0.5, training=True)
    y = tf.layers.Dense(5, name="logits")(y)
    assert y.shape.as_list() == [4, 5]
    assert variable_names() == [
        "conv2d/kernel",
        "batch_normalization/gamma",
        "batch_normalization/beta",
        "batch_normalization/moving_mean",
        "batch_normalization/moving_variance",
        "separable_conv2d/depthwise_kernel",
        "separable_conv2d/pointwise_kernel",
        "separable_conv2d/bias",
        "bn/gamma",
        "bn/beta",
        "bn/moving_mean",
        "bn/moving_variance",
        "conv2d_transpose/kernel",
        "conv2d_transpose/bias",
        "logits/kernel",
        "logits/bias",
    ]
    train_op = bn_tf1.make_train_op(tf.reduce_sum(y), tf.train.AdamOptimizer(0.1))
    session = start()
    session.run(train_op)
    statistics = [v for v in tf.global_variables() if "moving_mean" in v.op.name]
    for value in session.run(statistics):
        assert np.all(value != 0)


def test_what_works_is_left(installed):
    names = {name for name in installed if "contrib" not in name}
    assert ("tf.compat.v1.layers.dense" in names) == (not HAD_LAYERS)
    assert not [name for name in names if "Convolution" in name]
    assert not ON_TF1 or names == set()
    assert bn_tf1.install(contrib=True) == ()
    assert bn_tf1.layers.install() == ()


def test_the_module_of_the_layer_itself(installed):
    module = importlib.import_module("tensorflow.python.layers.normalization")
    module.BatchNorm(name="bn")(tf.zeros([2, 3]), training=True)
    assert len(tf.get_collection("update_ops")) == 2


# ----------------------------------------------------------------------------- tf_slim


def test_one_function_wherever_slim_has_it(installed, start):
    """Call, `normalizer_fn`, key of a scope and the networks of slim."""
    assert tf_slim.layers.batch_norm is tf_slim.batch_norm
    assert sys.modules["tf_slim.layers"].batch_norm is tf_slim.batch_norm
    x = np.random.RandomState(0).randn(16, 3).astype(np.float32) + 2
    with tf_slim.arg_scope([tf_slim.batch_norm], is_training=False, scale=True):
        y = tf_slim.fully_connected(
            x, 5, activation_fn=None, normalizer_fn=tf_slim.batch_norm, scope="fc"
        )
        assert tf.get_collection("update_ops") == []
        with tf_slim.arg_scope([tf_slim.batch_norm], is_training=True, decay=0.0):
            z = tf_slim.batch_norm(tf.constant(x), scope="bn")
    assert {"fc/BatchNorm/gamma", "bn/gamma"} < set(variable_names())
    session = start()
    output = session.run([y, z] + tf.get_collection("update_ops"))[1]
    np.testing.assert_allclose(output, reference.training_output(x), **CLOSE)
    with tf.variable_scope("bn", reuse=True):
        mean = session.run(tf.get_variable("moving_mean"))
    np.testing.assert_allclose(mean, x.mean(axis=0), **CLOSE)


@pytest.mark.parametrize("is_training", [False, True])
def test_a_network_of_slim(installed, is_training):
    scope = resnet_utils.resnet_arg_scope()
    block = resnet_v1.resnet_v1_block("block1", base_depth=4, num_units=2, stride=2)
    with tf_slim.arg_scope(scope):
        resnet_v1.resnet_v1(tf.zeros([2, 32, 32, 3]), [block], 7, is_training)
    layers = [name for name in variable_names() if name.endswith("/moving_mean")]
    assert len(layers) == 8
    updates = tf.get_collection("update_ops")
    assert len(updates) == (16 if is_training else 0)


# Runs in a process of its own: tf_slim is imported after the call.
LATER = """
import tensorflow.compat.v1 as tf
tf.disable_v2_behavior()
import bn_tf1
names = bn_tf1.install()
assert not [name for name in names if "slim" in name], names
import tf_slim as slim
from tf_slim.nets import inception
assert slim.batch_norm is slim.layers.batch_norm
ours = slim.batch_norm is bn_tf1.slim.batch_norm
with slim.arg_scope([slim.batch_norm], is_training=False):
    slim.conv2d(tf.zeros([2, 4, 4, 3]), 5, 1, normalizer_fn=slim.batch_norm)
assert tf.get_collection("update_ops") == []
bn_tf1.uninstall()
print(ours, slim.batch_norm is bn_tf1.slim.batch_norm)
"""


def test_a_slim_that_is_imported_later(installed):
    was_broken = "tf_slim.batch_norm" in installed
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LATER],
        check=False,
        cwd=str(ROOT),
        capture_output=True,
        text=True,
    )
    expected = f"{was_broken} False"
    assert result.stdout.strip() == expected, result.stdout + result.stderr


def test_a_scope_of_the_original_counts_without_install():
    """Who changes a call and forgets the key must not stay in training mode."""
    with tf_slim.arg_scope([tf_slim.batch_norm], is_training=False, scale=True):
        bn_tf1.slim.batch_norm(tf.zeros([4, 3]), scope="a")
        tf_slim.conv2d(
            tf.zeros([4, 2, 2, 3]), 5, 1, normalizer_fn=bn_tf1.slim.batch_norm
        )
        assert tf.get_collection("update_ops") == []
        bn_tf1.slim.batch_norm(tf.zeros([4, 3]), is_training=True, scope="b")
    assert len(tf.get_collection("update_ops")) == 2
    assert [name for name in variable_names() if name.endswith("/gamma")] == [
        "a/gamma",
        "Conv/BatchNorm/gamma",
        "b/gamma",
    ]


# ----------------------------------------------------------------------------- contrib


def test_contrib_is_imported_as_ever(installed):
    import tensorflow.contrib.slim as as_module
    from tensorflow.contrib import framework, layers, slim
    from tensorflow.contrib.framework.python.ops import arg_scope, variables
    from tensorflow.contrib.layers.python.layers import utils
    from tensorflow.contrib.slim.nets import vgg

    assert slim is as_module is tf.contrib.slim is tensorflow.contrib.slim
    assert callable(vgg.vgg_16) and callable(utils.collect_named_outputs)
    assert callable(variables.get_or_create_global_step)
    with framework.arg_scope(
        [slim.conv2d],
        normalizer_fn=layers.batch_norm,
        weights_regularizer=tf.contrib.layers.l2_regularizer(0.5),
        weights_initializer=tf.contrib.layers.xavier_initializer(),
    ), arg_scope([layers.batch_norm], is_training=False):
        y = slim.conv2d(tf.zeros([2, 4, 4, 3]), 5, 3, scope="conv1")
    assert framework.nest.flatten({"y": y}) == [y]
    assert "conv1/BatchNorm/beta" in [v.op.name for v in slim.get_model_variables()]
    assert tf.get_collection("update_ops") == []
    assert len(tf.losses.get_regularization_losses()) == 1


def from_contrib():
    from tensorflow.contrib import no_such

    return no_such


def from_framework():
    from tensorflow.contrib.framework import no_such

    return no_such


ABSENT = {
    "attribute": lambda: tf.contrib.no_such,
    "import": lambda: importlib.import_module("tensorflow.contrib.no_such"),
    "from": from_contrib,
    "module_of_slim": lambda: importlib.import_module(
        "tensorflow.contrib.slim.python.slim.no_such"
    ),
    "name_in_layers": lambda: tf.contrib.layers.no_such,
    "name_in_framework": from_framework,
}


@pytest.mark.parametrize("ask", list(ABSENT.values()), ids=list(ABSENT))
def test_what_is_not_in_contrib_is_named(installed, ask):
    with pytest.raises((AttributeError, ImportError), match="no_such"):
        ask()


# ----------------------------------------------------------------------------- and back


def test_uninstall_leaves_all_as_it_was():
    bn_tf1.uninstall()
    slims = tf_slim.batch_norm

    def state():
        return [works(*place) for place in PLACES] + list(sys.meta_path)

    before = state()
    bn_tf1.install(contrib=True)
    assert all(works(*place) for place in PLACES)
    bn_tf1.uninstall()
    assert state() == before
    assert tf_slim.batch_norm is tf_slim.layers.batch_norm is slims
    assert not ON_TF1 or "tensorflow.contrib" in sys.modules
    assert ON_TF1 or not [n for n in sys.modules if n.startswith("tensorflow.contrib")]
    assert not hasattr(bn_tf1.slim.batch_norm, "_key_op")
