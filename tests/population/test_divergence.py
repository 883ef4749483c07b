"""Divergence: the layer that breaks evaluation, on a network with one spoilt layer."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1.population.divergence import LayerTensors

_LAYERS = ("one", "two", "three")
_BATCH = 64


class _Network:
    """Three layers that tell by three random projections which one is positive."""

    def __init__(self):
        self.images = tf.placeholder(tf.float32, [None, 8])
        self.labels = tf.placeholder(tf.int32, [None])
        self.is_training = tf.placeholder(tf.bool, [])
        x = self.images
        for name in _LAYERS:
            x = tf.matmul(x, tf.get_variable(f"{name}/kernel", [x.shape[-1], 16]))
            x = tf.nn.relu(
                bn_tf1.batch_norm(x, self.is_training, decay=0.5, name=f"{name}_bn")
            )
        logits = tf.matmul(x, tf.get_variable("logits", [16, 3]))
        loss = tf.losses.sparse_softmax_cross_entropy(self.labels, logits)
        self.train_op = bn_tf1.make_train_op(loss, tf.train.AdamOptimizer(0.02))
        hits = tf.equal(tf.argmax(logits, 1, output_type=tf.int32), self.labels)
        self.accuracy = tf.reduce_mean(tf.cast(hits, tf.float32))
        self.mode = {
            "training": {self.is_training: True},
            "inference": {self.is_training: False},
        }

    def feeds(self, count, seed):
        random = np.random.RandomState(seed)
        for _ in range(count):
            images = random.normal(5.0, 2.0, [_BATCH, 8]).astype(np.float32)
            labels = np.argmax(images[:, :3], axis=1)
            yield {self.images: images, self.labels: labels}


@pytest.fixture(scope="module")
def once_trained():
    """A trained network and its session, for all tests."""
    with tf.Graph().as_default(), tf.Session() as session:
        tf.set_random_seed(1)
        network = _Network()
        session.run(tf.global_variables_initializer())
        for feed in network.feeds(150, seed=0):
            session.run(network.train_op, {**feed, **network.mode["training"]})
        yield network, session


@pytest.fixture
def trained(once_trained):
    """The trained network; its variables are put back afterwards."""
    _, session = once_trained
    variables = session.graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES)
    values = session.run(variables)
    yield once_trained
    for variable, value in zip(variables, values):
        variable.load(value, session)


def _compare(network, session, **options):
    calls = bn_tf1.batch_norm_calls(session.graph)
    return bn_tf1.divergence(
        session,
        options.pop("layers", calls),
        network.feeds(4, seed=1),
        **network.mode,
        **options,
    )


def _spoil(session, name, value):
    variables = session.graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES)
    (moving,) = [v for v in variables if v.op.name == name]
    moving.load(np.full(moving.shape.as_list(), value, np.float32), session)


def test_a_healthy_network_diverges_little(trained):
    network, session = trained
    found = _compare(network, session, metric=network.accuracy)
    assert found.moving > 0.85
    assert abs(found.moving - found.batch) < 0.1
    assert all(abs(layer.damage) < 0.1 for layer in found.layers)


@pytest.mark.parametrize("spoilt", _LAYERS)
@pytest.mark.parametrize(
    "statistic, value",
    [("moving_mean", 30.0), ("moving_variance", 1e10), ("moving_mean", float("nan"))],
)
def test_the_spoilt_layer_is_first(trained, spoilt, statistic, value):
    network, session = trained
    _spoil(session, f"{spoilt}_bn/{statistic}", value)
    found = _compare(network, session, metric=network.accuracy)
    assert found.layers[0].name == f"{spoilt}_bn"
    assert found.layers[0].repaired > 0.85 > found.moving + 0.2
    assert found.layers[0].damage > 0.2
    without_metric = _compare(network, session)
    assert without_metric.layers[0].name == f"{spoilt}_bn"
    assert without_metric.moving is None


def test_each_of_several_spoilt_layers_shows(trained):
    """To repair one of them does not help; to leave it as it is, alone, does harm."""
    network, session = trained
    for name in ("one", "three"):
        _spoil(session, f"{name}_bn/moving_mean", 30.0)
    found = _compare(network, session, metric=network.accuracy)
    assert found.population > found.moving + 0.2
    assert {layer.name for layer in found.layers[:2]} == {"one_bn", "three_bn"}
    assert found.layers[1].damage > 0.2 > found.layers[2].damage


def test_the_distances_are_those_of_numpy(trained):
    network, session = trained
    call = bn_tf1.batch_norm_calls(session.graph)[0]
    kernel, mean, variance = session.run(
        ["one/kernel:0", call.moving_mean, call.moving_variance]
    )
    outputs = [
        feed[network.images].astype(np.float64) @ kernel
        for feed in network.feeds(4, seed=1)
    ]
    batch_mean = np.mean([x.mean(axis=0) for x in outputs], axis=0)
    batch_variance = np.mean([x.var(axis=0) for x in outputs], axis=0)
    distance = np.max(np.abs(batch_mean - mean) / np.sqrt(variance + 1e-3))
    logs = np.log((batch_variance + 1e-3) / (variance + 1e-3))
    (found,) = _compare(network, session, layers=[call]).layers
    assert found.mean_distance == pytest.approx(distance, rel=1e-3)
    assert found.variance_ratio == pytest.approx(np.exp(np.abs(logs).max()), rel=1e-3)


def test_nothing_is_changed_and_no_operation_is_added(trained):
    network, session = trained
    session.graph.finalize()
    variables = session.graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES)
    before = session.run(variables)
    _compare(network, session, metric=network.accuracy)
    with pytest.raises(tf.errors.InvalidArgumentError):
        bn_tf1.divergence(
            session,
            bn_tf1.batch_norm_calls(session.graph),
            [{network.images: np.zeros([4, 8])}],
            metric=network.accuracy,  # the labels are not fed
            **network.mode,
        )
    for old, new in zip(before, session.run(variables)):
        np.testing.assert_array_equal(new, old)


def test_layers_of_others_and_several_calls_of_one(start):
    x = tf.placeholder(tf.float32, [None, 3])
    mean = tf.get_variable("pop_mean", [3], initializer=tf.zeros_initializer())
    variance = tf.get_variable("pop_var", [3], initializer=tf.ones_initializer())
    calls = [
        LayerTensors("hand-written", mean, variance, *tf.nn.moments(value, [0]))
        for value in (x, x + 4)
    ]
    batch = np.float32([[1, 1, 1], [3, 3, 3]])  # mean 2 and 6, variance 1
    found = bn_tf1.divergence(
        start(), calls, [{x: batch}], training={}, inference={}, epsilon=0.0
    )
    (layer,) = found.layers
    assert layer.name == "hand-written"
    assert layer.mean_distance == pytest.approx(4.0)
    assert layer.variance_ratio == pytest.approx(1.0)


def test_the_table_names_layers_and_metrics(trained):
    network, session = trained
    _spoil(session, "two_bn/moving_mean", 30.0)
    found = _compare(network, session, metric=network.accuracy)
    lines = str(found).splitlines()
    assert lines[0].startswith(f"moving statistics: {found.moving:.4f}, batch")
    assert lines[1].split()[0] == "layer"
    assert lines[2].split()[0] == "two_bn"
    assert len(lines) == 2 + len(_LAYERS)


def test_wrong_arguments_are_named(trained):
    network, session = trained
    calls = bn_tf1.batch_norm_calls(session.graph)
    with pytest.raises(ValueError, match="`layers` is empty"):
        _compare(network, session, layers=[])
    with pytest.raises(ValueError, match="`feeds` is empty"):
        bn_tf1.divergence(session, calls, [], **network.mode)
    with pytest.raises(ValueError, match="`metric` is .* but must be a scalar"):
        _compare(network, session, metric=network.images)
    fixed = calls[0]._replace(batch_mean=None)
    with pytest.raises(ValueError, match="`layers` has 'one_bn', which has no batch"):
        _compare(network, session, layers=[fixed])


@pytest.mark.parametrize("is_resource", [False, True])
def test_a_variable_without_a_value_is_named(start, is_resource):
    images = tf.placeholder(tf.float32, [None, 3])
    is_training = tf.placeholder(tf.bool, [])
    with tf.variable_scope("", use_resource=is_resource):
        bn_tf1.batch_norm(images, is_training, name="bn")
    feed = {images: np.ones([4, 3], np.float32)}
    modes = {"training": {is_training: True}, "inference": {is_training: False}}
    with tf.Session() as session:
        for look in (
            lambda: bn_tf1.divergence(
                session, bn_tf1.batch_norm_calls(), [feed], **modes
            ),
            lambda: bn_tf1.recalibrate(session, [{**feed, is_training: True}]),
            lambda: bn_tf1.check_statistics(session, 1, {**feed, is_training: True}),
        ):
            with pytest.raises(ValueError, match="'bn/[a-z_]+' has no value yet: "):
                look()
