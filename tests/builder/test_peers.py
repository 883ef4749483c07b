"""`batch_norm` against the layers it replaces: a second oracle, on TensorFlow 1.15.

tf.layers.batch_normalization and tf.contrib.layers.batch_norm: the same outputs, the
same statistics after several steps, and their checkpoints restore by name.
"""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1

pytestmark = pytest.mark.skipif(
    not tf.version.VERSION.startswith("1."),
    reason="TensorFlow 2.21 has no graph-mode batch norm to compare with: tf.layers "
    "raises 'not available with Keras 3', and tf.contrib is gone",
)

DECAY = 0.9
STEPS = 4
# Both compute in float32, in different orders of the operations.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}

INPUTS = {
    "rank2": ((8, 3), -1, False),
    "rank3_ncw": ((4, 3, 5), 1, False),
    "rank4_nhwc_composed": ((2, 3, 2, 3), -1, False),
    "rank4_nhwc_fused": ((2, 3, 2, 3), -1, True),
    "rank4_nchw_composed": ((2, 3, 2, 3), 1, False),
}


def tf_layers(x, is_training, axis, fused):
    return tf.layers.batch_normalization(
        x, axis=axis, momentum=DECAY, training=is_training, fused=fused
    )


def contrib_layers(x, is_training, axis, fused):
    # Imported here: it takes seconds, and 2.21 has none.
    from tensorflow.contrib import layers

    return layers.batch_norm(
        x,
        decay=DECAY,
        scale=True,
        is_training=is_training,
        fused=fused,
        data_format="NHWC" if axis == -1 else "NCHW",
        scope="batch_normalization",
    )


def ours(x, is_training, axis, fused):
    """The fused kernel's peers average the unbiased variance, the composed ones not."""
    return bn_tf1.batch_norm(
        x,
        is_training,
        axis=axis,
        decay=DECAY,
        ema_variance="unbiased" if fused else "biased",
        name="batch_normalization",
    )


PEERS = {"tf_layers": tf_layers, "contrib": contrib_layers}
PEERS_AND_INPUTS = [
    (peer, name)
    for peer in PEERS
    for name, (shape, axis, _) in INPUTS.items()
    # contrib's composed kernel takes NCHW at rank 4 alone.
    if not (peer == "contrib" and name == "rank3_ncw")
]


def make_batches(shape):
    rng = np.random.RandomState(0)
    return [
        rng.normal(1 + step, 0.5 + step, size=shape).astype(np.float32)
        for step in range(STEPS)
    ]


def train_and_evaluate(layer, shape, axis, fused, checkpoint=None):
    """Outputs in training and in evaluation, gradients, and all variables after it."""
    outputs = []
    with tf.Graph().as_default() as graph, tf.Session() as session:
        known = list(shape)
        known[0] = None
        x = tf.placeholder(tf.float32, known)
        is_training = tf.placeholder(tf.bool, [])
        y = layer(x, is_training, axis, fused)
        gradients = tf.gradients(tf.square(y), [x] + tf.trainable_variables())
        updates = graph.get_collection(tf.GraphKeys.UPDATE_OPS)
        assert len(updates) == 2
        session.run(tf.global_variables_initializer())
        for batch in make_batches(shape):
            outputs.append(
                session.run([y, gradients, updates], {x: batch, is_training: True})[:2]
            )
            outputs.append(session.run([y, gradients], {x: batch, is_training: False}))
        if checkpoint:
            tf.train.Saver().save(session, checkpoint)
        variables = {v.op.name: session.run(v) for v in tf.global_variables()}
    return outputs, variables


@pytest.mark.parametrize("peer, name", PEERS_AND_INPUTS)
def test_outputs_gradients_and_statistics(peer, name):
    shape, axis, fused = INPUTS[name]
    theirs, their_variables = train_and_evaluate(PEERS[peer], shape, axis, fused)
    our, our_variables = train_and_evaluate(ours, shape, axis, fused)
    assert set(our_variables) == set(their_variables)
    for variable, value in their_variables.items():
        np.testing.assert_allclose(our_variables[variable], value, **CLOSE)
    for (our_y, our_gradients), (their_y, their_gradients) in zip(our, theirs):
        np.testing.assert_allclose(our_y, their_y, **CLOSE)
        for one, other in zip(our_gradients, their_gradients):
            np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("peer", list(PEERS))
def test_a_checkpoint_restores_by_name(peer, tmp_path):
    shape, axis, fused = INPUTS["rank4_nhwc_fused"]
    checkpoint = str(tmp_path / "model")
    outputs, variables = train_and_evaluate(
        PEERS[peer], shape, axis, fused, checkpoint=checkpoint
    )
    with tf.Graph().as_default(), tf.Session() as session:
        x = tf.placeholder(tf.float32, shape)
        y = ours(x, False, axis, fused)
        tf.train.Saver().restore(session, checkpoint)
        restored = {v.op.name: session.run(v) for v in tf.global_variables()}
        output = session.run(y, {x: make_batches(shape)[-1]})
    assert set(restored) == set(variables)
    for name in variables:
        np.testing.assert_array_equal(restored[name], variables[name])
    np.testing.assert_allclose(output, outputs[-1][0], **CLOSE)
