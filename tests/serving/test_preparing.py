"""The inference graph of training graphs of many makers: the logits of inference code.

The oracle is the same layer built with is_training=False on the same checkpoint.
"""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from bn_tf1.graphs.rewriting.folding import fold
from bn_tf1.serving.graph_sources import open_source
from bn_tf1.serving.preparing import Wishes, prepare
from tests.graphs.graph_zoo import MAKERS, ours
from tests.serving.training_graphs import random_images, run_graph, save_trained


def placeholder():
    return tf.placeholder(tf.bool, [], name="is_training")


def with_default():
    return tf.placeholder_with_default(True, [], name="is_training")


def through_logic():
    phase = tf.placeholder(tf.int32, [], name="evaluating")
    return tf.logical_not(tf.equal(phase, 1))


MODES = {"baked": True, "placeholder": placeholder}
ALONE = {"with_pop_variables": ["baked"], "raw_arithmetic": ["baked"]}
ALONE.update(textbook=["baked"])
CASES = [
    (maker, mode)
    for maker in sorted(MAKERS)
    for mode in (ALONE.get(maker) or (["baked", "placeholder"]))
]


@pytest.mark.parametrize("maker, mode", CASES)
def test_the_logits_are_those_of_inference_code(maker, mode, tmp_path):
    prefix, expected = save_trained(tmp_path, MAKERS[maker], MODES[mode])
    model = prepare(open_source(prefix + ".meta"), Wishes(outputs=["logits/logits"]))
    feed = {"images": random_images(9, [8, 5, 5, 3])}
    (found,) = run_graph(model.graph.graph_def(), feed, ["logits/logits"])
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert [c.tensor for c in model.inputs] == ["images:0"]
    left = {node.op for node in model.graph.nodes.values()}
    assert not {"Switch", "Merge", "VariableV2", "VarHandleOp"} & left
    # What it is compared with is right, too, and made in another way.
    if maker == "tf_layers_renorm" and mode == "baked":
        assert model.references == () and "depend on what it norm" in model.unknown
        return
    (reference,) = model.references
    (found,) = run_graph(
        reference.graph.portable_graph_def(),
        feed,
        ["logits/logits"],
    )
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert ("in plain formulas" in reference.what) == (mode == "baked")


def in_residual_block(x, is_training):
    shortcut = tf.pad(x.op.inputs[0], [[0, 0], [0, 0], [0, 0], [0, 1]])
    return ours(x, is_training, activation="relu6", residual=shortcut)


@pytest.mark.parametrize("mode", sorted(MODES))
def test_a_layer_with_a_residual_folds_as_any_other(mode, tmp_path):
    prefix, expected = save_trained(tmp_path, in_residual_block, MODES[mode])
    model = prepare(open_source(prefix + ".meta"), Wishes(outputs=["logits/logits"]))
    assert fold(model.graph, ["logits/logits"]) == (("bn",), ())
    feed = {"images": random_images(9, [8, 5, 5, 3])}
    (found,) = run_graph(model.graph.graph_def(), feed, ["logits/logits"])
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("switch", [with_default, through_logic])
def test_switches_that_are_no_plain_placeholder(switch, tmp_path):
    prefix, expected = save_trained(tmp_path, MAKERS["with_nn"], switch)
    model = prepare(open_source(prefix), Wishes(outputs=["logits/logits"]))
    feed = {"images": random_images(9, [8, 5, 5, 3])}
    (found,) = run_graph(model.graph.graph_def(), feed, ["logits/logits"])
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_a_condition_of_control_flow_v2(tmp_path):
    was_enabled = tf.control_flow_v2_enabled()
    tf.enable_control_flow_v2()
    try:
        prefix, expected = save_trained(tmp_path, MAKERS["with_nn"], placeholder)
    finally:
        if not was_enabled:
            tf.disable_control_flow_v2()
    model = prepare(open_source(prefix), Wishes(outputs=["logits/logits"]))
    assert not model.graph.graph_def().library.function
    feed = {"images": random_images(9, [8, 5, 5, 3])}
    (found,) = run_graph(model.graph.graph_def(), feed, ["logits/logits"])
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("is_v2", [False, True])
def test_a_layer_for_good_in_a_branch_that_is_set(is_v2, tmp_path):
    was_enabled = tf.control_flow_v2_enabled()
    (tf.enable_control_flow_v2 if is_v2 else tf.disable_control_flow_v2)()
    prefix, x = str(tmp_path / "model.ckpt"), random_images(3, [4, 5, 5, 3])
    statistics = np.float32([0.5, -1.0, 2.0]), np.float32([2.0, 0.5, 3.0])
    try:
        with tf.Graph().as_default(), tf.Session() as session:
            images = tf.placeholder(tf.float32, [None, 5, 5, 3], name="images")
            use = tf.placeholder(tf.bool, [], name="use")
            variables = [
                tf.get_variable(f"bn/{name}", initializer=value, use_resource=True)
                for name, value in zip(
                    ["gamma", "beta", "moving_mean", "moving_variance"],
                    [np.ones(3, np.float32), np.zeros(3, np.float32), *statistics],
                )
            ]

            def layer():
                y, *batch = tf.nn.fused_batch_norm(
                    images, *variables[:2], epsilon=1e-3, is_training=True
                )
                updates = [
                    moving.assign_sub((moving - own) * 0.1)
                    for moving, own in zip(variables[2:], batch)
                ]
                with tf.control_dependencies(updates):
                    return tf.identity(y)

            tf.identity(tf.cond(use, layer, lambda: images * 2.0), name="y")
            session.run(tf.global_variables_initializer())
            tf.train.Saver().save(session, prefix)
    finally:
        (tf.enable_control_flow_v2 if was_enabled else tf.disable_control_flow_v2)()
    wishes = Wishes(outputs=["y"], settings={"use": True})
    model = prepare(open_source(prefix), wishes)
    (reference,) = model.references
    expected = (x - statistics[0]) / np.sqrt(statistics[1] + 1e-3)
    for graph in (model.graph, reference.graph):
        (found,) = run_graph(graph.portable_graph_def(), {"images": x}, ["y"])
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert "of 1 layers in plain formulas" in reference.what


def updated_first(y):
    """What follows waits for the updates, as with slim's updates_collections=None."""
    with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
        return tf.identity(y)


def with_a_condition_in_a_loop(y):
    steps = tf.get_variable("steps", initializer=0, trainable=False)

    def step(i, y):
        with tf.control_dependencies([tf.assign_add(steps, 1)]):
            factor = tf.constant(0.5)  # only the update says in which loop it is
            factor = tf.cond(i > 0, lambda: tf.constant(0.25) * factor, lambda: factor)
        with tf.control_dependencies([factor]):
            return i + 1, tf.tanh(y) * factor * tf.constant(2.0)

    return tf.while_loop(lambda i, _: i < 3, step, [0, y])[1]


def test_constants_stay_in_their_branch_or_loop_though_updates_go(tmp_path):
    def maker(x, is_training):
        return with_a_condition_in_a_loop(
            updated_first(MAKERS["with_nn"](x, is_training))
        )

    prefix, expected = save_trained(tmp_path, maker, True)
    model = prepare(open_source(prefix), Wishes(outputs=["logits/logits"]))
    feed = {"images": random_images(9, [8, 5, 5, 3])}
    (found,) = run_graph(model.graph.graph_def(), feed, ["logits/logits"])
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert not any("Assign" in node.op for node in model.graph.nodes.values())
