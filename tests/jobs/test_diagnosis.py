"""eval.py on a run with one spoilt layer: it warns, and --divergence names the layer."""

import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from bn_tf1.jobs import diagnosis, evaluation
from bn_tf1.jobs.config import Config, ConfigError
from bn_tf1.jobs.evaluation import EvaluationError, Request
from bn_tf1.jobs.training import train
from tests import ROOT
from tests.checkpoints import checkpoint_forge as forge

_STEPS = 80
_LAYERS = [f"layer{i}/batch_norm" for i in (1, 2, 3)]


def _config(model_dir, **options):
    return Config(
        model_dir=str(model_dir),
        **{"model": "mlp", "max_steps": _STEPS, "bn_decay": 0.8, **options},
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The model directory of a short run, for reading only."""
    model_dir = tmp_path_factory.mktemp("trained")
    train(_config(model_dir))
    return model_dir


@pytest.fixture
def spoil(trained, tmp_path):
    """spoil({name: value}) is the path of a checkpoint with these numbers all over."""

    def spoilt(changes):
        shutil.copy(str(trained / "config.json"), str(tmp_path))
        values = forge.read_all(trained / f"model.ckpt-{_STEPS}")
        for name, value in changes.items():
            values[name] = np.full_like(values[name], value)
        return forge.write(tmp_path / f"model.ckpt-{_STEPS}", values)

    return spoilt


def _evaluate(path, eval_dir):
    request = Request(
        model_dir=str(pathlib.Path(path).parent),
        eval_dir=str(eval_dir),
        checkpoint_path=str(path),
    )
    (result,) = evaluation.evaluate(request)
    return result


@pytest.mark.parametrize("layer", _LAYERS)
def test_the_spoilt_layer_is_first(spoil, tmp_path, layer):
    path = spoil({f"{layer}/moving_mean": 9.0, f"{layer}/moving_variance": 0.01})
    found = diagnosis.diagnose(str(tmp_path), path)
    assert found.layers[0].name == layer
    assert found.layers[0].damage > 0.2
    assert found.batch > found.moving + 0.2
    assert found.layers[0].repaired > found.moving + 0.2


def test_both_accuracies_of_a_healthy_run(trained, tmp_path):
    path = trained / f"model.ckpt-{_STEPS}"
    found = diagnosis.diagnose(str(trained), str(path))
    result = _evaluate(path, tmp_path)
    # On 256 of the 360 examples.
    assert found.moving == pytest.approx(result.accuracy, abs=0.05)
    assert found.batch == pytest.approx(found.moving, abs=0.05)
    assert {layer.name for layer in found.layers} == set(_LAYERS)


def test_a_healthy_run_is_evaluated_in_silence(trained, tmp_path, capsys):
    _evaluate(trained / f"model.ckpt-{_STEPS}", tmp_path)
    assert "warning" not in capsys.readouterr().err


def test_statistics_that_were_never_updated_are_told(spoil, tmp_path, capsys):
    layer = _LAYERS[1]
    path = spoil({f"{layer}/moving_mean": 0.0, f"{layer}/moving_variance": 1.0})
    _evaluate(path, tmp_path)
    (line,) = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("warning")
    ]
    assert line.startswith(f"warning: {layer}: moving_mean and moving_variance are at ")


def test_a_network_without_batch_norm_is_refused(tmp_path):
    train(_config(tmp_path, normalization="none", max_steps=2))
    with pytest.raises(ConfigError, match="--normalization is 'none'"):
        diagnosis.diagnose(str(tmp_path), str(tmp_path / "model.ckpt-2"))


def test_a_checkpoint_that_is_gone_is_named(trained):
    with pytest.raises(EvaluationError, match="no checkpoint .*model.ckpt-77"):
        diagnosis.diagnose(str(trained), str(trained / "model.ckpt-77"))


def test_the_script_prints_the_table(spoil, tmp_path):
    spoil({f"{_LAYERS[2]}/moving_mean": 9.0})
    command = [sys.executable, "eval.py", "--run_once", "--divergence"]
    command += [
        f"--model_dir={tmp_path}",
        f"--checkpoint_path={tmp_path}/model.ckpt-{_STEPS}",
    ]
    run = subprocess.run(command, cwd=str(ROOT), capture_output=True, check=True)
    lines = run.stdout.decode().splitlines()
    assert lines[0].startswith(f"step {_STEPS}: accuracy 0.")
    assert lines[1].startswith("moving statistics: 0.")
    assert lines[3].split()[0] == _LAYERS[2]
    assert len(lines) == 3 + len(_LAYERS)
