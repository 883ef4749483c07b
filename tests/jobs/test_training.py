"""The training job, in this process: resume, checkpoints, summaries, how it ends."""

import contextlib
import dataclasses
import fcntl
import glob
import os
import pty
import re
import signal
import struct
import sys
import termios
import time

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1.jobs import models, network_from_config, training
from bn_tf1.jobs.config import Config, ConfigError
from bn_tf1.jobs.data import datasets
from bn_tf1.jobs.data.idx_and_cifar import DataFileError
from bn_tf1.jobs.evaluation import Request, evaluate
from bn_tf1.jobs.progress import Progress
from bn_tf1.jobs.training import TrainingError, has_channels_first, train


def _config(model_dir, **options):
    return Config(
        model_dir=str(model_dir),
        **{
            "model": "mlp",
            "batch_size": 16,
            "max_steps": 6,
            "save_checkpoint_steps": 3,
            "summary_steps": 2,
            "log_steps": 2,
            **options,
        },
    )


def _saved_values(model_dir):
    reader = tf.train.NewCheckpointReader(tf.train.latest_checkpoint(str(model_dir)))
    names = reader.get_variable_to_shape_map()
    return {name: reader.get_tensor(name) for name in names}


def _events(model_dir):
    for path in sorted(glob.glob(os.path.join(str(model_dir), "train", "events*"))):
        yield from tf.train.summary_iterator(path)


def _steps_of(model_dir, tag):
    return [
        event.step
        for event in _events(model_dir)
        if any(value.tag == tag for value in event.summary.value)
    ]


def _summary_values(model_dir, tag):
    return [
        value.simple_value
        for event in _events(model_dir)
        for value in event.summary.value
        if value.tag == tag
    ]


def test_the_result_tells_step_loss_and_time(tmp_path):
    result = train(_config(tmp_path))
    assert result.step == 6
    assert 0 < result.loss < 10
    assert result.seconds > 0


def test_checkpoints_are_named_by_their_step(tmp_path):
    train(_config(tmp_path))
    indices = sorted(path.name for path in tmp_path.glob("*.index"))
    assert indices == ["model.ckpt-0.index", "model.ckpt-3.index", "model.ckpt-6.index"]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    train(_config(tmp_path, save_checkpoint_steps=1, keep_checkpoint_max=2))
    indices = sorted(path.name for path in tmp_path.glob("*.index"))
    assert indices == ["model.ckpt-5.index", "model.ckpt-6.index"]


def test_checkpoints_hold_every_moving_statistic_and_they_were_updated(tmp_path):
    train(_config(tmp_path))
    saved = _saved_values(tmp_path)
    for layer in ("layer1", "layer2", "layer3"):
        assert np.all(saved[f"{layer}/batch_norm/moving_mean"] != 0)
        assert np.all(saved[f"{layer}/batch_norm/moving_variance"] != 1)


@pytest.mark.parametrize("options", [{}, {"accumulate_steps": 3}])
def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path, options):
    whole = _config(
        tmp_path / "whole", lr_schedule="constant", weight_ema_decay=0.9, **options
    )
    train(whole)
    halves = dataclasses.replace(whole, model_dir=str(tmp_path / "halves"))
    train(dataclasses.replace(halves, max_steps=3))
    assert train(halves).step == 6
    expected, resumed = _saved_values(whole.model_dir), _saved_values(halves.model_dir)
    assert set(resumed) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)


