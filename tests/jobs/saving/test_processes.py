"""Faults that need a process of their own: SIGKILL, signals, a hung step, two trainers.

A start of TensorFlow 2.21 takes seconds, so that each process serves several assertions.
"""

import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from bn_tf1.jobs.config import Config
from bn_tf1.jobs.saving import committing_saver
from bn_tf1.jobs.training import train
from tests import ROOT

# More than a start and a step take on a busy machine, less than for ever.
_LIMIT_SECS = 240
_ENDLESS = 10**9


def _start(script, **flags):
    arguments = [f"--{flag}={value}" for flag, value in flags.items()]
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _end(process):
    """Returns (exit code, stdout, stderr)."""
    try:
        output, errors = process.communicate(timeout=_LIMIT_SECS)
    finally:
        process.kill()
    assert "Traceback" not in errors
    return process.returncode, output, errors


def _start_training(model_dir, **flags):
    """A process that is training: it has said something."""
    values = {
        "model": "mlp",
        "batch_size": 16,
        "max_steps": _ENDLESS,
        "log_steps": 1,
        "grace_secs": _LIMIT_SECS,
    }
    process = _start("train.py", model_dir=model_dir, **{**values, **flags})
    assert "step " in process.stdout.readline()
    return process


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    """SIGKILL somewhere in a run that saves every step: most of its time it saves."""
    killed = _start_training(tmp_path / "killed", save_checkpoint_steps=1)
    killed.stdout.readline()
    killed.kill()
    code, output, _ = _end(killed)
    assert code == -signal.SIGKILL
    newest = committing_saver.recover(str(tmp_path / "killed"))
    last = int(re.findall(r"^step (\d+)/", output, re.MULTILINE)[-1]) if output else 0
    assert newest.step >= last - 1
    values = {}
    for name in ("killed", "whole"):
        model_dir = str(tmp_path / name)
        common = {"model": "mlp", "batch_size": 16, "lr_schedule": "constant"}
        config = Config(model_dir=model_dir, max_steps=newest.step + 5, **common)
        train(config)
        values[name] = _saved_values(model_dir, newest.step + 5)
    assert set(values["killed"]) == set(values["whole"])
    for name, value in values["whole"].items():
        np.testing.assert_array_equal(values["killed"][name], value, err_msg=name)


def _saved_values(model_dir, step):
    reader = tf.train.NewCheckpointReader(os.path.join(model_dir, f"model.ckpt-{step}"))
    names = reader.get_variable_to_shape_map()
    return {name: reader.get_tensor(name) for name in names}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_last_step_and_ends_with_code_75(tmp_path, number):
    process = _start_training(tmp_path, save_checkpoint_steps=10**6)
    process.send_signal(number)
    code, output, errors = _end(process)
    assert code == 75
    output = "step 1/\n" + output  # what was read already; it may be the last one, too
    last = int(re.findall(r"^step (\d+)/", output, re.MULTILINE)[-1])
    assert f"stopped by {signal.Signals(number).name} at step {last} of" in errors
    assert committing_saver.listed(str(tmp_path))[-1].step == last
    committing_saver.verify(str(tmp_path / f"model.ckpt-{last}"))


def test_beside_a_trainer_another_one_is_refused_and_an_evaluation_may_time_out(
    tmp_path,
):
    first = _start_training(tmp_path, save_checkpoint_steps=10**6)
    # A process that is stopped, and needs no time of the processor, still has its lock.
    first.send_signal(signal.SIGSTOP)
    second = _start("train.py", model_dir=tmp_path)
    evaluation = _start("eval.py", model_dir=tmp_path, timeout_secs=0.1)
    code, _, errors = _end(second)
    assert code == 5
    assert f"in which process {first.pid} on " in errors
    code, output, errors = _end(evaluation)
    assert code == 4
    assert output.startswith("step 0: accuracy")
    assert "a process is still training there" in errors
    first.send_signal(signal.SIGTERM)
    first.send_signal(signal.SIGCONT)
    code, _, errors = _end(first)
    assert code == 75, errors


# A step that waits in TensorFlow for an element that nobody puts into a queue.
_HUNG_TRAINING = """
import sys
import tensorflow.compat.v1 as tf
tf.disable_v2_behavior()
from bn_tf1.jobs import training
from bn_tf1.jobs.config import Config
from bn_tf1.jobs.process import command_line

build = training._build_step

def build_hung(*arguments):
    step = build(*arguments)
    say = tf.py_func(lambda: print("hanging", flush=True), [], [], stateful=True)
    with tf.control_dependencies([step.train_op, say]):
        hung = tf.FIFOQueue(1, tf.float32).dequeue()
    return step._replace(train_op=hung)

training._build_step = build_hung
grace_secs = float(sys.argv.pop())
config = Config(model_dir=sys.argv.pop(), model="mlp", grace_secs=grace_secs)
command_line.run(lambda: config, training.train)
"""


@pytest.mark.parametrize(
    ("grace_secs", "signals", "words"),
    [
        (0.5, [signal.SIGTERM], "the step and its checkpoint took more than 0.5 s"),
        (999, [signal.SIGTERM, signal.SIGINT], "a second signal"),
    ],
)
def test_a_hung_step_ends_in_the_grace_period_or_at_a_second_signal(
    tmp_path, grace_secs, signals, words
):
    process = subprocess.Popen(
        [sys.executable, "-c", _HUNG_TRAINING, str(tmp_path), str(grace_secs)],
        cwd=str(ROOT),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "hanging\n"
    for number in signals:
        process.send_signal(number)
    code, _, errors = _end(process)
    # The kernel may deliver two signals in any order.
    assert code in [128 + number for number in signals]
    assert f"without saving: {words}" in errors
    # Nothing is damaged: the checkpoint of the start is there.
    assert committing_saver.recover(str(tmp_path)).step == 0
