"""Layers in what TensorFlow makes of a function: compiled by XLA, or computed again."""

import numpy as np
import pytest
import tensorflow as tensorflow_itself
import tensorflow.compat.v1 as tf

import bn_tf1

COMPILED = {
    "fused": ((8, 5, 5, 8), {"kernel": "fused"}),
    "nchw": ((6, 16, 6, 5), {"axis": 1}),
    "mask": ((8, 6, 4), {"weights": np.arange(8, dtype=np.float32)}),
    "ghosts": ((8, 4, 5, 5), {"axis": 1, "ghost_batch_size": 4}),
    "tensor": ((8, 5, 5, 8), {}),
}


@pytest.fixture
def resource_variables():
    were_resources = tf.resource_variables_enabled()
    tf.enable_resource_variables()
    yield
    if not were_resources:
        tf.disable_resource_variables()


@pytest.mark.usefixtures("resource_variables")
@pytest.mark.parametrize("name", sorted(COMPILED))
def test_compiled_by_xla(name):
    """The same output, gradients and statistics as without."""
    shape, options = COMPILED[name]
    batch = np.random.RandomState(0).normal(1, 2, shape).astype(np.float32)
    results = []
    for compile_ in (
        lambda function, inputs: function(*inputs),
        tf.xla.experimental.compile,
    ):
        with tf.Graph().as_default(), tf.Session() as session:
            mode = tf.placeholder_with_default(True, []) if name == "tensor" else True

            def layer(x, mode=mode):
                y = bn_tf1.batch_norm(x, mode, update="in_place", **options)
                loss = tf.reduce_mean(y * tf.sin(y))
                slopes = tf.gradients(loss, [x, *tf.trainable_variables()])
                return [tf.identity(tensor) for tensor in (y, *slopes)]

            outputs = compile_(layer, [tf.constant(batch)])
            session.run(tf.global_variables_initializer())
            results.append(session.run(outputs) + session.run(tf.global_variables()))
    for one, other in zip(*results):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("resource_variables")
@pytest.mark.parametrize("update", ["in_place", "collection"])
def test_computed_again_for_the_gradient(update, start, variable):
    """A layer in `recompute_grad` is built twice, and updates its statistics once."""
    batch = np.random.RandomState(0).normal(2, 1, size=[8, 4]).astype(np.float32)
    x = tf.constant(batch) * tf.get_variable("w", initializer=np.ones(4, "f"))

    def block(h):
        with tf.variable_scope("block", reuse=tf.AUTO_REUSE):
            return tf.nn.relu(
                bn_tf1.batch_norm(h, True, decay=0.25, update=update, name="bn")
            )

    y = tensorflow_itself.recompute_grad(block)(x)
    slopes = tf.gradients(tf.reduce_mean(y * y * x), tf.trainable_variables())
    session = start()
    session.run([slopes, tf.get_collection(tf.GraphKeys.UPDATE_OPS)])
    mean = session.run(variable("block/bn/moving_mean"))
    np.testing.assert_allclose(mean, 0.75 * batch.mean(0), rtol=1e-5)


def test_a_layer_called_again_in_a_scope_of_another_name_is_not_taken_for_that(start):
    for scope in ("first", "second"):
        with tf.name_scope(scope):
            bn_tf1.batch_norm(tf.zeros([4, 3]), True, name="bn", reuse=tf.AUTO_REUSE)
    assert len(tf.get_collection(tf.GraphKeys.UPDATE_OPS)) == 4