def test_a_step_of_several_batches_is_one_of_all_their_images(tmp_path, capfd):
    """The first layer's statistics; the averages of the weights move once, too."""
    options = {"max_steps": 1, "augment": False, "weight_ema_decay": 0.9}
    train(_config(tmp_path / "one", batch_size=64, **options))
    several = {"batch_size": 16, "accumulate_steps": 4, "log_steps": 1}
    result = train(_config(tmp_path / "four", **several, **options))
    assert result.step == 1
    line = capfd.readouterr().out.splitlines()[-1]
    assert line.startswith(f"step 1/1: loss {result.loss:.4f}, accuracy ")
    curve = _summary_values(tmp_path / "four", "loss")
    np.testing.assert_allclose(curve, [result.loss], rtol=1e-6)
    one, four = (_saved_values(tmp_path / name) for name in ("one", "four"))
    for role in ("moving_mean", "moving_variance"):
        name = f"layer1/batch_norm/{role}"
        np.testing.assert_allclose(four[name], one[name], rtol=1e-5, atol=1e-6)
    weights = "layer3/weights"
    average = four[f"{weights}/ExponentialMovingAverage"]
    start = tf.train.NewCheckpointReader(str(tmp_path / "four" / "model.ckpt-0"))
    moved = four[weights] - start.get_tensor(weights)
    assert np.any(moved != 0)
    # At step 1 the decay is (1 + 1) / (10 + 1).
    expected = four[weights] - 2 / 11 * moved
    np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-7)
    kept = [value for name, value in four.items() if "accumulated" in name]
    assert len(kept) > 4 and not any(np.any(value) for value in kept)


def test_a_finished_run_is_left_as_it_is(tmp_path):
    train(_config(tmp_path))
    before = _saved_values(tmp_path)
    result = train(_config(tmp_path))
    assert result.step == 6
    assert result.loss is None
    for name, value in _saved_values(tmp_path).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


