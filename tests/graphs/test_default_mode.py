"""A SavedModel whose mode can be fed: what it does when nobody feeds it."""

import pytest
import tensorflow.compat.v1 as tf

from bn_tf1.doctor.lint import lint
from tests.graphs import graph_zoo

SWITCHED = [
    name
    for name in sorted(graph_zoo.MAKERS)
    if name not in ("with_pop_variables", "raw_arithmetic", "textbook")
]


def served(maker, default, tmp_path):
    is_training = tf.placeholder_with_default(default, [], name="is_training")
    tf.enable_resource_variables()
    x = graph_zoo.images(batch=None)
    logits = graph_zoo.logits_of(maker(graph_zoo.convolution(x), is_training))
    tf.disable_resource_variables()
    folder = str(tmp_path / "model")
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        tf.saved_model.simple_save(session, folder, {"x": x}, {"y": logits})
    return [(f.check, f.layer) for f in lint(folder) if f.gravity != "note"]


@pytest.mark.parametrize("name", SWITCHED)
def test_a_mode_that_is_training_by_default(name, tmp_path, control_flow):
    found = served(graph_zoo.MAKERS[name], True, tmp_path)
    assert found == [("training-mode-by-default", "bn")]


@pytest.mark.parametrize("name", SWITCHED)
def test_a_mode_that_is_inference_by_default(name, tmp_path, control_flow):
    assert served(graph_zoo.MAKERS[name], False, tmp_path) == []
