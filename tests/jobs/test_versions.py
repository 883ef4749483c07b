"""Checkpoints trained on one TensorFlow version, evaluated on this one."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from bn_tf1.jobs import config as configuration
from bn_tf1.jobs import network_from_config
from tests import FIXTURES

_TRAINED = FIXTURES / "trained"


@pytest.mark.parametrize("version", ["tensorflow-1.15.5", "tensorflow-2.21.0"])
def test_logits_are_those_of_the_version_that_trained(version):
    folder = _TRAINED / version
    config = configuration.load(str(folder))
    with np.load(str(folder / "logits.npz")) as stored:
        images, expected = stored["images"], stored["logits"]
    labels = tf.zeros([len(images)], tf.int32)
    objective = network_from_config.build(
        tf.constant(images), labels, False, config, 10
    )
    with tf.Session() as session:
        saver = tf.train.Saver(tf.global_variables())
        saver.restore(session, str(folder / "model.ckpt"))
        logits = session.run(objective.logits)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
