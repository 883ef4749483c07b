"""Runs that begin with another one's weights: what is taken, what is trained, what stays."""

import os

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from bn_tf1.jobs.config import Config, ConfigError
from bn_tf1.jobs.evaluation import Request, evaluate
from bn_tf1.jobs.training import train

DATA = {
    "dataset": "synthetic",
    "synthetic_size": 8,
    "synthetic_channels": 1,
    "synthetic_examples": 16,
    "batch_size": 4,
    "model": "convnet",
}


def run(folder, **options):
    """Trains, and returns the variables of its last checkpoint by name."""
    train(Config(model_dir=str(folder), **{**DATA, "max_steps": 2, **options}))
    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(folder)))
    names = reader.get_variable_to_shape_map()
    return {n: reader.get_tensor(n) for n in names if not n.endswith("/Momentum")}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """(checkpoint, variables) of a run of ten classes."""
    folder = tmp_path_factory.mktemp("backbone")
    return str(folder / "model.ckpt-2"), run(folder)


def is_statistic(name):
    return "moving_" in name


def test_a_frozen_backbone_stays_bit_for_bit(backbone, tmp_path, capfd):
    checkpoint, before = backbone
    after = run(
        tmp_path,
        synthetic_classes=3,
        init_checkpoint=checkpoint,
        init_exclude="logits",
        train_only="logits",
        bn_normalize_with="moving",
        bn_train_affine=False,
    )
    for name, value in after.items():
        if not name.startswith("logits") and name != "global_step":
            np.testing.assert_array_equal(value, before[name], err_msg=name)
    assert after["logits/weights"].shape == (256, 3)
    table = capfd.readouterr().err
    assert checkpoint in table and "restored                20" in table
    assert "logits" in table


def test_each_switch_by_itself(backbone, tmp_path):
    checkpoint, before = backbone
    affine = [n for n in before if n.endswith(("gamma", "beta"))]
    statistics = [n for n in before if is_statistic(n)]

    def moved(folder, names, **options):
        after = run(tmp_path / folder, init_checkpoint=checkpoint, **options)
        return {bool((after[name] != before[name]).any()) for name in names}

    assert moved("a", statistics, bn_update=False) == {False}
    assert moved("b", affine, bn_train_affine=False) == {False}
    assert moved("c", affine + statistics) == {True}


def test_the_slim_network_begins_with_a_checkpoint_of_its_own(tmp_path):
    options = {"model": "mobilenet_v1", "synthetic_channels": 3, "synthetic_size": 32}
    before = run(tmp_path / "a", max_steps=1, **options)
    after = run(
        tmp_path / "b",
        max_steps=1,
        init_checkpoint=str(tmp_path / "a" / "model.ckpt-1"),
        bn_normalize_with="moving",
        train_only="MobilenetV1/Logits",
        **options,
    )
    changed = {n for n in after if (after[n] != before[n]).any()}
    scope = "MobilenetV1/Logits/Conv2d_1c_1x1"
    assert changed == {f"{scope}/weights", f"{scope}/biases"}


def test_published_weights_without_a_step_are_evaluated(backbone, tmp_path):
    checkpoint, values = backbone
    published = str(tmp_path / "published.ckpt")
    with tf.Graph().as_default(), tf.Session() as session:
        for name, value in values.items():
            if name != "global_step":
                tf.get_variable(name, initializer=value)
        session.run(tf.global_variables_initializer())
        tf.train.Saver().save(session, published)
    folder = os.path.dirname(checkpoint)
    whole, alone = (
        next(evaluate(Request(model_dir=folder, checkpoint_path=path)))
        for path in (checkpoint, published)
    )
    assert (alone.step, alone.accuracy) == (0, whole.accuracy)
    assert alone.loss == whole.loss


MISTAKES = {
    "no file": ({"init_checkpoint": "nowhere/model.ckpt"}, "nowhere/model.ckpt"),
    "shape": ({"synthetic_classes": 3}, "--init_exclude"),
    "another network": (
        {"model": "mlp"},
        "lacks the moving statistics .*--model that it is of",
    ),
    "nothing in common": (
        {"model": "mlp", "init_exclude": "logits"},
        "which has no variable of --model=mlp",
    ),
    "excluded scope": ({"init_exclude": "logit"}, "--init_exclude has 'logit', but no"),
    "scope": ({"train_only": "conv9"}, "'conv9', but no trainable variable"),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_mistakes(name, backbone, tmp_path):
    options, message = MISTAKES[name]
    options = {"init_checkpoint": backbone[0], **options}
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, **options)
    # Nor does the mistake bind the next start.
    assert not list(tmp_path.glob("model.ckpt*")) + list(tmp_path.glob("config.json"))
