"""A run of train.py, exported: the model reaches on the run's data what the run does."""

import json

import numpy as np
import pytest

import bn_tf1
from bn_tf1.jobs import evaluation
from bn_tf1.jobs.config import Config, ConfigError
from bn_tf1.jobs.finished.exported_runs import evaluate_exported
from bn_tf1.jobs.training import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("run"))
    train(Config(model_dir=folder, max_steps=30, model="mlp"))
    return folder


def test_stored_pixels_give_the_accuracy_of_the_run(run, tmp_path):
    out = tmp_path / "model.pb"
    made = bn_tf1.export(run, str(out), to="frozen", preprocessing=True, fold=True)
    assert any("3 of 3 layers are folded" in text for text in made.changed)
    (given,) = made.inputs
    assert given.dtype.name == "uint8"
    assert given.shape == (None, 8, 8, 1)
    described = json.loads((tmp_path / "model.pb.json").read_text(encoding="utf-8"))
    assert described["class_names"] == [str(digit) for digit in range(10)]
    assert described["config"]["model"] == "mlp"
    found = evaluate_exported(str(out), run, "test")
    request = evaluation.Request(run, run_once=True)
    (expected,) = evaluation.evaluate(request)
    assert found.examples == expected.examples
    assert found.accuracy == expected.accuracy
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)


def test_what_is_no_exported_model(run, tmp_path):
    with pytest.raises(ConfigError, match="but .* cannot be read"):
        evaluate_exported(str(tmp_path / "none"), run, "test")
