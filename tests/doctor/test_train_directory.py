"""The doctor on a training directory: its files, its history and its events."""

import os
import shutil

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1.graphs import training_nodes
from bn_tf1.jobs.config import Config
from bn_tf1.jobs.training import train
from tests.checkpoints import checkpoint_forge as forge

_STEPS = (1000, 2000, 3000)


def _values(step, **changes):
    """A run that moves a little between its checkpoints; two layers."""
    random = np.random.RandomState(step)
    values = {"global_step": np.int64(step)}
    for layer in ("one", "two"):
        values.update(
            {
                f"{layer}/gamma": random.uniform(0.9, 1.1, [5]),
                f"{layer}/beta": random.uniform(-0.1, 0.1, [5]),
                f"{layer}/moving_mean": random.uniform(0.9, 1.1, [5]),
                f"{layer}/moving_variance": random.uniform(1.9, 2.1, [5]),
            }
        )
    values = {
        name: value if name == "global_step" else value.astype(np.float32)
        for name, value in values.items()
    }
    return {**values, **changes}


def _write_run(directory, values_by_step):
    paths = [
        forge.write(directory / f"model.ckpt-{step}", values)
        for step, values in values_by_step.items()
    ]
    _write_state(directory, [os.path.basename(path) for path in paths])
    return directory


def _write_state(directory, names):
    lines = [f'model_checkpoint_path: "{names[-1]}"']
    lines += [f'all_model_checkpoint_paths: "{name}"' for name in names]
    (directory / "checkpoint").write_text("\n".join(lines) + "\n")


@pytest.fixture
def run(tmp_path):
    return _write_run(tmp_path, {step: _values(step) for step in _STEPS})


def _checks(directory, *gravities):
    gravities = gravities or ("error", "warning")
    findings = bn_tf1.audit(str(directory))
    return {(f.check, f.layer) for f in findings if f.gravity in gravities}


def _append_event(path, **values):
    with tf.summary.FileWriter(str(path)) as writer:
        for step in (1, 2):
            writer.add_summary(
                tf.Summary(
                    value=[
                        tf.Summary.Value(tag=tag, simple_value=value)
                        for tag, value in values.items()
                    ]
                ),
                step,
            )


def test_a_healthy_run(run):
    _append_event(run, loss=0.5)
    assert bn_tf1.audit(str(run)) == []


@pytest.mark.parametrize("model", ["mlp", "convnet"])
def test_a_directory_of_the_training_job(tmp_path, model):
    train(
        Config(
            model_dir=str(tmp_path),
            model=model,
            max_steps=70,
            save_checkpoint_steps=20,
            batch_size=16,
            summary_steps=10,
        )
    )
    assert not _checks(tmp_path)


def test_a_directory_of_a_monitored_session(tmp_path):
    """With a .meta and a graph.pbtxt for each checkpoint, as an estimator's."""
    x = tf.random_normal([32, 4], 1.0, 2.0)
    y = bn_tf1.batch_norm(x, True, decay=0.9, name="bn")
    step = tf.train.get_or_create_global_step()
    train_op = bn_tf1.make_train_op(
        tf.reduce_mean(tf.abs(y - 1)),
        tf.train.GradientDescentOptimizer(0.01),
        global_step=step,
    )
    with tf.train.MonitoredTrainingSession(
        checkpoint_dir=str(tmp_path),
        save_checkpoint_steps=40,
        log_step_count_steps=None,
    ) as session:
        for _ in range(100):
            session.run(train_op)
    assert not _checks(tmp_path)


def test_the_newest_checkpoint_is_audited(run):
    path = run / "model.ckpt-3000"
    sick = _values(3000, **{"two/moving_variance": np.float32([1, 1, 1, 1, -1])})
    forge.write(path, sick)
    assert _checks(run) == {("negative-variance", "two")}


@pytest.mark.parametrize("content", ["", "garbage", "\0\1\2", "node { a { b {" * 900])
def test_a_state_file_that_is_damaged(run, content):
    (run / "checkpoint").write_text(content)
    assert _checks(run, "error") == {("state-file-damaged", "")}


def test_a_state_file_that_is_missing(run):
    (run / "checkpoint").unlink()
    assert _checks(run, "note") == {("state-file-missing", "")}
    _append_event(run, loss=0.5)  # somebody trained here
    assert _checks(run, "warning") == {("state-file-missing", "")}


def test_a_listed_checkpoint_that_is_missing(run):
    _write_state(run, ["model.ckpt-500", "model.ckpt-2000", "model.ckpt-3000"])
    assert _checks(run, "warning") == {("checkpoint-missing", "")}
    _write_state(run, ["model.ckpt-3000", "model.ckpt-4000"])
    assert _checks(run, "error") == {("checkpoint-missing", "")}


def test_a_state_file_that_lags_behind(run):
    _write_state(run, ["model.ckpt-1000", "model.ckpt-2000"])
    assert _checks(run, "warning") == {("state-file-behind", "")}


def test_a_directory_that_was_moved(run):
    _write_state(run, [f"/elsewhere/model.ckpt-{step}" for step in _STEPS])
    assert _checks(run) == {("state-file-elsewhere", "")}


