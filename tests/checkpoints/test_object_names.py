"""SavedModels and checkpoints of objects: their variables are known by their names."""

import os

import pytest
import tensorflow.compat.v2 as tf2
from tensorflow.python.eager import context

from bn_tf1.checkpoints.object_names import (
    OBJECT_GRAPH,
    as_in_checkpoint,
    variable_names,
)
from bn_tf1.checkpoints.reader_writer import CheckpointError
from bn_tf1.checkpoints.tensor_file import open_tensors
from bn_tf1.doctor.examination import examine

NAMES = ("gamma", "beta", "moving_mean", "moving_variance")


@pytest.fixture(autouse=True)
def eager():
    with context.eager_mode():
        yield


class Layer(tf2.Module):
    """A batch norm as an object; `scope` is what its variables are called by."""

    def __init__(self, scope, statistic=0.5, gamma=1.0):
        super().__init__(name="layer")
        values = ([gamma, 1.0], [0.0, 0.0], [statistic, 0.0], [statistic + 1, 1.0])
        for name, value in zip(NAMES, values):
            variable = tf2.Variable(
                value, name=scope + name, trainable=name in NAMES[:2]
            )
            setattr(self, name, variable)

    def __call__(self, x, is_training):
        mean, variance = self.moving_mean, self.moving_variance
        if is_training:
            mean, variance = tf2.nn.moments(x, [0])
        return tf2.nn.batch_normalization(
            x, mean, variance, self.beta, self.gamma, 1e-3
        )


class Net(tf2.Module):
    """Two layers, held as Keras holds them: by attributes, and by a list of variables."""

    def __init__(self, is_training=False, as_lists=False, scopes=("a/", "b/")):
        super().__init__(name="net")
        self.is_training = is_training
        first, second = Layer(scopes[0]), Layer(scopes[1])
        if as_lists:
            self.saved_variables = [
                getattr(layer, name) for layer in (first, second) for name in NAMES
            ]
            self._all_variables = list(reversed(self.saved_variables))
            self._layers_of = lambda: (first, second)
        else:
            self.first, self.second = first, second
            self._layers_of = lambda: (self.first, self.second)

    @tf2.function(input_signature=[tf2.TensorSpec([None, 2], tf2.float32)])
    def serve(self, x):
        for layer in self._layers_of():
            x = tf2.nn.relu(layer(x, self.is_training))
        return {"y": x}


def saved_model(folder, net):
    tf2.saved_model.save(net, str(folder), signatures=net.serve)
    return str(folder)


def checkpoint(folder, obj):
    return tf2.train.Checkpoint(model=obj).save(str(folder / "ckpt"))


@pytest.mark.parametrize("as_lists", [False, True])
def test_a_healthy_saved_model_of_objects(tmp_path, as_lists):
    found = examine(saved_model(tmp_path, Net(as_lists=as_lists)))
    assert [f for f in found.findings if f.gravity != "note"] == []
    assert [row.name for row in found.layers] == ["a", "b"]
    for row in found.layers:
        assert (row.kind, row.channels, row.mode) == ("composed", 2, "inference")
        assert row.mean.quantiles[-1] == 0.5


@pytest.mark.parametrize("as_lists", [False, True])
def test_a_signature_that_uses_batch_statistics(tmp_path, as_lists):
    net = Net(is_training=True, as_lists=as_lists)
    found = examine(saved_model(tmp_path, net))
    graver = [f for f in found.findings if f.gravity == "error"]
    assert [(f.check, f.layer) for f in graver] == [
        ("training-mode-in-inference", "a"),
        ("training-mode-in-inference", "b"),
    ]


def test_statistics_in_an_object_checkpoint_are_told_by_the_layers_name(tmp_path):
    net = Net()
    net.second = Layer("b/", statistic=0.0, gamma=2.0)  # trained, never updated
    found = examine(checkpoint(tmp_path, net))
    assert [row.name for row in found.layers] == ["a", "b"]
    errors = [(f.check, f.layer) for f in found.findings if f.gravity == "error"]
    assert errors == [("never-updated", "b")]


def test_variables_of_one_name_are_called_by_the_way_to_them(tmp_path):
    file = open_tensors(checkpoint(tmp_path, Net(scopes=("", ""))))
    names = {name for name in variable_names(file) if "moving" in name}
    assert names == {
        f"model/{layer}/moving_{statistic}"
        for layer in ("first", "second")
        for statistic in ("mean", "variance")
    }


def test_a_checkpoint_by_name_keeps_its_names(tmp_path):
    file = open_tensors("tests/fixtures/contrib/model.ckpt")
    assert variable_names(file) == {name: name for name in file.tensors}
    assert as_in_checkpoint(file, ["any"]) == ["any"]


def test_a_damaged_description_of_the_objects(tmp_path):
    prefix = checkpoint(tmp_path, Net())
    part = open_tensors(prefix).tensors[OBJECT_GRAPH].parts[0]
    with open(part.path, "r+b") as file:
        file.seek(part.offset)
        file.write(b"\xff" * part.size)
    with pytest.raises(
        CheckpointError, match="_CHECKPOINTABLE_OBJECT_GRAPH is damaged"
    ):
        examine(prefix)
    assert os.path.exists(prefix + ".index")
