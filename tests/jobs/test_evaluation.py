"""The evaluation job, in this process, against NumPy and against what may be wrong."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from bn_tf1.jobs import config as configuration
from bn_tf1.jobs import evaluation, models, network_from_config
from bn_tf1.jobs.config import Config, ConfigError
from bn_tf1.jobs.data import datasets
from bn_tf1.jobs.evaluation import (
    EvaluationError,
    EvaluationTimeout,
    Request,
    evaluate,
)
from bn_tf1.jobs.training import train

_STEPS = 40
_STATISTICS = [
    f"layer{i}/batch_norm/moving_{what}"
    for i in (1, 2, 3)
    for what in ("mean", "variance")
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The model directory of a short run, for reading only."""
    model_dir = str(tmp_path_factory.mktemp("trained"))
    train(
        Config(
            model_dir=model_dir,
            model="mlp",
            max_steps=_STEPS,
            save_checkpoint_steps=20,
            bn_decay=0.8,
        )
    )
    return model_dir


def _request(model_dir, tmp_path, **options):
    return Request(model_dir=model_dir, eval_dir=str(tmp_path / "eval"), **options)


def _copy(model_dir, target):
    shutil.copytree(model_dir, str(target))
    return target


def _test_examples(config):
    with tf.Graph().as_default(), tf.Session() as session:
        dataset = network_from_config.open_split(config, "test")
        batches = datasets.evaluation_batches(dataset, dataset.num_examples)
        iterator = tf.data.make_initializable_iterator(batches)
        batch = iterator.get_next()
        session.run(iterator.initializer)
        return session.run(batch)


