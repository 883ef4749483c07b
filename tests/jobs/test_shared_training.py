"""train.py over two workers: the run of one process, resumable by one process."""

import dataclasses
import re
import signal
import subprocess
import sys

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.jobs import config as configuration
from bn_tf1.jobs.config import Config
from bn_tf1.jobs.training import train
from tests import ROOT

# No layer of it has an edge, such as that of relu, that rounding could lead across.
OPTIONS = {"model": "mlp", "batch_size": 9, "log_steps": 1}


def launch(model_dir, **options):
    flags = [f"--{name}={value}" for name, value in {**OPTIONS, **options}.items()]
    command = [sys.executable, "-m", "bn_tf1", "launch", "--workers=2", "--"]
    return subprocess.Popen(
        [*command, sys.executable, "train.py", f"--model_dir={model_dir}", *flags],
        cwd=str(ROOT),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def tensors(model_dir):
    reader = tf.train.load_checkpoint(str(model_dir))
    return {
        name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()
    }


def assert_same(one, other):
    one, other = tensors(one), tensors(other)
    assert set(one) == set(other)
    for name, value in other.items():
        np.testing.assert_allclose(one[name], value, rtol=1e-5, atol=1e-5)


def test_a_run_is_the_same_run_however_many_carry_it(tmp_path):
    alone, shared = str(tmp_path / "alone"), str(tmp_path / "shared")
    process = launch(shared, max_steps=5)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert "[1] worker 1 of 2 joined at step 0\n" in output
    assert "[1] worker 1 of 2 ended at step 5\n" in output
    assert len(re.findall(r"^\[1\]", output, re.MULTILINE)) == 2

    config = Config(model_dir=alone, max_steps=5, **OPTIONS)
    train(config)
    assert_same(shared, alone)
    saved = configuration.load(shared)
    assert dataclasses.replace(saved, model_dir=alone) == configuration.load(alone)
    for model_dir in (alone, shared):
        train(dataclasses.replace(config, model_dir=model_dir, max_steps=7))
    assert_same(shared, alone)


def test_all_workers_stop_at_one_step(tmp_path):
    process = launch(tmp_path, max_steps=10**6, accumulate_steps=2)
    for line in process.stdout:
        if "step 3/" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 75, errors
    steps = set(re.findall(r"stopped by SIGTERM at step (\d+) of", errors))
    assert len(steps) == 1, errors
    assert int(tensors(tmp_path)["global_step"]) == int(steps.pop())