@pytest.mark.parametrize(
    ("options", "decays"),
    [
        ({"bn_decay": 0.75}, [0.75, 0.75]),
        ({"bn_decay": "cumulative"}, [0, 0.5]),
        ({"bn_decay": 0.999, "bn_decay_warm_up": True}, [1 / 10, 2 / 11]),
    ],
)
def test_statistics_and_their_summaries_follow_the_recipe(tmp_path, options, decays):
    """Two steps with a learning rate of almost 0, against NumPy on the same batches."""
    config = _config(
        tmp_path, max_steps=2, learning_rate=1e-30, summary_steps=1, **options
    )
    train(config)
    saved = _saved_values(tmp_path)
    weights = saved["layer1/weights"].astype(np.float64)
    mean, variance = np.zeros(100), np.ones(100)
    distances = {"mean_distance": [], "variance_distance": []}
    for images, decay in zip(_first_batches(config, count=2), decays):
        inputs = images.reshape(16, 64).astype(np.float64) @ weights
        batch_mean, batch_variance = inputs.mean(axis=0), inputs.var(axis=0)
        mean = decay * mean + (1 - decay) * batch_mean
        variance = decay * variance + (1 - decay) * batch_variance
        distance = np.abs(batch_mean - mean) / np.sqrt(variance + 1e-3)
        ratio = (batch_variance + 1e-3) / (variance + 1e-3)
        distances["mean_distance"].append(distance.mean())
        distances["variance_distance"].append(np.abs(np.log(ratio)).mean())
    # float32 sums of 64 products, then of 16 values: some units of 2^-24.
    scope = "layer1/batch_norm/"
    np.testing.assert_allclose(saved[scope + "moving_mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(saved[scope + "moving_variance"], variance, rtol=1e-5)
    for tag, expected in distances.items():
        summaries = _summary_values(tmp_path, "layer1/" + tag)
        # A mean of all steps is at the first that of the batch, but for rounding.
        np.testing.assert_allclose(summaries, expected, rtol=1e-5, atol=1e-6)


def _first_batches(config, count):
    with tf.Graph().as_default(), tf.Session() as session:
        batches = datasets.training_batches(
            network_from_config.open_split(config, "train"),
            config.batch_size,
            seed=config.seed,
            first_step=0,
            augment=config.augment,
        )
        iterator = tf.data.make_initializable_iterator(batches)
        images, _ = iterator.get_next()
        session.run(iterator.initializer)
        return [session.run(images) for _ in range(count)]


def test_summaries_tell_loss_accuracy_rate_speed_and_statistics(tmp_path):
    train(_config(tmp_path))
    tags = {value.tag for event in _events(tmp_path) for value in event.summary.value}
    layer = "layer1/"
    assert {
        "loss",
        "accuracy",
        "learning_rate",
        "penalty",
        "examples_per_second",
        layer + "moving_mean",
        layer + "moving_variance",
        layer + "mean_distance",
        layer + "variance_distance",
    } <= tags


def test_the_first_and_the_last_step_are_among_the_points(tmp_path):
    train(_config(tmp_path, max_steps=5, summary_steps=2))
    assert _steps_of(tmp_path, "loss") == [1, 2, 4, 5]


def test_each_curve_says_once_what_it_means(tmp_path):
    train(_config(tmp_path))
    told = {}
    for event in _events(tmp_path):
        for value in event.summary.value:
            told.setdefault(value.tag, []).append(value.metadata.summary_description)
    assert len(told) > 20
    for tag, descriptions in told.items():
        assert descriptions[0].endswith("."), tag
        assert not any(descriptions[1:])


def test_the_loss_is_shown_without_the_penalty(tmp_path):
    train(_config(tmp_path, weight_decay=1.0, max_steps=1, log_steps=1))
    (loss,), (penalty,) = (
        _summary_values(tmp_path, tag) for tag in ("loss", "penalty")
    )
    assert penalty > 50
    assert 0 < loss < 10


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        ({"learning_rate": 1e-12}, True),
        ({"max_steps": 60, "batch_size": 64, "learning_rate": 0.3}, False),
    ],
)
def test_a_run_that_learnt_nothing_says_so(tmp_path, capsys, options, warns):
    train(_config(tmp_path, **options))
    errors = capsys.readouterr().err
    assert ("no better than guessing" in errors) == warns
    assert len(errors.splitlines()) == warns


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 0.4, 5: 0.4, 8: 0.4}),
        ("cosine", {0: 0.4, 5: 0.2, 10: 0.0}),
        ("step", {0: 0.4, 5: 0.4, 6: 0.04, 7: 0.04, 8: 0.004}),
    ],
)
def test_learning_rate_schedules(schedule, expected):
    config = Config(lr_schedule=schedule, learning_rate=0.4, max_steps=10)
    global_step = tf.placeholder(tf.int64, [])
    rate = training._learning_rate(config, global_step)
    with tf.Session() as session:
        for step, value in expected.items():
            # float32, and a cosine that misses 0 by its rounding
            np.testing.assert_allclose(
                session.run(rate, {global_step: step}), value, rtol=1e-6, atol=1e-7
            )


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path):
    config = _config(
        tmp_path,
        learning_rate=1e30,
        normalization="none",
        save_checkpoint_steps=1,
        summary_steps=100,
    )
    with pytest.raises(TrainingError, match=r"loss is not finite at step \d: .*1e\+30"):
        train(config)
    newest = tf.train.latest_checkpoint(str(tmp_path))
    assert newest is None or not newest.endswith("-6")
    # One looks at the curves to see why.
    assert not np.isfinite(_summary_values(tmp_path, "penalty")[-1])
    assert len(_steps_of(tmp_path, "loss")) == 2
    assert (tmp_path / "report.html").exists()


def test_a_run_that_ends_early_is_an_error(tmp_path, monkeypatch):
    """The session takes an error of this kind, in a save, for the end of the data."""
    save = tf.train.Saver.save

    def failing_save(saver, session, path, global_step, **options):
        if global_step == 3:
            raise tf.errors.OutOfRangeError(None, None, "in a save")
        return save(saver, session, path, global_step, **options)

    monkeypatch.setattr(tf.train.Saver, "save", failing_save)
    with pytest.raises(TrainingError, match="ended at step 3 of 6"):
        train(_config(tmp_path))


def test_a_run_that_a_signal_ends_has_its_last_step_in_the_curves(
    tmp_path, monkeypatch
):
    update = Progress.update

    def stopping_update(progress, results):
        update(progress, results)
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)  # the thread that reads it comes to its turn

    monkeypatch.setattr(Progress, "update", stopping_update)
    config = _config(tmp_path, summary_steps=100, max_steps=100)
    with pytest.raises(training.TrainingStopped, match="SIGTERM at step (3|4) of 100"):
        train(config)
    newest = tf.train.latest_checkpoint(str(tmp_path))
    for tag in ("loss", "penalty", "accuracy", "learning_rate"):
        assert _steps_of(tmp_path, tag) == [1, int(newest.rpartition("-")[2])]


