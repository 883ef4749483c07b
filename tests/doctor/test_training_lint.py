"""`make_train_op` warns of what layers of other makers suffer from, and else is silent."""

import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from tests.graphs import graph_zoo
from tests.graphs.graph_zoo import convolution, images, loss_of


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    monkeypatch.setattr(
        tf.logging, "warning", lambda text, *parts: lines.append(text % parts)
    )
    return lines


def test_silent_when_healthy(warnings):
    loss = loss_of(graph_zoo.ours(convolution(images()), True))
    bn_tf1.make_train_op(loss, tf.train.AdamOptimizer())
    assert warnings == []


def test_updates_of_another_maker_that_are_in_no_collection(warnings):
    loss = loss_of(graph_zoo.with_nn(convolution(images()), True))
    tf.get_default_graph().clear_collection(tf.GraphKeys.UPDATE_OPS)
    bn_tf1.make_train_op(loss, tf.train.AdamOptimizer())
    (line,) = warnings
    assert line.startswith("batch norm bn: No train op runs the 2 update operations")
    assert "tf.control_dependencies" in line


def test_updates_that_the_user_chose(warnings):
    loss = loss_of(graph_zoo.with_nn(convolution(images()), True))
    bn_tf1.make_train_op(loss, tf.train.AdamOptimizer(), update_ops=[])
    assert warnings == []


def test_a_layer_without_updates(warnings):
    y = graph_zoo.with_nn(convolution(images()), True, collect=False)
    bn_tf1.make_train_op(loss_of(y), tf.train.AdamOptimizer())
    (line,) = warnings
    assert "no operation of the graph updates bn/moving_mean" in line
