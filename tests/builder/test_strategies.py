"""Layers under `tf.distribute`: each replica moves its own statistics, whose mean counts."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1

BATCH = np.random.RandomState(0).normal(size=[8, 3]).astype(np.float32)
LAYERS = {
    "batch_norm": lambda x: bn_tf1.batch_norm(x, True, decay=0.5, name="bn"),
    "zero_debias": lambda x: bn_tf1.batch_norm(
        x, True, decay=0.5, name="bn", zero_debias=True
    ),
    "recipe": lambda x: bn_tf1.batch_norm(
        x, True, decay=0.5, name="bn", kernel="recipe"
    ),
    "layers": lambda x: bn_tf1.layers.batch_normalization(
        x, momentum=0.5, training=True, name="bn"
    ),
    "slim": lambda x: bn_tf1.slim.batch_norm(x, 0.5, scope="bn", scale=True),
}


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_replicas_with_means_of_1_and_5_have_3(name, tmp_path):
    def step():
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        shift = 1 + 4 * tf.cast(tf.identity(replica), tf.float32)
        y = LAYERS[name](tf.constant(BATCH - BATCH.mean(0)) + shift)
        with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
            return tf.reduce_mean(y)

    strategy = tf.distribute.MirroredStrategy(devices=["/cpu:0", "/cpu:1"])
    with strategy.scope():
        run = getattr(strategy, "experimental_run_v2", None) or strategy.run
        done = strategy.reduce(tf.distribute.ReduceOp.SUM, run(step), axis=None)
        saver = tf.train.Saver()
    with tf.Session(config=tf.ConfigProto(device_count={"CPU": 2})) as session:
        session.run(
            [tf.global_variables_initializer(), tf.local_variables_initializer()]
        )
        session.run(done)
        path = saver.save(session, str(tmp_path / "model"))
    saved = tf.train.load_checkpoint(path)
    share = 1.0 if name == "zero_debias" else 0.5
    mean = saved.get_tensor("bn/moving_mean")
    np.testing.assert_allclose(mean, np.full(3, share * 3.0), rtol=1e-5)
    # All start at 1, which counts half, and zero_debias leaves out.
    variance = (1 - share) + share * BATCH.astype(np.float64).var(0)
    if name == "slim":  # of rank 2, its kernel gives the unbiased one
        variance = (1 - share) + share * BATCH.astype(np.float64).var(0, ddof=1)
    np.testing.assert_allclose(saved.get_tensor("bn/moving_variance"), variance, 1e-5)
    names = {key for key in saved.get_variable_to_shape_map() if "debias" not in key}
    assert {"bn/gamma", "bn/beta", "bn/moving_mean", "bn/moving_variance"} <= names
