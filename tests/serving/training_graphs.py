"""Small training graphs with trained checkpoints, and what they predict in inference."""

from __future__ import annotations

import numpy as np
import tensorflow.compat.v1 as tf

from tests.graphs.graph_zoo import convolution, images, loss_of, make_train_op

STEPS = 5
FED_IN_TRAINING = {"is_training": True, "evaluating": 0}


def random_images(seed, shape):
    return np.random.RandomState(seed).normal(1.0, 2.0, shape).astype(np.float32)


def save_trained(folder, maker, is_training, *, dropout=None, batch=8):
    """Trains a graph around one layer for some steps and saves it.

    Args:
        folder: where to.
        maker: of `graph_zoo`.
        is_training: True, or a function that makes the switch.
        dropout: a function of the activations.
        batch: the batch size, None for any.

    Returns:
        (prefix of the checkpoint, logits of the inference graph on `random_images(9)`).
    """
    prefix = str(folder / "model.ckpt")
    shape = [8, 5, 5, 3]
    with tf.Graph().as_default(), tf.Session() as session:
        tf.set_random_seed(1)
        switch = is_training if is_training is True else is_training()
        y = maker(convolution(images(batch)), switch)
        train_op = make_train_op(loss_of(dropout(y) if dropout else y))
        session.run(tf.global_variables_initializer())
        feed = {"labels:0": [0, 1, 2, 0, 1, 2, 0, 1]}
        for operation in tf.get_default_graph().get_operations():
            if operation.name in FED_IN_TRAINING:
                feed[operation.outputs[0]] = FED_IN_TRAINING[operation.name]
        for step in range(STEPS):
            session.run(train_op, {"images:0": random_images(step, shape), **feed})
        tf.train.Saver().save(session, prefix)
        names = [v.op.name for v in tf.global_variables()]
    return prefix, _logits_of_inference(prefix, maker, random_images(9, shape), names)


def _logits_of_inference(prefix, maker, x, names):
    with tf.Graph().as_default(), tf.Session() as session:
        y = maker(convolution(images(None)), False)
        loss_of(y)
        variables = [v for v in tf.global_variables() if v.op.name in names]
        assert len(variables) == len(tf.global_variables())
        tf.train.Saver(variables).restore(session, prefix)
        return session.run("logits/logits:0", {"images:0": x})


def run_graph(graph_def, feed, outputs):
    """What a graph gives; tensors by name."""
    with tf.Graph().as_default(), tf.Session() as session:
        tf.import_graph_def(graph_def, name="")
        return session.run(
            [f"{name}:0" for name in outputs],
            {f"{name}:0": value for name, value in feed.items()},
        )
