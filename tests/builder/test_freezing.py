"""What other tools do with our graphs: constants for variables, and TensorFlow Lite.

And an optimizer over all variables, which must not train the statistics.
"""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1 import layers, slim

LAYERS = {
    "auto": lambda x, mode: bn_tf1.batch_norm(x, mode),
    "composed": lambda x, mode: bn_tf1.batch_norm(x, mode, kernel="composed"),
    "fused": lambda x, mode: bn_tf1.batch_norm(x, mode, kernel="fused"),
    "ghost": lambda x, mode: bn_tf1.batch_norm(x, mode, ghost_batch_size=3),
    "renorm": lambda x, mode: bn_tf1.batch_norm(
        x, mode, renorm=bn_tf1.Renormalization()
    ),
    "layers": lambda x, mode: layers.batch_normalization(x, training=mode),
    "slim": lambda x, mode: slim.batch_norm(x, is_training=mode, scale=True),
}
BATCH = np.random.RandomState(3).normal(1.0, 2.0, [6, 5, 4, 8]).astype(np.float32)


def make_network(name, mode, rank):
    """Names of what goes in and comes out: of a product, as of a network's weights."""
    shape = {2: [None, 8], 3: [None, 20, 8], 4: [None, 5, 4, 8]}[rank]
    x = tf.placeholder(tf.float32, shape, "x")
    weights = tf.get_variable("weights", [8], initializer=tf.constant_initializer(2.0))
    y = tf.identity(LAYERS[name](x * weights, mode), "y")
    return x, y, BATCH.reshape([-1, *shape[1:]])


@pytest.mark.usefixtures("control_flow", "variable_kind")
@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize("name", sorted(LAYERS))
def test_a_tensor_mode_can_be_frozen(name, rank, start):
    mode = tf.placeholder_with_default(False, [])
    x, y, batch = make_network(name, mode, rank)
    session = start()
    definition = tf.graph_util.convert_variables_to_constants(
        session, session.graph_def, ["y"]
    )
    expected = session.run(y, {x: batch})
    with tf.Graph().as_default() as frozen, tf.Session(graph=frozen) as other:
        tf.import_graph_def(definition, name="")
        np.testing.assert_array_equal(other.run("y:0", {"x:0": batch}), expected)


@pytest.mark.parametrize("mode", [True, False, "tensor"])
@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("name", sorted(LAYERS))
def test_the_moving_statistics_get_no_gradient(name, rank, mode):
    mode = tf.placeholder_with_default(False, []) if mode == "tensor" else mode
    _, y, _ = make_network(name, mode, rank)
    moving = [v for v in tf.global_variables() if v not in tf.trainable_variables()]
    assert len(moving) == (5 if name == "renorm" else 2)
    assert set(tf.gradients(tf.reduce_sum(y * y), moving)) == {None}


def test_a_folded_layer_passes_them_none_either():
    x = tf.matmul(tf.placeholder(tf.float32, [6, 8]), tf.get_variable("w", [8, 4]))
    y = bn_tf1.batch_norm(x, False, fold=True)
    moving = [v for v in tf.global_variables() if v not in tf.trainable_variables()]
    assert tf.gradients(tf.reduce_sum(y * y), moving) == [None, None]


@pytest.mark.skipif(
    tf.version.VERSION.startswith("1."), reason="its converter is a program apart"
)
@pytest.mark.usefixtures("control_flow")
@pytest.mark.parametrize("name", ["auto", "renorm"])
def test_a_tensor_mode_can_be_converted_to_lite(name, start):
    mode = tf.placeholder_with_default(False, [])
    x, y, batch = make_network(name, mode, 4)
    session = start()
    model = tf.lite.TFLiteConverter.from_session(session, [x], [y]).convert()
    interpreter = tf.lite.Interpreter(model_content=model)
    ((before, after),) = zip(
        interpreter.get_input_details(), interpreter.get_output_details()
    )
    interpreter.resize_tensor_input(before["index"], batch.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(before["index"], batch)
    interpreter.invoke()
    np.testing.assert_allclose(
        interpreter.get_tensor(after["index"]),
        session.run(y, {x: batch}),
        rtol=1e-6,
        atol=1e-6,
    )
