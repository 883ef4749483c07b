"""A layer lives in its scope alone: it can be exported, compiled and fed by itself."""

import numpy as np
import tensorflow.compat.v1 as tf

import bn_tf1


def two_layers():
    x = tf.placeholder(tf.float32, [None, 4, 4, 3], name="x")
    with tf.variable_scope("one"):
        y = bn_tf1.batch_norm(x, True)
    with tf.variable_scope("two"):
        # TensorFlow imports no input that is used more than once.
        return bn_tf1.batch_norm(tf.identity(y), True)


def test_no_layer_takes_anything_of_another_but_its_output(graph):
    y = two_layers()
    inputs = {
        tensor.op.name
        for op in graph.get_operations()
        if op.name.startswith("two/")
        for tensor in op.inputs
        if not tensor.op.name.startswith("two/")
    }
    assert len(inputs) == 1, inputs
    assert y.op.name.startswith("two/")


def test_a_scope_can_be_exported_by_itself(graph):
    two_layers()
    exported = tf.train.export_meta_graph(export_scope="two")
    with tf.Graph().as_default() as other:
        x = tf.random.stateless_normal([5, 4, 4, 3], [1, 2])
        # What comes from outside of the scope: the output of the other layer.
        unbound = exported.collection_def["unbound_inputs"].bytes_list.value
        assert len(unbound) == 1
        tf.train.import_meta_graph(
            exported, input_map={unbound[0].decode(): x}, import_scope="copy"
        )
        with tf.Session(graph=other) as session:
            session.run(tf.global_variables_initializer())
            session.run(tf.get_collection(bn_tf1.UPDATE_OPS_COLLECTION))
            means = [v for v in tf.global_variables() if "moving_mean" in v.name]
            assert session.run(means[0]).any()


def test_the_initial_values_of_a_layer_can_be_fed(graph):
    two_layers()
    gammas = [v for v in tf.global_variables() if v.op.name.endswith("gamma")]
    feeds = {v.initial_value: [float(i)] * 3 for i, v in enumerate(gammas, 5)}
    with tf.Session() as session:
        session.run([v.initializer for v in gammas], feeds)
        assert session.run(gammas)[0].tolist() == [5.0, 5.0, 5.0]
        assert session.run(gammas)[1].tolist() == [6.0, 6.0, 6.0]


def test_a_layer_can_be_compiled_beside_one_that_is_not(session):
    batch = np.random.RandomState(0).normal(size=(6, 3)).astype(np.float32)
    x = tf.constant(batch)
    plain = bn_tf1.batch_norm(x, True)

    def layer(x):
        with tf.variable_scope("compiled", use_resource=True):
            return bn_tf1.batch_norm(x, True, update="in_place")

    (compiled,) = tf.xla.experimental.compile(layer, [x])
    session.run(tf.global_variables_initializer())
    one, other = session.run([plain, compiled])
    np.testing.assert_allclose(one, other, atol=1e-5)
