"""A network of each origin, on this library: what its checkpoint gives and becomes.

The networks are those of `fixtures/`, whose README lists the calls that the originals
had. Where a library has a drop-in, nothing but the import differs; elsewhere it is the
call, and the checkpoint is converted.
"""

import os

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1 import layers, slim
from bn_tf1.checkpoints.conversion import convert
from tests import FIXTURES
from tests.fixtures.network import make_loss, make_optimizer, network

INPUTS = np.load(os.path.join(FIXTURES, "inputs.npz"))


def tf_layers(training):
    return (
        lambda x: layers.batch_normalization(x, training=training),
        lambda x: layers.batch_normalization(
            x, momentum=0.9, epsilon=1e-5, training=training
        ),
    )


def of_slim(training):
    return (
        lambda x: slim.batch_norm(x, is_training=training),
        lambda x: slim.batch_norm(
            x, decay=0.9, scale=True, epsilon=1e-5, is_training=training, fused=False
        ),
    )


def sonnet(training):
    return (
        lambda x: bn_tf1.batch_norm(x, training, decay=0.9, ema_variance="unbiased"),
        lambda x: bn_tf1.batch_norm(x, training, decay=0.999, scale=False),
    )


def sonnet_v2(training):
    return (
        lambda x: bn_tf1.batch_norm(
            x, training, decay=0.9, ema_variance="unbiased", update="in_place"
        ),
        lambda x: bn_tf1.batch_norm(x, training, decay=0.999, scale=False),
    )


def tensorpack(training):
    return (
        lambda x: bn_tf1.batch_norm(
            x,
            training,
            name="conv_bn",
            decay=0.9,
            epsilon=1e-5,
            ema_variance="unbiased",
        ),
        lambda x: bn_tf1.batch_norm(x, training, name="hidden_bn", decay=0.8),
    )


def keras(training):
    return (
        lambda x: layers.BatchNormalization()(x, training=training),
        lambda x: layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(
            x, training=training
        ),
    )


ORIGINS = {
    "tf_layers": tf_layers,
    "contrib": of_slim,
    "tf_slim": of_slim,
    "sonnet": sonnet,
    "sonnet_v2": sonnet_v2,
    "tensorpack": tensorpack,
    "keras": keras,
}
CONVERTED = ("sonnet", "tensorpack")
STATISTICS = {"mean/EMA": "moving_mean", "variance/EMA": "moving_variance"}


class Model:
    """The network of an origin, restored from its checkpoint in `session`."""

    def __init__(self, origin, session, folder):
        self.session = session
        self.recorded = np.load(os.path.join(FIXTURES, origin, "values.npz"))
        self.images = tf.placeholder(tf.float32, [None, 6, 6, 1])
        self.labels = tf.placeholder(tf.int64, [None])
        self.training = tf.placeholder(tf.bool, [])
        self.logits = network(self.images, *ORIGINS[origin](self.training))
        self.loss = make_loss(self.logits, self.labels)
        self.train_op = None
        if origin != "keras":  # Its optimizer is not one of tf.train's.
            self.train_op = bn_tf1.make_train_op(
                self.loss,
                make_optimizer(origin),
                global_step=tf.train.get_or_create_global_step(),
            )
        checkpoint = os.path.join(FIXTURES, origin, "model.ckpt")
        if origin in CONVERTED:
            checkpoint, source = os.path.join(folder, "converted"), checkpoint
            convert(source, checkpoint, from_dialect=origin, to_dialect="bn_tf1")
        tf.train.Saver().restore(session, checkpoint)

    def run(self, fetches, step, training):
        feed = {
            self.images: INPUTS["images"][step],
            self.labels: INPUTS["labels"][step],
            self.training: training,
        }
        return self.session.run(fetches, feed)

    def assert_statistics(self, prefix):
        values = {v.op.name: v for v in tf.global_variables()}
        recorded = [key for key in self.recorded.files if key.startswith(prefix)]
        assert len(recorded) == 4
        for key in recorded:
            name = key[len(prefix) :]
            for theirs, ours in STATISTICS.items():
                name = name.replace(theirs, ours)
            np.testing.assert_allclose(
                self.session.run(values[name]),
                self.recorded[key].ravel(),  # Sonnet's are [1, .., 1, C].
                rtol=0,
                atol=1e-5,
                err_msg=name,
            )


@pytest.fixture(params=list(ORIGINS))
def model(request, session, tmp_path):
    return Model(request.param, session, str(tmp_path))


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_the_logits(model, mode):
    logits = model.run(model.logits, 0, mode == "training")
    expected = model.recorded["logits_for_" + mode]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6)


def test_ten_updates(model):
    updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
    for step in range(10):
        model.run([model.logits] + updates, step, True)
        if step == 0:
            model.assert_statistics("after_1_updates/")
    model.assert_statistics("after_10_updates/")


@pytest.mark.parametrize(
    "model", [name for name in ORIGINS if name != "keras"], indirect=True
)
def test_ten_training_steps(model):
    losses = []
    for step in range(10):
        losses.append(model.run([model.loss, model.train_op], step, True)[0])
        if step == 0:
            model.assert_statistics("after_1_steps/")
    model.assert_statistics("after_10_steps/")
    np.testing.assert_allclose(losses, model.recorded["losses"], rtol=1e-5)