@pytest.mark.parametrize(
    "step, gravity", [(3000, "error"), (1000, "warning")], ids=["newest", "older"]
)
@pytest.mark.parametrize("file", ["index", "data-00000-of-00001"])
def test_a_listed_checkpoint_that_is_cut_off(run, step, gravity, file):
    path = run / f"model.ckpt-{step}.{file}"
    path.write_bytes(path.read_bytes()[:-30])
    assert ("checkpoint-damaged", "") in _checks(run, gravity)


def test_a_flipped_bit_in_any_checkpoint(run):
    path = run / "model.ckpt-1000.data-00000-of-00001"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(bytes(content))
    assert {check for check, _ in _checks(run, "error")} == {"damaged-tensor"}


def test_data_without_an_index(run):
    shutil.copy(
        str(run / "model.ckpt-3000.data-00000-of-00001"),
        str(run / "model.ckpt-3500.data-00000-of-00001"),
    )
    assert _checks(run) == {("index-missing", "")}


def _frozen(step, *roles):
    first = _values(_STEPS[0])
    return _values(step, **{f"two/{role}": first[f"two/{role}"] for role in roles})


def test_statistics_that_stand_still(tmp_path):
    roles = ("moving_mean", "moving_variance")
    _write_run(tmp_path, {step: _frozen(step, *roles) for step in _STEPS})
    assert _checks(tmp_path) == {("statistics-stand-still", "two")}


def test_a_layer_that_is_frozen_wholly_is_a_note(tmp_path):
    roles = ("moving_mean", "moving_variance", "gamma", "beta")
    _write_run(tmp_path, {step: _frozen(step, *roles) for step in _STEPS})
    assert not _checks(tmp_path)
    assert _checks(tmp_path, "note") == {("statistics-stand-still", "two")}


@pytest.mark.parametrize(
    "name, value", [("two/moving_mean", 900.0), ("two/moving_variance", 1e5)]
)
def test_statistics_that_jump(tmp_path, name, value):
    values = {step: _values(step) for step in _STEPS}
    values[2000][name] = np.full([5], value, np.float32)
    values[2000]["two/moving_variance"] += np.float32([0, 0, 0, 0, 1])
    _write_run(tmp_path, values)
    assert _checks(tmp_path) == {("statistics-jump", "two")}


def test_statistics_that_were_lost_in_a_restart(tmp_path):
    values = {step: _values(step) for step in _STEPS}
    values[3000]["one/moving_mean"] = np.zeros(5, np.float32)
    values[3000]["one/moving_variance"] = np.ones(5, np.float32)
    _write_run(tmp_path, values)
    assert ("statistics-jump", "one") in _checks(tmp_path, "error")
    assert {layer for _, layer in _checks(tmp_path)} == {"one"}


def test_events_that_show_nan(run):
    _append_event(run, loss=float("nan"), accuracy=0.5)
    assert _checks(run, "error") == {("events-not-finite", "")}
    (finding,) = bn_tf1.audit(str(run))
    assert finding.what.startswith(
        "'loss' was NaN or infinite 2 times, first at step 1"
    )


def test_a_tensor_without_a_value_is_no_last_value(run):
    _append_event(run, loss=float("nan"))
    empty = tf.Summary.Value(tag="loss")
    empty.tensor.dtype = tf.float32.as_datatype_enum
    with tf.summary.FileWriter(str(run), filename_suffix=".later") as writer:
        writer.add_summary(tf.Summary(value=[empty]), 3)
    assert _checks(run, "error") == {("events-not-finite", "")}


def test_the_tail_of_a_live_run_and_an_event_file_of_anything(run):
    _append_event(run, loss=0.5)
    (path,) = run.glob("*tfevents*")
    path.write_bytes(path.read_bytes()[:-7])
    (run / "events.out.tfevents.1").write_bytes(os.urandom(1000))
    (run / "events.out.tfevents.2").write_bytes(b"\xff" * 1000)
    (run / "events.out.tfevents.3").mkdir()
    assert bn_tf1.audit(str(run)) == []


def test_a_damaged_graph_does_not_hide_the_checkpoint(run):
    (run / "model.ckpt-3000.meta").write_bytes(b"\x0a\xff\xff")
    assert _checks(run) == {("graph-unreadable", "")}


def test_a_graph_too_large_to_be_told_does_not_hide_the_checkpoint(run, monkeypatch):
    monkeypatch.setattr(training_nodes, "MAX_CONDITIONS", 0)
    meta = tf.MetaGraphDef()
    for name, op in (("x", "Placeholder"), ("p", "Placeholder"), ("s", "Switch")):
        meta.graph_def.node.add(name=name, op=op)
    meta.graph_def.node[-1].input.extend(["x", "p"])
    meta.graph_def.node.add(name="y", op="Identity", input=["s"])
    (run / "model.ckpt-3000.meta").write_bytes(meta.SerializeToString())
    assert _checks(run) == {("graph-unreadable", "")}


def test_a_layer_of_the_graph_without_statistics_in_the_checkpoint(tmp_path):
    x = tf.placeholder(tf.float32, [8, 5])
    bn_tf1.batch_norm(x, True, name="one")
    bn_tf1.batch_norm(x, True, name="odd_name")
    values = _values(1000)
    run = _write_run(tmp_path, {1000: values})
    tf.train.export_meta_graph(str(run / "model.ckpt-1000.meta"))
    assert ("statistics-missing", "odd_name") in _checks(run, "error")
