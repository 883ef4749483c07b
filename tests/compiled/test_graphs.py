"""A training graph with the compiled operation, for those who read and rewrite graphs."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1.compiled import library
from bn_tf1.graphs.layer_analysis import find_layers
from bn_tf1.graphs.view import view_of
from bn_tf1.population.imported_graphs import FedExamples, recalibrate_graph

pytestmark = pytest.mark.usefixtures("cache")

VALUES = np.random.RandomState(0).normal(size=(6, 5, 5, 4)).astype(np.float32)


def _layer(x, is_training, **options):
    return bn_tf1.batch_norm(
        x, is_training, decay=0.9, kernel="compiled", activation="relu", **options
    )


def _trained(x, is_training):
    """A loss with a residual block, and the op that trains it."""
    with tf.variable_scope("first"):
        y = _layer(x, is_training, ema_variance="unbiased")
    with tf.variable_scope("second"):
        y = _layer(y + x, is_training, axis=1, residual=y)
    loss = tf.reduce_mean(tf.square(tf.identity(y, "y")), name="loss")
    return tf.group(
        bn_tf1.make_train_op(loss, tf.train.GradientDescentOptimizer(0.1)),
        name="train",
    )


def _in_a_loop(x, is_training):
    def body(step, y):
        return step + 1, _layer(y, True, update="skip", residual=x, name="layer")

    with tf.variable_scope("loop", reuse=tf.AUTO_REUSE):
        _layer(x, True, update="skip", residual=x, name="layer")  # its variables
        _, y = tf.while_loop(lambda step, _: step < 2, body, [0, x])
    loss = tf.reduce_mean(tf.square(y), name="loss")
    variables = tf.trainable_variables()
    optimizer = tf.train.GradientDescentOptimizer(0.1)
    tf.group(optimizer.minimize(loss, var_list=variables), name="train")


@pytest.mark.parametrize("build", [_trained, _in_a_loop])
def test_migrate_graph_leaves_tensorflows_own_operations(build, tmp_path, session):
    x = tf.placeholder(tf.float32, [None, 5, 5, 4], "x")
    build(x, tf.placeholder_with_default(True, [], "is_training"))
    source, target = str(tmp_path / "a.meta"), str(tmp_path / "b.meta")
    tf.train.Saver()
    tf.train.export_meta_graph(source, graph=session.graph)
    report = str(bn_tf1.migrate_graph(source, target))
    assert "replaced" in report and "by TensorFlow's own operations" in report
    expected = _losses(session)
    with tf.Graph().as_default() as graph, tf.Session() as other:
        tf.train.import_meta_graph(target)
        assert not [o for o in graph.get_operations() if "Compiled" in o.type]
        np.testing.assert_allclose(_losses(other), expected, rtol=1e-4)


def _losses(session):
    variables = sorted(tf.global_variables(), key=lambda v: v.op.name)
    initializers = [v.initializer for v in variables]
    session.run(initializers)
    graph = session.graph
    found = []
    for _ in range(3):
        session.run(graph.get_operation_by_name("train"), {"x:0": VALUES})
        found.append(session.run("loss:0", {"x:0": VALUES}))
    assert found[0] != found[1] != found[2]
    return found


@pytest.fixture
def checkpoint(tmp_path, session, monkeypatch):
    """(prefix, y in inference), where nothing is built any more."""
    x = tf.placeholder(tf.float32, [None, 5, 5, 4], "x")
    is_training = tf.placeholder_with_default(True, [], "is_training")
    train = _trained(x, is_training)
    session.run(tf.global_variables_initializer())
    session.run(train, {x: VALUES})
    prefix = tf.train.Saver().save(session, str(tmp_path / "model"))
    y = session.run("y:0", {x: VALUES, is_training: False})
    monkeypatch.setattr(library, "_loaded", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return prefix, y


def test_export_needs_none_of_it(checkpoint, tmp_path):
    prefix, expected = checkpoint
    out = tmp_path / "model.pb"
    bn_tf1.export(prefix, str(out), to="frozen", outputs=["y"], examples=VALUES)
    graph_def = tf.GraphDef.FromString(out.read_bytes())
    with tf.Graph().as_default(), tf.Session() as session:
        (y,) = tf.import_graph_def(graph_def, {}, ["y:0"], name="")
        found = session.run(y, {"x:0": VALUES})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_recalibration_needs_none_of_it(checkpoint, tmp_path):
    prefix, _ = checkpoint
    new = str(tmp_path / "new")
    examples = FedExamples({"x": VALUES})
    recalibrate_graph(prefix + ".meta", new, examples=examples, checkpoint=prefix)
    mean = tf.train.load_variable(new, "first/batch_norm/moving_mean")
    exact = VALUES.astype(np.float64).mean((0, 1, 2))
    np.testing.assert_allclose(mean, exact, rtol=1e-5, atol=1e-6)


def test_the_doctor_reads_it(graph):
    x = tf.placeholder(tf.float32, [None, 5, 5, 4], "x")
    is_training = tf.placeholder(tf.bool, [])
    with tf.variable_scope("first"):
        y = _layer(x, True)
    with tf.variable_scope("second"):
        y = _layer(y, is_training, axis=1, residual=x)
    first, second = find_layers(view_of(graph.as_graph_def(add_shapes=True)))
    assert first.name == "first/batch_norm"
    assert (first.mode, second.mode) == ("training", "switched")
    assert (first.layout, second.layout) == ("NHWC", "NCHW")
    assert first.is_rectified and not second.is_rectified
    assert first.decay == pytest.approx(0.9)
    assert first.epsilon == 1e-3
    assert second.moving_variance == "second/batch_norm/moving_variance"
