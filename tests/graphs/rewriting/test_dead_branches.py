"""What a constant predicate decides. The oracle is TensorFlow, fed that predicate."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from bn_tf1.graphs.rewriting.dead_branches import resolve
from bn_tf1.graphs.rewriting.editable_graph import EditableGraph
from bn_tf1.graphs.rewriting.extraction import drop_controls, extract

VALUES = np.array([1.0, 2.0], np.float32)


def repeated(times, body, value):
    def step(i, v):
        return i + 1, body(v)

    return tf.while_loop(lambda i, v: i < times, step, [0, value])[1]


def doubled(value):
    return value * 2


def nested(value):
    return repeated(3, lambda v: repeated(2, doubled, v), value)


@pytest.mark.usefixtures("control_flow")
@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("branch", [doubled, nested])
def test_a_branch_that_is_not_taken_goes_with_its_loops(branch, flag):
    with tf.Graph().as_default(), tf.Session() as session:
        x = tf.placeholder(tf.float32, [2], "x")
        predicate = tf.placeholder(tf.bool, [], "predicate")
        y = tf.cond(predicate, lambda: branch(x), lambda: x + 1)
        tf.identity(y, "y")
        expected = session.run("y:0", {x: VALUES, predicate: flag})
        graph = EditableGraph(session.graph_def)
    resolve(graph, {"predicate": flag}, {})
    drop_controls(graph, ["y"])
    extract(graph, ["y"])
    operations = {node.op for node in graph.nodes.values()}
    assert operations.isdisjoint(["If", "While", "StatelessIf", "StatelessWhile"])
    has_loop = flag and branch is nested
    assert ("Enter" in operations) == has_loop == ("Merge" in operations)
    with tf.Graph().as_default(), tf.Session() as session:
        tf.import_graph_def(graph.graph_def(), name="")
        found = session.run("y:0", {"x:0": VALUES})
    np.testing.assert_array_equal(found, expected)


@pytest.mark.usefixtures("control_flow")
@pytest.mark.parametrize(
    "predicate",
    [
        # In float32 as in the graph: in float64 each of these is the other way round.
        lambda: tf.equal(1.0 - tf.constant(0.1), 0.9),
        lambda: tf.cast(tf.constant(0.7) * 10.0, tf.int32) >= 7,
        lambda: tf.equal(tf.constant(0.1) + tf.constant(0.2), 0.3),
    ],
    ids=["difference", "cast", "sum"],
)
def test_a_setting_is_computed_in_the_dtype_of_the_graph(predicate):
    _same_after_resolving(lambda x: tf.cond(predicate(), lambda: x, lambda: x * 100))


def test_several_values_are_no_setting():
    def select(x):
        choices = tf.concat(
            [tf.expand_dims(tf.constant(v), 0) for v in (True, False)], 0
        )
        return tf.where(choices, x, x * 100)

    _same_after_resolving(select)


def _same_after_resolving(build):
    with tf.Graph().as_default(), tf.Session() as session:
        x = tf.placeholder(tf.float32, [2], "x")
        tf.identity(build(x), "y")
        expected = session.run("y:0", {x: VALUES})
        graph = EditableGraph(session.graph_def)
    resolve(graph, {}, {})
    extract(graph, ["y"])
    with tf.Graph().as_default(), tf.Session() as session:
        tf.import_graph_def(graph.graph_def(), name="")
        found = session.run("y:0", {"x:0": VALUES})
    np.testing.assert_array_equal(found, expected)
