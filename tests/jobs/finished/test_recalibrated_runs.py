"""`recalibrate` and `--weight_ema` on runs of train.py, and the command for both kinds."""

import dataclasses
import os
import pathlib

import numpy as np
import pytest

import bn_tf1
from bn_tf1.__main__ import main
from bn_tf1.jobs import config as configuration
from bn_tf1.jobs import evaluation
from bn_tf1.jobs.config import Config, ConfigError
from bn_tf1.jobs.evaluation import EvaluationError, Request
from bn_tf1.jobs.finished.recalibrated_runs import recalibrate_run
from bn_tf1.jobs.training import train
from tests import FIXTURES
from tests.checkpoints import checkpoint_forge as forge

_STEPS = 60


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped long before its moving averages had converged."""
    folder = str(tmp_path_factory.mktemp("stopped"))
    train(
        Config(model_dir=folder, model="mlp", max_steps=_STEPS, bn_decay=0.999),
    )
    return folder


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A run that averages its weights, with a checkpoint of each step."""
    folder = str(tmp_path_factory.mktemp("averaged"))
    options = {"max_steps": 4, "save_checkpoint_steps": 1}
    train(Config(model_dir=folder, model="mlp", weight_ema_decay=0.25, **options))
    return folder


def _accuracy(checkpoint, tmp_path, **options):
    request = Request(
        model_dir=os.path.dirname(checkpoint),
        checkpoint_path=checkpoint,
        eval_dir=str(tmp_path / "eval"),
        **options,
    )
    (result,) = evaluation.evaluate(request)
    return result.accuracy


def _main(*arguments):
    return main(["recalibrate", *map(str, arguments)])


def test_a_run_that_was_stopped_early(stopped, tmp_path, capsys):
    new = str(tmp_path / "new" / "model.ckpt")
    assert _main(stopped, new) == 0
    printed = capsys.readouterr().out
    assert "warning" not in printed
    assert "layer3/batch_norm" in printed and "accuracy on 360 held-out" in printed
    assert bn_tf1.examine(new).is_healthy
    before = _accuracy(f"{stopped}/model.ckpt-{_STEPS}", tmp_path)
    after = _accuracy(new, tmp_path)
    run = recalibrate_run(stopped, str(tmp_path / "twin"))
    assert (run.before, run.after) == (before, after)
    assert before < 0.5 and after >= 0.97 * run.batch and run.batch > 0.7
    old, new = forge.read_all(f"{stopped}/model.ckpt-{_STEPS}"), forge.read_all(new)
    changed = {name for name in old if old[name].tobytes() != new[name].tobytes()}
    assert set(old) == set(new) and len(changed) == 6
    assert all("/moving_" in name for name in changed)


def test_the_result_is_trained_on(stopped, tmp_path):
    recalibrate_run(stopped, str(tmp_path / "model.ckpt"), num_examples=200)
    config = configuration.load(str(tmp_path))
    result = train(dataclasses.replace(config, max_steps=_STEPS + 2))
    assert result.step == _STEPS + 2
    # And the folder has its own configuration now, which is still that of the run.
    recalibrate_run(stopped, str(tmp_path / "again"), num_examples=100)


def test_nothing_is_written_over(stopped, tmp_path, capsys):
    source = f"{stopped}/model.ckpt-{_STEPS}"
    assert _main(stopped, source) == 1
    assert f"{source} exists" in capsys.readouterr().err
    configuration.save(Config(model_dir=str(tmp_path), model="resnet"))
    with pytest.raises(ConfigError, match="has the config.json of another run"):
        recalibrate_run(stopped, str(tmp_path / "new"))
    assert _main(stopped, tmp_path / "a" / "b", "--ema") == 1
    assert not (tmp_path / "a").exists()


def test_a_checkpoint_of_another_network_is_refused_in_words_of_the_command(
    stopped, tmp_path, capsys
):
    small = {"synthetic_size": 4, "synthetic_examples": 64, "batch_size": 16}
    other = str(tmp_path / "other")
    train(
        Config(model_dir=other, model="mlp", dataset="synthetic", max_steps=1, **small)
    )
    checkpoint = f"{other}/model.ckpt-1"
    capsys.readouterr()
    assert _main(stopped, tmp_path / "new" / "x", "--checkpoint", checkpoint) == 1
    told = capsys.readouterr().err
    assert f"{checkpoint} has layer1/weights of shape [48, 100], but" in told
    assert "give the folder of the run" in told and "allow_" not in told
    assert not (tmp_path / "new").exists()


def test_exact_has_no_mismatch(stopped, tmp_path):
    options = {"num_examples": 96, "batch_size": 32}
    one_pass = recalibrate_run(stopped, str(tmp_path / "one"), **options)
    exact = recalibrate_run(stopped, str(tmp_path / "exact"), exact=True, **options)
    mismatches = [layer.mismatch for layer in exact.report.layers]
    assert max(mismatches) < 1e-4 < one_pass.report.layers[-1].mismatch


def test_averages_of_the_weights_are_kept(averaged):
    """Against the recurrence, with the decay that grows with the step."""
    states = [forge.read_all(f"{averaged}/model.ckpt-{step}") for step in range(5)]
    name = "layer2/weights"
    expected = np.float64(states[0][name])
    for step in range(1, 5):
        decay = min(0.25, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * np.float64(states[step][name])
        shadow = states[step][name + "/ExponentialMovingAverage"]
        np.testing.assert_allclose(shadow, expected, rtol=1e-5, atol=1e-7)


def test_averages_are_measured_with_statistics_of_their_own(averaged, tmp_path):
    run = recalibrate_run(averaged, str(tmp_path / "new"), ema=True)
    values = forge.read_all(tmp_path / "new")
    for name in ("layer2/weights", "layer1/batch_norm/gamma"):
        np.testing.assert_array_equal(
            values[name], values[name + "/ExponentialMovingAverage"]
        )
    newest = f"{averaged}/model.ckpt-4"
    assert _accuracy(newest, tmp_path, weight_ema=True) == run.after


def test_a_run_without_averages_has_none_to_measure(stopped, tmp_path):
    with pytest.raises(EvaluationError, match="train with --weight_ema_decay"):
        _accuracy(f"{stopped}/model.ckpt-{_STEPS}", tmp_path, weight_ema=True)


def test_the_command_for_a_graph_of_any_library(tmp_path, capsys):
    prefix = FIXTURES / "tf_layers" / "model.ckpt"
    images = np.load(str(FIXTURES / "inputs.npz"))["images"].reshape(-1, 6, 6, 1)
    np.savez(str(tmp_path / "x.npz"), **{"images:0": images})
    command = [f"{prefix}.meta", tmp_path / "new", "--checkpoint", prefix]
    command += ["--examples", tmp_path / "x.npz", "--set", "labels=0"]
    assert _main(*command) == 0
    printed = capsys.readouterr().out
    assert "batch_normalization_1" in printed and "read it back" in printed
    assert (tmp_path / "new.meta").read_bytes() == pathlib.Path(
        f"{prefix}.meta"
    ).read_bytes()
    assert _main(*command) == 1
    assert "nothing is written over" in capsys.readouterr().err
    (tmp_path / "bad.npz").write_bytes(b"PK no such thing")
    assert _main(*command[:-3], tmp_path / "bad.npz") == 1
    assert "bad.npz is no .npz file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere.meta", "new"], "for a .meta file give --checkpoint and --examples"),
        (
            ["nowhere.meta", "new", "--checkpoint=c", "--examples=nowhere.npz"],
            "nowhere",
        ),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys):
    assert _main(*arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
