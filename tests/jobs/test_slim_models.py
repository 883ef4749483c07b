"""The slim networks: slim's variables, and slim's logits from slim's own weights."""

import hashlib

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from bn_tf1.jobs import models, slim_models
from bn_tf1.jobs.training import has_channels_first

# SHA-256 of the sorted "name shape" lines of the variables. Those of the ResNets were
# printed from contrib's networks of 7 classes on TensorFlow 1.15.5 (`variables_of`).
VARIABLES = {
    "resnet_v1_50": "6c298def4a79f5b89fdadd47fa526e31566400c64b61f3ec4c1c839eabe000bb",
    "resnet_v2_50": "2bc699d0923cd2ba1eca067e135fc35ab7c63f8de8164cb8777f590273290564",
    "mobilenet_v1": "0fa4e1aa074c7f8a2c5f0da49f466994ac91b3f2d279235d22caeae0e31ede07",
}
MODELS = {name: getattr(slim_models, name) for name in VARIABLES}
EPSILON = 1e-5
# Sums of up to 4,608 float32 products, fifty layers one after the other.
TOLERANCE = 1e-5


def logits_of(name, images, **settings):
    settings = models.Settings(num_classes=7, bn_epsilon=EPSILON, **settings)
    return MODELS[name](images, False, settings)


def variables_of(graph):
    variables = graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES)
    lines = sorted(f"{v.op.name} {v.shape.as_list()}" for v in variables)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("name", list(VARIABLES))
def test_the_variables_are_those_of_slim(name, graph):
    logits = logits_of(name, tf.zeros([2, 33, 33, 3]))
    assert logits.shape.as_list() == [2, 7]
    assert variables_of(graph) == VARIABLES[name]


@pytest.mark.skipif(
    not tf.version.VERSION.startswith("1."),
    reason="contrib's networks, the oracle, are in TensorFlow 1.15 alone",
)
@pytest.mark.parametrize("name", ["resnet_v1_50", "resnet_v2_50"])
def test_the_logits_are_those_of_contrib(name, graph, tmp_path):
    from tensorflow.contrib.framework import arg_scope
    from tensorflow.contrib.slim.python.slim.nets import resnet_v1, resnet_v2

    module = {"resnet_v1_50": resnet_v1, "resnet_v2_50": resnet_v2}[name]
    random = np.random.RandomState(1)
    images = random.uniform(size=[2, 49, 49, 3]).astype(np.float32)
    if name == "resnet_v1_50":
        inputs = images * 255 - np.float32(slim_models._MEAN_COLOUR)
    else:
        inputs = images * 2 - 1
    checkpoint = str(tmp_path / "model.ckpt")
    with arg_scope(module.resnet_arg_scope()):
        expected, _ = getattr(module, name)(tf.constant(inputs), 7, is_training=False)
    assert variables_of(graph) == VARIABLES[name]
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        for variable in tf.global_variables():
            if "weights" not in variable.name:
                values = random.uniform(0.5, 1.5, variable.shape.as_list())
                variable.load(values.astype(np.float32), session)
        expected = np.squeeze(session.run(expected))
        tf.train.Saver().save(session, checkpoint)
    with tf.Graph().as_default(), tf.Session() as session:
        logits = logits_of(name, tf.constant(images))
        tf.train.Saver().restore(session, checkpoint)
        found = session.run(logits)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("name", ["resnet_v1_50", "mobilenet_v1"])
def test_channels_first_is_the_same_network(name, start):
    if not has_channels_first():
        pytest.skip("no convolution with channels first on this CPU, without oneDNN")
    images = np.random.RandomState(2).uniform(size=[2, 33, 33, 3]).astype(np.float32)
    last = logits_of(name, tf.constant(images))
    with tf.variable_scope(tf.get_variable_scope(), reuse=True):
        first = logits_of(name, tf.constant(images), data_format="NCHW")
    last, first = start().run([last, first])
    np.testing.assert_allclose(first, last, atol=TOLERANCE * np.abs(last).max())
