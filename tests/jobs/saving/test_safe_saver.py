"""Safe checkpoints in a MonitoredTrainingSession that is not the job's, and is killed."""

import os
import signal
import subprocess
import sys

import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from tests import ROOT

PROGRAM = """
import sys
import tensorflow.compat.v1 as tf
import bn_tf1

tf.disable_v2_behavior()
folder, last = sys.argv[1], int(sys.argv[2])
x = tf.random_uniform([8, 3], seed=1)
loss = tf.reduce_mean(tf.square(bn_tf1.batch_norm(x, True)))
step = tf.train.get_or_create_global_step()
train_op = bn_tf1.make_train_op(
    loss, tf.train.GradientDescentOptimizer(0.1), global_step=step
)
scaffold = tf.train.Scaffold(saver=bn_tf1.SafeSaver(folder, max_to_keep=3))
hooks = [tf.train.StopAtStepHook(last_step=last)]
with tf.train.MonitoredTrainingSession(
    checkpoint_dir=folder,
    scaffold=scaffold,
    hooks=hooks,
    save_checkpoint_steps=1,
    save_summaries_steps=None,
    save_summaries_secs=None,
) as session:
    made = session.run(step)
    print("start", made, flush=True)
    while not session.should_stop():
        session.run(train_op)
        made += 1
        print("step", made, flush=True)
"""


def start(folder, last):
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(folder), str(last)],
        cwd=str(ROOT),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_run_goes_on_from_the_newest_that_can_be_read(tmp_path):
    process = start(tmp_path, 10**6)
    while process.stdout.readline().strip() != "step 6":
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    newest = tf.train.latest_checkpoint(str(tmp_path))
    step = int(newest.rpartition("-")[2])
    assert step >= 5
    with open(newest + ".data-00000-of-00001", "r+b") as file:
        file.truncate(10)

    process = start(tmp_path, step + 2)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert output.splitlines()[0] == f"start {step - 1}"
    assert "damaged checkpoint, passed over: " + newest in errors
    state = tf.train.get_checkpoint_state(str(tmp_path))
    steps = [int(p.rpartition("-")[2]) for p in state.all_model_checkpoint_paths]
    assert steps == [step, step + 1, step + 2]
    assert not [name for name in os.listdir(str(tmp_path)) if "partial" in name]


def test_saves_that_cannot_be_safe(tmp_path, session):
    tf.get_variable("v", initializer=float("nan"))
    saver = bn_tf1.SafeSaver(str(tmp_path))
    session.run(tf.global_variables_initializer())
    path = str(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="`global_step` is None"):
        saver.save(session, path)
    with pytest.raises(ValueError, match="`save_path` is .*elsewhere"):
        saver.save(session, str(tmp_path / "elsewhere" / "model.ckpt"), global_step=1)
    with pytest.raises(RuntimeError, match="tensor v is not finite"):
        saver.save(session, path, global_step=1)
    assert saver.last_checkpoints == []
    with pytest.raises(ValueError, match="`max_to_keep` is -1"):
        bn_tf1.SafeSaver(str(tmp_path), max_to_keep=-1)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="^`model_dir` is .*there can be no such folder"):
        bn_tf1.SafeSaver(str(tmp_path / "file"))