def test_a_model_whose_update_is_forgotten_is_refused(tmp_path, monkeypatch):
    def forgetful(images, is_training, settings):
        x = tf.reshape(images, [-1, 64])
        y = bn_tf1.batch_norm(x, is_training, updates_collection="nobody_runs_these")
        return y[:, : settings.num_classes]

    monkeypatch.setitem(models.MODELS, "mlp", forgetful)
    with pytest.raises(ValueError, match="never update the moving statistics"):
        train(_config(tmp_path))


def test_progress_is_printed_as_lines_where_there_is_no_terminal(tmp_path, capsys):
    train(_config(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "step 2/6",
        "step 4/6",
        "step 6/6",
    ]
    for word in ("loss", "accuracy", "lr", "examples/s"):
        assert word in lines[0]


def test_progress_is_one_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    """A pseudo-terminal of 80 columns in the place of stderr."""
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    with open(secondary, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        train(_config(tmp_path))
    text = b""
    # Linux reports the end of a pseudo-terminal as an error of the device.
    with contextlib.suppress(OSError):
        while True:
            text += os.read(primary, 4096)
    os.close(primary)
    bars = [bar.rstrip() for bar in re.split("[\r\n]", text.decode()) if "%|" in bar]
    assert bars[-1].startswith("100%|")
    assert "| 6/6 [" in bars[-1]
    assert re.search(r"loss \d\.\d{3}, acc \d\.\d{3}, \d+/s$", bars[-1])
    assert max(map(len, bars)) < 80
    # The lines stay, above it.
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "step 2/6",
        "step 4/6",
        "step 6/6",
    ]


def test_a_resume_says_where_it_goes_on(tmp_path, capsys):
    train(_config(tmp_path))
    capsys.readouterr()
    train(_config(tmp_path, max_steps=8))
    out = capsys.readouterr().out
    assert f"resuming {tmp_path} at step 6" in out
    assert "step 8/8" in out


def test_a_batch_that_no_tensor_holds_is_refused_before_the_run_begins(tmp_path):
    config = _config(tmp_path / "run", batch_size=2**27)
    with pytest.raises(ConfigError, match="at most 33554431 go into one batch"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_start_that_fails_in_its_first_step_leaves_nothing_that_binds(tmp_path):
    """The image that could not be read may be taken away, and the flags changed."""
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(6):
            image = np.full([4, 4, 3], 40 * number, np.uint8)
            with tf.Graph().as_default(), tf.Session() as session:
                png = session.run(tf.image.encode_png(image))
            (tmp_path / "data" / name / f"{number}.png").write_bytes(png)
    damaged = tmp_path / "data" / "a" / "6.png"
    damaged.write_bytes(png[:-3])
    options = {"dataset": "images", "data_dir": str(tmp_path / "data"), "image_size": 4}
    run = tmp_path / "run"
    with pytest.raises(DataFileError, match="6.png"):
        train(_config(run, **options))
    assert not list(run.glob("model.ckpt*")) + list(run.glob("c*"))
    damaged.unlink()
    options = {**options, "seed": 1, "max_steps": 1, "batch_size": 4}
    assert train(_config(run, **options)).step == 1


def test_channels_first_are_for_training_alone(tmp_path):
    config = _config(
        tmp_path,
        dataset="synthetic",
        synthetic_size=32,
        synthetic_examples=16,
        model="mobilenet_v1",
        data_format="NCHW",
        batch_size=4,
        max_steps=1,
    )
    if not has_channels_first():
        with pytest.raises(ConfigError, match="--data_format is 'NCHW'"):
            train(config)
        return
    train(config)
    assert 's: "NCHW"' in (tmp_path / "graph.pbtxt").read_text()
    (result,) = evaluate(Request(model_dir=str(tmp_path), run_once=True))
    assert result.step == 1  # by a network with channels last, on any device
