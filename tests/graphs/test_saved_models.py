"""SavedModels and frozen graphs: the layer that is served is found and checked."""

import os

import pytest
import tensorflow.compat.v1 as tf

from bn_tf1.doctor.lint import lint
from bn_tf1.graphs.layer_analysis import find_layers
from bn_tf1.graphs.view import read_graph
from tests.graphs import graph_zoo

UPDATED_IN_PLACE = ("with_ema_class", "with_pop_variables", "contrib_in_place")


@pytest.fixture
def saved(tmp_path):
    """saved(maker, is_training) writes a SavedModel and returns its directory."""

    def save(maker, is_training):
        x = graph_zoo.images(batch=None)
        logits = graph_zoo.logits_of(maker(graph_zoo.convolution(x), is_training))
        folder = str(tmp_path / "model")
        with tf.Session() as session:
            session.run(tf.global_variables_initializer())
            tf.saved_model.simple_save(session, folder, {"x": x}, {"logits": logits})
        return folder

    return save


@pytest.mark.parametrize("maker", sorted(graph_zoo.MAKERS))
def test_a_served_layer_in_inference_mode_is_healthy(maker, saved):
    folder = saved(graph_zoo.MAKERS[maker], False)
    assert [f.check for f in lint(folder) if f.gravity != "note"] == []
    (layer,) = find_layers(read_graph(os.path.join(folder, "saved_model.pb")))
    assert (layer.name, layer.mode) == ("bn", "inference")


@pytest.mark.parametrize("maker", sorted(graph_zoo.MAKERS))
def test_a_served_layer_in_training_mode(maker, saved):
    (found,) = [f for f in lint(saved(graph_zoo.MAKERS[maker], True)) if f.layer]
    assert (found.check, found.gravity) == ("training-mode-in-inference", "error")
    assert (found.layer, found.certainty) == ("bn", "certain")


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("maker", sorted(graph_zoo.MAKERS))
def test_a_frozen_layer(maker, is_training, tmp_path):
    y = graph_zoo.MAKERS[maker](graph_zoo.convolution(graph_zoo.images()), is_training)
    logits = graph_zoo.logits_of(y)
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        frozen = tf.graph_util.convert_variables_to_constants(
            session, session.graph_def, [logits.op.name]
        )
    path = str(tmp_path / "frozen.pb")
    with open(path, "wb") as file:
        file.write(frozen.SerializeToString())
    (layer,) = find_layers(read_graph(path))
    assert layer.name == "bn"
    assert layer.mode == ("training" if is_training else "inference")
    errors = {f.check for f in lint(path) if f.gravity == "error"}
    expected = {"training-mode-in-inference"} if is_training else set()
    if is_training and maker in UPDATED_IN_PLACE:
        expected.add("broken-freeze")  # it assigns to what is a constant now
    assert errors == expected