def _logits_by_numpy(checkpoint, images):
    """The network of section 4.1 of the paper, in float64, with moving statistics."""
    reader = tf.train.NewCheckpointReader(checkpoint)
    x = images.reshape(len(images), -1).astype(np.float64)
    for layer in ("layer1", "layer2", "layer3"):
        gamma, beta, mean, variance = (
            reader.get_tensor(f"{layer}/batch_norm/{name}").astype(np.float64)
            for name in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        x = x @ reader.get_tensor(layer + "/weights")
        x = gamma * (x - mean) / np.sqrt(variance + 1e-3) + beta
        x = 1 / (1 + np.exp(-x))
    return (2 * x - 1) @ reader.get_tensor("logits/weights") + reader.get_tensor(
        "logits/bias"
    )


def test_accuracy_and_loss_are_those_of_the_moving_statistics(trained, tmp_path):
    (result,) = evaluate(_request(trained, tmp_path, run_once=True))
    images, labels = _test_examples(configuration.load(trained))
    logits = _logits_by_numpy(result.checkpoint, images)
    log_sums = np.log(np.sum(np.exp(logits), axis=1))
    losses = log_sums - logits[np.arange(len(labels)), labels]
    assert result.step == _STEPS
    assert result.examples == len(labels) == 360
    assert result.accuracy == pytest.approx(np.mean(logits.argmax(axis=1) == labels))
    assert result.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert result.accuracy_top5 is None
    assert result.batch_dependence < 1e-5


def test_restored_variables_are_the_saved_ones_bit_for_bit(trained):
    config = configuration.load(trained)
    path = tf.train.latest_checkpoint(trained)
    reader = tf.train.NewCheckpointReader(path)
    graph = evaluation._build_graph(
        config, network_from_config.open_split(config, "test")
    )
    with tf.Session() as session:
        saver = tf.train.Saver(tf.global_variables())
        evaluation._restore(session, saver, graph, path)
        assert graph.logits.graph is session.graph
        restored = {v.op.name: session.run(v) for v in tf.global_variables()}
    assert set(_STATISTICS) < set(restored)
    for name, value in restored.items():
        np.testing.assert_array_equal(value, reader.get_tensor(name), err_msg=name)


def test_each_checkpoint_is_measured_with_its_own_statistics(trained, start):
    """What was folded into the weights of one must not outlive it."""
    config = configuration.load(trained)
    images, _ = _test_examples(config)
    graph = evaluation._build_graph(
        config, network_from_config.open_split(config, "test")
    )
    saver = tf.train.Saver(tf.global_variables())
    session = start()
    paths = tf.train.get_checkpoint_state(trained).all_model_checkpoint_paths
    assert len(paths) >= 2
    for path in [*paths, *reversed(paths)]:
        evaluation._restore(session, saver, graph, path)
        logits = session.run(graph.logits, {graph.images: images})
        np.testing.assert_allclose(
            logits, _logits_by_numpy(path, images), rtol=0, atol=1e-5
        )


def test_each_result_is_a_line_and_a_summary(trained, tmp_path):
    (result,) = evaluate(_request(trained, tmp_path, run_once=True))
    (line,) = (tmp_path / "eval" / "results.jsonl").read_text().splitlines()
    expected = {k: v for k, v in result._asdict().items() if v is not None}
    assert json.loads(line) == expected
    (events,) = (tmp_path / "eval").glob("events*")
    values = {
        value.tag: (event.step, value.simple_value)
        for event in tf.train.summary_iterator(str(events))
        for value in event.summary.value
    }
    assert values == {
        "accuracy": (_STEPS, pytest.approx(result.accuracy)),
        "loss": (_STEPS, pytest.approx(result.loss)),
    }


def test_following_ends_with_the_last_step(trained, tmp_path):
    results = list(evaluate(_request(trained, tmp_path)))
    assert [result.step for result in results] == [_STEPS]


def test_following_times_out_when_the_run_does_not_end(trained, tmp_path):
    config = configuration.load(trained)
    unfinished = _copy(trained, tmp_path / "unfinished")
    configuration.save(
        dataclasses.replace(config, model_dir=str(unfinished), max_steps=99)
    )
    results = []
    with pytest.raises(EvaluationTimeout, match="no new checkpoint in .* for 0 sec"):
        for result in evaluate(_request(str(unfinished), tmp_path, timeout_secs=0.0)):
            results.append(result.step)
    assert results == [_STEPS]


def test_an_older_checkpoint_can_be_named(trained, tmp_path):
    path = str(pathlib.Path(trained) / "model.ckpt-20")
    (result,) = evaluate(_request(trained, tmp_path, checkpoint_path=path))
    assert (result.step, result.checkpoint) == (20, path)


def test_the_training_split_has_its_own_folder(trained, tmp_path):
    copy = _copy(trained, tmp_path / "copy")
    (result,) = evaluate(Request(str(copy), split="train", run_once=True))
    assert (result.split, result.examples) == ("train", 1437)
    assert (copy / "eval_train" / "results.jsonl").exists()


def test_top5_is_reported_for_many_classes(tmp_path):
    config = Config(
        model_dir=str(tmp_path),
        model="mlp",
        dataset="synthetic",
        synthetic_size=8,
        synthetic_classes=20,
        synthetic_examples=100,
        max_steps=30,
    )
    train(config)
    (result,) = evaluate(Request(str(tmp_path), run_once=True))
    assert result.accuracy <= result.accuracy_top5 <= 1
    assert result.accuracy_top5 > 0.5  # by chance 0.25


@pytest.mark.parametrize("missing", _STATISTICS[:2])
def test_a_checkpoint_without_a_moving_statistic_is_refused(trained, tmp_path, missing):
    """As a Saver of the trainable variables alone writes it."""
    copy = _copy(trained, tmp_path / "copy")
    reader = tf.train.NewCheckpointReader(tf.train.latest_checkpoint(trained))
    for name in reader.get_variable_to_shape_map():
        if name != missing:
            tf.get_variable(name, initializer=reader.get_tensor(name))
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        path = tf.train.Saver().save(session, str(copy / "partial.ckpt"))
    with pytest.raises(EvaluationError, match=f"partial.ckpt lacks {missing};"):
        list(evaluate(_request(str(copy), tmp_path, checkpoint_path=path)))


def test_a_checkpoint_of_another_network_is_refused(trained, tmp_path):
    """It is whole: what is wrong is the folder beside it."""
    reader = tf.train.NewCheckpointReader(tf.train.latest_checkpoint(trained))
    for name in reader.get_variable_to_shape_map():
        value = reader.get_tensor(name)
        other = value[:50] if name == "layer2/weights" else value
        tf.get_variable(name, initializer=other)
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        path = tf.train.Saver().save(session, str(tmp_path / "other.ckpt"))
    words = r"layer2/weights of shape \[50, 100\], but .* has \[100, 100\]: give"
    with pytest.raises(EvaluationError, match=words):
        list(evaluate(_request(trained, tmp_path, checkpoint_path=path)))


def test_a_network_that_uses_the_batch_is_refused(trained, tmp_path, monkeypatch):
    mlp = models.MODELS["mlp"]
    monkeypatch.setitem(
        models.MODELS,
        "mlp",
        lambda images, is_training, settings: mlp(
            tf.concat([images, 1 - images], 0), True, settings
        )[: tf.shape(images)[0]],
    )
    with pytest.raises(EvaluationError, match="uses statistics of the batch"):
        list(evaluate(_request(trained, tmp_path, run_once=True)))


def test_weights_that_are_not_finite_are_refused(trained, tmp_path):
    reader = tf.train.NewCheckpointReader(tf.train.latest_checkpoint(trained))
    for name in reader.get_variable_to_shape_map():
        value = reader.get_tensor(name)
        spoilt = value * np.nan if name == "logits/weights" else value
        tf.get_variable(name, initializer=spoilt)
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        path = tf.train.Saver().save(session, str(tmp_path / "nan.ckpt"))
    with pytest.raises(EvaluationError, match="not finite"):
        list(evaluate(_request(trained, tmp_path, checkpoint_path=path)))


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(EvaluationError, match=f"{tmp_path}.*no checkpoint in it"):
        list(evaluate(Request(str(tmp_path), run_once=True)))


def test_a_checkpoint_that_is_not_there_is_named(trained, tmp_path):
    request = _request(trained, tmp_path, checkpoint_path="nowhere/model.ckpt-7")
    with pytest.raises(EvaluationError, match=r"no nowhere/model\.ckpt-7\.index"):
        list(evaluate(request))


def test_checkpoints_without_a_configuration_are_refused(trained, tmp_path):
    copy = _copy(trained, tmp_path / "copy")
    (copy / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"there is no .*config\.json"):
        list(evaluate(Request(str(copy), run_once=True)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"checkpoint_path": "{}/model.ckpt-41"},
            "there are {}/model.ckpt-0, {}/model",
        ),
        ({"checkpoint_path": "{}"}, "which is a folder: give --model_dir={}"),
        ({"model_dir": "{}/eval", "run_once": True}, "did you mean the folder above, "),
        ({"model_dir": "{}/..", "run_once": True}, "there are runs in {}/../run"),
        ({"model_dir": "{}/nowhere", "run_once": True}, "there is no such folder"),
    ],
)
def test_a_mistyped_path_is_answered_with_those_that_are_there(
    trained, tmp_path, options, words
):
    run = _copy(trained, tmp_path / "run")
    (run / "eval").mkdir()
    options = {
        key: value.format(run) if isinstance(value, str) else value
        for key, value in options.items()
    }
    with pytest.raises(EvaluationError) as error:
        list(evaluate(Request(**{"model_dir": str(run), **options})))
    assert words.replace("{}", str(run)) in str(error.value)


def test_what_is_waited_for_is_told(trained, tmp_path, capsys):
    with pytest.raises(EvaluationTimeout):
        list(evaluate(Request(str(tmp_path / "nowhere"), timeout_secs=0.1)))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("waiting for 0.1 s for the first checkpoint in ")
    assert "there is no such folder yet: is --model_dir right?" in line
